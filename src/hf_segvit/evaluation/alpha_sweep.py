"""Scores of a fused model over alpha, the weight of its ViT-P.

`sweep_alphas` runs generator and ViT-P once for each image and post-processes their logits with every alpha.
`AlphaSweep` holds the scores; `sweep_text`, `sweep_content` and `plot_sweep` show them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..drawing.segments import plot_curves
from ..inference.loading import is_fused
from ..inference.segmenter import Segmenter
from ..models.class_fusion import check_alpha
from .counts import ORACLE
from .evaluate import EvaluationResult, evaluate_variants, variant_answers
from .report import result_content
from .tasks import evaluation_task

DEFAULT_ALPHAS = tuple(number / 10 for number in range(11))
_CURVES = 8  # classes in the drawing: more colours could not be told apart


@dataclass(frozen=True)
class AlphaSweep:
    """Scores over alpha.

    Attributes:
        headline: name of the metric that the task is judged by.
        column: name of the same metric for a single class.
        results: by alpha, ascending from 0, the generator alone.
    """

    headline: str
    column: str
    results: dict[float, EvaluationResult]

    @property
    def generator(self) -> EvaluationResult:
        """The result of the generator alone."""
        return self.results[0.0]

    @property
    def best_alpha(self) -> float:
        """The alpha with the highest score, the lowest of several."""
        return max(self.results, key=self.score)

    @property
    def oracle(self) -> float | None:
        """The score of the generator's masks with perfect labels, if it was computed."""
        return self.generator.metrics.get(f"oracle_{self.headline}")

    def score(self, alpha: float) -> float:
        """The headline metric, in [0, 1]."""
        return self.results[alpha].metrics[self.headline]

    def gap_closed(self, alpha: float) -> float | None:
        """Share of the gap from generator to oracle that ViT-P closes; `None` without oracle or gap."""
        gap = math.nan if self.oracle is None else self.oracle - self.score(0.0)
        return (self.score(alpha) - self.score(0.0)) / gap if gap > 0 else None

    def by_class(self) -> dict[str, dict[float, float]]:
        """Scores of each class that occurs, by alpha; the class that alpha changes most comes first."""
        scores: dict[str, dict[float, float]] = {}
        for alpha, result in self.results.items():
            for row in result.classes:
                scores.setdefault(row["label"], {})[alpha] = row[self.column]
        return dict(sorted(scores.items(), key=lambda item: min(item[1].values()) - max(item[1].values())))


def sweep_alphas(
    segmenter: Segmenter, alphas: Sequence[float], dataset: Any, id2label: Mapping[int, str], **settings: Any
) -> AlphaSweep:
    """Score a fused model with several weights of its ViT-P; other arguments and errors as for `evaluate`.

    Args:
        alphas: weights in [0, 1], rising from 0, the generator alone.
        settings: fields of `EvaluationSettings`; counts in a `partial_folder` are for exactly these alphas.
    """
    if not is_fused(segmenter.model):
        raise ValueError(
            f"{type(segmenter.model).__name__} has no classifier whose weight alpha could be; name one with "
            "--classifier"
        )
    for alpha in alphas:
        check_alpha(alpha)
    # Alpha 0 is required: every gain is measured against the generator alone.
    if sorted({float(alpha) for alpha in alphas}) != list(alphas) or alphas[0] != 0:
        raise ValueError(f"alphas {list(alphas)} must rise from 0, the generator alone, and not repeat")
    with_masks = ORACLE in settings.get("more_metrics", ())
    results = evaluate_variants(
        segmenter,
        lambda images: variant_answers(segmenter, images, alphas, with_masks),
        dataset,
        id2label,
        [_name(alpha) for alpha in alphas],
        **settings,
    )
    task = evaluation_task(segmenter.task, len(id2label), max_detections=settings.get("max_detections"))
    return AlphaSweep(task.headline, task.columns[0], {alpha: results[_name(alpha)] for alpha in alphas})


def sweep_text(sweep: AlphaSweep, max_rows: int = 20) -> str:
    """Tables over alpha, in total and by class, and the gap to the oracle; scores in percent."""
    generator, best = sweep.generator, sweep.best_alpha
    names = [
        name for name, value in generator.metrics.items() if isinstance(value, float) and not name.startswith("oracle_")
    ]
    # A stable sort: the headline metric first, the others in their order.
    names.sort(key=lambda name: name != sweep.headline)
    lines = [f"{generator.task}, {generator.num_images} images, generator and ViT-P each asked once"]
    lines += [f"  note: {note}" for note in generator.notes]
    rows = [["alpha", *names]]
    for alpha, result in sweep.results.items():
        remark = "generator alone" if alpha == 0 else "best" if alpha == best else ""
        rows.append([_name(alpha), *[_percent(result.metrics[name]) for name in names], remark])
    if sweep.oracle is not None:
        bound = [_percent(generator.metrics.get(f"oracle_{name}", math.nan)) for name in names]
        rows.append(["oracle", *bound, "the generator's masks with perfect labels"])
    lines += _table(rows)
    # If the generator alone is best, the largest alpha shows how much ViT-P loses.
    alpha = best if best > 0 else max(sweep.results)
    if alpha > 0 and (share := sweep.gap_closed(alpha)) is not None:
        lines.append(f"  with alpha {_name(alpha)} ViT-P closes {100 * share:.0f} % of the gap to perfect labels")
    if len(sweep.results) > 2:
        lines.append("  (an alpha that was chosen on the images that it is scored on flatters)")
    classes = sweep.by_class()
    shown = list(classes.items())[:max_rows]
    if shown:
        lines += ["", f"{sweep.column} by class, what alpha moves most first:"]
        cells = [[name, *[_percent(values.get(alpha, math.nan)) for alpha in sweep.results]] for name, values in shown]
        lines += _table([["class", *map(_name, sweep.results)], *cells])
        if len(classes) > len(shown):
            lines.append(f"  and {len(classes) - len(shown)} more classes")
    return "\n".join(lines)


def sweep_content(sweep: AlphaSweep) -> dict[str, Any]:
    """All of a sweep, for JSON; the evaluation results are under `results` by alpha."""
    return {
        "headline": sweep.headline,
        "alphas": list(sweep.results),
        "scores": [sweep.score(alpha) for alpha in sweep.results],
        "oracle": sweep.oracle,
        "gap_closed": [sweep.gap_closed(alpha) for alpha in sweep.results],
        "best_alpha": sweep.best_alpha,
        "results": {_name(alpha): result_content(result) for alpha, result in sweep.results.items()},
    }


def plot_sweep(path: Path, sweep: AlphaSweep, title: str = "") -> None:
    """Plot the headline metric over alpha, the oracle's level, and the classes that alpha changes most."""
    alphas = list(sweep.results)
    curves = {f"{sweep.headline}/with ViT-P": [(alpha, 100 * sweep.score(alpha)) for alpha in alphas]}
    if sweep.oracle is not None:
        level = 100 * sweep.oracle
        curves[f"{sweep.headline}/perfect labels"] = [(alphas[0], level), (alphas[-1], level)]
    for name, values in list(sweep.by_class().items())[:_CURVES]:
        curves[f"{sweep.column} by class/{name}"] = [
            (alpha, 100 * value) for alpha, value in values.items() if not math.isnan(value)
        ]
    plot_curves(curves, path, title=title, x_label="alpha, the weight of ViT-P")


def _name(alpha: float) -> str:
    return f"{alpha:g}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def _table(rows: list[list[str]]) -> list[str]:
    """Rows as aligned lines; the first column and remarks to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]  # noqa: B905 - only some rows have a remark
    lines = []
    for name, *cells in rows:
        numbers = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:])]  # noqa: B905
        lines.append("  " + "  ".join([f"{name:<{widths[0]}}", *numbers, *cells[len(numbers) :]]).rstrip())
    return lines
