"""Boundary average precision as a module of the `evaluate` library; README.md is its card."""

import datasets
import evaluate

from hf_segvit.metrics import boundary
from hf_segvit.metrics.evaluate_module import CountingMetric

_DESCRIPTION = """\
Boundary AP of instance segmentation: COCO's average precision where the overlap of two masks is the smaller of mask IoU
and boundary IoU, so that outlines count for large objects too.
"""

_CITATION = r"""@inproceedings{cheng2021boundary,
  title = {Boundary {IoU}: Improving Object-Centric Image Segmentation Evaluation},
  author = {Cheng, Bowen and Girshick, Ross and Doll{\'a}r, Piotr and Berg, Alexander C. and Kirillov, Alexander},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2021}
}
"""


class BoundaryAveragePrecision(CountingMetric):
    """Boundary average precision, counted batch by batch."""

    metric_class = boundary.BoundaryAveragePrecision

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
            reference_urls=["https://arxiv.org/abs/2103.16562"],
        )
