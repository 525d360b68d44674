"""Boundary IoU as a module of the `evaluate` library; README.md is its card."""

import datasets
import evaluate

from hf_segvit.metrics import boundary
from hf_segvit.metrics.evaluate_module import CountingMetric

_DESCRIPTION = """\
Boundary IoU of semantic segmentation: intersection over union of the pixels near the outlines of each class, where the
area of large objects hides no mistakes.
"""

_CITATION = r"""@inproceedings{cheng2021boundary,
  title = {Boundary {IoU}: Improving Object-Centric Image Segmentation Evaluation},
  author = {Cheng, Bowen and Girshick, Ross and Doll{\'a}r, Piotr and Berg, Alexander C. and Kirillov, Alexander},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2021}
}
"""


class BoundaryIou(CountingMetric):
    """Boundary IoU, counted batch by batch."""

    metric_class = boundary.BoundaryIoU

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))  # of (height, width)
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=self.metric_class.__doc__ or "",
            features=datasets.Features({"predictions": label_map, "references": label_map}),
            license="Apache-2.0",
            reference_urls=["https://arxiv.org/abs/2103.16562"],
        )
