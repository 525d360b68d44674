"""Evaluation of a model on a data set.

- evaluate.py: `evaluate` asks a `Segmenter` about all images and counts its answers, over processes and interruptions.
- tasks.py: for each task the metric, the truth it takes, the score of a single image and the report by class.
- counts.py: the task's metric and further ones, fed alike, in memory and on disk.
- oracle.py: what perfect labels for the model's masks would score.
- alpha_sweep.py: a fused model with several weights of its ViT-P; points.py: a ViT-P alone.
- report.py: the table, the JSON file and the drawings.
"""

from .evaluate import EvaluationResult, EvaluationSettings, evaluate

__all__ = ["EvaluationResult", "EvaluationSettings", "evaluate"]
