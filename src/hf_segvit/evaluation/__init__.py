"""Evaluation of a model on a data set: `evaluate` runs it, a `Predictor` asks the model, an `EvaluationTask` counts.

- predicting.py: images in, answers in the form that the metrics take, from our models and any of Transformers' for
  universal segmentation.
- tasks.py: for each task the metric, the truth it takes, the score of a single image and the report by class.
- sure_masks.py: the masks that the oracle labels anew.
- counting.py: the task's metric and further ones, fed alike; label_matching.py: which class is which.
- partial_results.py: what makes an interrupted evaluation go on.
- counting_loop.py: the loop over all this, for running.py and points.py; report.py: the table and the drawings.
"""

from .evaluate import EvaluationResult, evaluate
from .predictor import Predictor, load_predictor

__all__ = ["EvaluationResult", "Predictor", "evaluate", "load_predictor"]
