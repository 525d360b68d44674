"""Which checkpoint is the best, and when training may stop early.

`Selection` keeps all evaluations of a run. Scores are compared only where the task says that they can be: EoMT's while
masked attention is annealed are of a model that is not yet the one that is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Selection:
    """The evaluations of a run, and the best of them.

    Args:
        metric: that decides; higher is better.
        patience: comparable evaluations without a better score after which training stops; `None` never.

    Attributes:
        evaluations: rows of `step`, `metrics` and `not_comparable` (the reason, or `None`).
        best: the row with the best score, or `None`.
        lost: the row that was the best, where its weights are no more.
    """

    def __init__(self, metric: str, patience: int | None = None) -> None:
        self.metric, self.patience = metric, patience
        self.evaluations: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.lost: dict[str, Any] | None = None

    def add(self, step: int, metrics: Mapping[str, float], not_comparable: str | None) -> bool:
        """Take in an evaluation.

        Returns:
            Whether it is the best so far.

        Raises:
            ValueError: the metric that decides is not among the metrics.
        """
        if self.metric not in metrics:
            raise ValueError(
                f"keep_best={self.metric!r} is no score of this task; choose one of {', '.join(sorted(metrics))}"
            )
        row = {"step": step, "metrics": dict(metrics), "not_comparable": not_comparable}
        self.evaluations.append(row)
        if not_comparable is None and (self.best is None or metrics[self.metric] > self.best["metrics"][self.metric]):
            self.best = row
            return True
        return False

    def lose_best(self) -> None:
        """The weights of the best cannot be had; those at the end take their place."""
        self.best, self.lost = None, self.best

    @property
    def last_step(self) -> int | None:
        """Step of the last evaluation."""
        return self.evaluations[-1]["step"] if self.evaluations else None

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `patience` comparable evaluations were no better than the best before."""
        if self.patience is None or self.best is None:
            return False
        since = [row for row in self.evaluations if row["step"] > self.best["step"] and row["not_comparable"] is None]
        return len(since) >= self.patience

    def explanation(self) -> str:
        """What was compared, in a sentence."""
        passed_over = [row for row in self.evaluations if row["not_comparable"] is not None]
        text = f"best of {len(self.evaluations) - len(passed_over)} evaluations by {self.metric}"
        if self.lost is not None:
            text += f" was step {self.lost['step']}, but its checkpoint is damaged: these are the weights at the end"
        elif self.best is None:
            text = "no evaluation was comparable, so these are the weights at the end"
        if passed_over:
            text += (
                f"; those up to step {passed_over[-1]['step']} were left out, as {passed_over[-1]['not_comparable']}"
            )
        return text

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"evaluations": self.evaluations, "best_step": self.best["step"] if self.best else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.evaluations = list(state["evaluations"])
        self.best = next((row for row in self.evaluations if row["step"] == state["best_step"]), None)
