"""Evaluate a model on a data set.

`evaluate` (evaluate.py) runs a `Segmenter` over the images, across processes and interruptions. What it counts is in
counts.py, what differs between tasks in tasks.py; report.py shows the result. oracle.py scores the model's masks with
perfect labels, alpha_sweep.py a fused model with several weights of its ViT-P, points.py a ViT-P alone. anomaly.py
scores how well a model knows what it does not know, calibration.py whether its scores are as high as its accuracy.
"""

from .evaluate import EvaluationResult, EvaluationSettings, evaluate

__all__ = ["EvaluationResult", "EvaluationSettings", "evaluate"]
