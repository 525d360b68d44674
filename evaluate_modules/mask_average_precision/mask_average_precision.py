"""Mask average precision as a module of the `evaluate` library; README.md is its card."""

import datasets
import evaluate

from hf_segvit.metrics import mask_average_precision
from hf_segvit.metrics.evaluate_module import CountingMetric

_DESCRIPTION = """\
Average precision (AP) and recall of instance segmentation by the rules of COCO. The result equals that of pycocotools,
COCO's evaluator.
"""

_CITATION = r"""@inproceedings{lin2014microsoft,
  title = {Microsoft {COCO}: Common Objects in Context},
  author = {Lin, Tsung-Yi and Maire, Michael and Belongie, Serge and Hays, James and Perona, Pietro and
            Ramanan, Deva and Doll{\'a}r, Piotr and Zitnick, C. Lawrence},
  booktitle = {European Conference on Computer Vision},
  year = {2014}
}
"""


class MaskAveragePrecision(CountingMetric):
    """Mask average precision, counted batch by batch."""

    metric_class = mask_average_precision.MaskAveragePrecision

    def _info(self) -> evaluate.MetricInfo:
        plane = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))  # of (height, width)
        rle = {"size": datasets.Sequence(datasets.Value("int64")), "counts": datasets.Value("string")}
        segment = {"id": datasets.Value("int64"), "label_id": datasets.Value("int64")}
        found = [{**segment, "score": datasets.Value("float64")}]
        true = [{**segment, "is_crowd": datasets.Value("bool"), "area": datasets.Value("float64")}]
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=self.metric_class.__doc__ or "",
            # COCO RLEs, binary masks, or an id map.
            features=[
                datasets.Features(
                    {
                        "predictions": {"segmentation": masks, "segments_info": found},
                        "references": {"segmentation": masks, "segments_info": true},
                    }
                )
                for masks in ([rle], datasets.Sequence(plane), plane)
            ],
            license="Apache-2.0",
            reference_urls=["https://arxiv.org/abs/1405.0312"],
        )
