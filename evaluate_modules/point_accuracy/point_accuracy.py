"""Point accuracy as a module of the `evaluate` library; README.md is its card."""

import datasets
import evaluate

from hf_segvit.metrics import point_accuracy
from hf_segvit.metrics.evaluate_module import CountingMetric

_DESCRIPTION = """\
Accuracy of the classification of points in images: top-1, top-5 and class-balanced, and how far confidence can be
trusted (expected calibration error).
"""

_CITATION = """\
@inproceedings{guo2017calibration,
  title = {On Calibration of Modern Neural Networks},
  author = {Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle = {International Conference on Machine Learning},
  year = {2017}
}
"""


class PointAccuracy(CountingMetric):
    """Point accuracy, counted batch by batch."""

    metric_class = point_accuracy.PointAccuracy

    def _info(self) -> evaluate.MetricInfo:
        scores = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))  # of (points, classes)
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=self.metric_class.__doc__ or "",
            features=datasets.Features(
                {"predictions": scores, "references": datasets.Sequence(datasets.Value("int64"))}
            ),
            license="Apache-2.0",
            reference_urls=["https://arxiv.org/abs/1706.04599"],
        )
