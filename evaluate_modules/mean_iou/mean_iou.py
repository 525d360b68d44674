"""Mean IoU as a module of the `evaluate` library; README.md is its card."""

import datasets
import evaluate

from hf_segvit.metrics import mean_iou
from hf_segvit.metrics.evaluate_module import CountingMetric

_DESCRIPTION = """\
Mean intersection over union (mIoU) of semantic segmentation over a data set, with mean accuracy, pixel accuracy,
frequency-weighted IoU and the numbers of every class, all from one confusion matrix.
"""

_CITATION = """\
@article{everingham2015pascal,
  title = {The Pascal Visual Object Classes Challenge: A Retrospective},
  author = {Everingham, Mark and Eslami, S. M. Ali and Van Gool, Luc and Williams, Christopher K. I. and Winn, John and
            Zisserman, Andrew},
  journal = {International Journal of Computer Vision},
  volume = {111},
  year = {2015}
}
"""


class MeanIou(CountingMetric):
    """Mean IoU, counted batch by batch."""

    metric_class = mean_iou.MeanIoU

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))  # of (height, width)
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=self.metric_class.__doc__ or "",
            features=datasets.Features({"predictions": label_map, "references": label_map}),
            license="Apache-2.0",
            reference_urls=["https://doi.org/10.1007/s11263-014-0733-5"],
        )
