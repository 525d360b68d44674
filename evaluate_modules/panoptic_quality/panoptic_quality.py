"""Panoptic quality as a module of the `evaluate` library; README.md is its card."""

import datasets
import evaluate

from hf_segvit.metrics import panoptic_quality
from hf_segvit.metrics.evaluate_module import CountingMetric

_DESCRIPTION = """\
Panoptic quality (PQ) with its factors, segmentation quality (SQ) and recognition quality (RQ), over all classes, over
things and over stuff. The result equals that of panopticapi, COCO's evaluator.
"""

_CITATION = r"""@inproceedings{kirillov2019panoptic,
  title = {Panoptic Segmentation},
  author = {Kirillov, Alexander and He, Kaiming and Girshick, Ross and Rother, Carsten and Doll{\'a}r, Piotr},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2019}
}
"""


class PanopticQuality(CountingMetric):
    """Panoptic quality, counted batch by batch."""

    metric_class = panoptic_quality.PanopticQuality

    def _info(self) -> evaluate.MetricInfo:
        id_map = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))  # of (height, width)
        segment = {"id": datasets.Value("int64"), "label_id": datasets.Value("int64")}
        true_segment = {**segment, "is_crowd": datasets.Value("bool")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=self.metric_class.__doc__ or "",
            features=datasets.Features(
                {
                    "predictions": {"segmentation": id_map, "segments_info": [segment]},
                    "references": {"segmentation": id_map, "segments_info": [true_segment]},
                }
            ),
            license="Apache-2.0",
            reference_urls=["https://arxiv.org/abs/1801.00868"],
        )
