"""Evaluate anomaly scores of pixels, several of them from one pass.

`evaluate_anomalies` scores a model by several confidences (models/confidence.py), whose negative is the anomaly score,
on a data set whose classes are known and anomaly, or on any other with some classes taken for anomalies: by pixels, and
in a second pass by components. The rest shows the result: as a table by score and data set, as JSON content, as curves,
and as drawings of the worst images. H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..atomic_files import writing
from ..data.class_lists import ANOMALY_CLASSES
from ..drawing.segments import contact_sheet, draw_segments, plot_curves
from ..inference.segmenter import Segmenter
from ..lookup import suggestion
from ..metrics.anomaly_components import TRACKS, AnomalyComponents
from ..metrics.anomaly_pixels import AnomalyPixels
from ..metrics.ranking import VOID
from ..models.confidence import Confidence, confidences_named
from ..models.image_decoding import shown_rgb, to_pixels
from ..models.image_values import AS_STORED
from .counts import MAIN, VariantCounts
from .evaluate import EvaluationSettings, ImageScore, all_counts, answers_to, uncalibrated
from .tasks import EvaluationTask

DEFAULT_SCORES = ("msp", "maxlogit", "entropy", "energy", "rba")
COLUMNS = ("auprc", "fpr95", "auroc", "best_f1")
COMPONENT_COLUMNS = ("siou", "ppv", "mean_f1")
_CURVE_POINTS = 200


@dataclass(frozen=True)
class AnomalyResult:
    """The result on one data set.

    Attributes:
        scores: by confidence, the values of `AnomalyPixels`.
        curves: by confidence, `precision_recall` and `roc`, lists of (x, y) in [0, 1].
        images: average precision of every image by the first confidence, the worst first; NaN where an image has no
            anomaly, or nothing else.
        components: by confidence, the values of `AnomalyComponents` and their `threshold`, or `None` for each where
            `undefined` gives the reason; empty if not asked for.
        track: of SegmentMeIfYouCan, whose smallest components count, if they were asked for.
    """

    num_images: int
    scores: dict[str, dict[str, Any]]
    curves: dict[str, dict[str, list[tuple[float, float]]]]
    images: list[ImageScore]
    notes: list[str] = field(default_factory=list)
    components: dict[str, dict[str, Any]] = field(default_factory=dict)
    track: str | None = None


class AnomalyTask(EvaluationTask):
    """Anomalous pixels; `anomalous` are the label ids of the data set that count as such."""

    name = "anomaly"
    headline = "auprc"
    columns: tuple[str, ...] = COLUMNS

    def __init__(self, anomalous: Sequence[int]) -> None:
        self.anomalous = sorted(set(anomalous))

    def new_metric(self) -> AnomalyPixels:
        """An empty metric."""
        return AnomalyPixels()

    def new_calibration(self) -> Any:
        """There is none."""
        raise ValueError("calibration is about right and wrong answers, not about anomalies; leave it out")

    def reference(self, entry: Mapping[str, Any]) -> np.ndarray:
        """(H, W) uint8: 0 known, 1 anomaly, 255 void."""
        labels = {row["id"]: row["label_id"] for row in entry["segments"]}
        ids = np.asarray(entry["segment_map"])
        truth = np.full(ids.shape, VOID, np.uint8)
        for segment_id, label in labels.items():
            truth[ids == segment_id] = label in self.anomalous
        return truth

    def image_score(self, metric: AnomalyPixels) -> float:
        """Average precision."""
        score = metric.compute()["auprc"]
        return float("nan") if score is None else score

    def row(self, label: int, values: Mapping[str, Any], metric: Any) -> dict[str, Any]:
        """There are no classes."""
        return {}


class ComponentTask(AnomalyTask):
    """Components of anomalous pixels, of a score with its threshold."""

    columns = COMPONENT_COLUMNS

    def __init__(self, anomalous: Sequence[int], threshold: float, track: str) -> None:
        super().__init__(anomalous)
        self.threshold, self.track = threshold, track

    def new_metric(self) -> Any:
        """An empty metric."""
        return AnomalyComponents(self.threshold, self.track)

    def image_score(self, metric: Any) -> float:
        """Mean F1."""
        score = metric.compute()["mean_f1"]
        return float("nan") if score is None else score


def anomalous_classes(id2label: Mapping[int, str], classes: Sequence[int] | None) -> list[int]:
    """The label ids that are anomalies: `classes`, or by default the class anomaly of an anomaly data set."""
    if classes is not None:
        if len(set(classes)) >= len(id2label):
            raise ValueError("all classes of the data set are named as anomalies, so that none is known; name fewer")
        return list(classes)
    if tuple(id2label[label] for label in sorted(id2label)) != ANOMALY_CLASSES:
        raise ValueError(
            f"the data set has the classes {', '.join(list(id2label.values())[:8])}, not "
            f"{' and '.join(ANOMALY_CLASSES)}; say with classes which of them are anomalies, such as those that the "
            "model was not trained on"
        )
    return [ANOMALY_CLASSES.index("anomaly")]


def evaluate_anomalies(
    segmenter: Any,
    dataset: Any,
    id2label: Mapping[int, str],
    scores: str | Confidence | Sequence[str | Confidence] = DEFAULT_SCORES,
    components: str | None = None,
    **settings: Any,
) -> AnomalyResult:
    """Score a model by its confidences; every process of the run must call it, and all get the same result.

    Args:
        segmenter: a `Segmenter` of task semantic; anything with `confidences(images, scores)` will do.
        dataset: entries of our readers, each with a unique `image_id`.
        id2label: the data set's classes; `classes` among the settings are those that are anomalies.
        scores: names in models/confidence.py.
        components: "anomaly" or "obstacle", the track of SegmentMeIfYouCan whose smallest components count: ask the
            model a second time, and score components at each score's threshold of the best F1.
        settings: `classes`, `batch_size`, `num_workers`, `partial_folder`, `about`, `identity`, `chunk_size` and
            `progress` of `EvaluationSettings`.

    Raises:
        ValueError: there is no such score, the model gives none, an image cannot be read, or the folder holds another
            evaluation.
    """
    options, wanted = EvaluationSettings(**settings), confidences_named(scores)
    if components is not None and components not in TRACKS:
        raise ValueError(f"there is no track {components!r} of components; {suggestion(components, TRACKS)}")
    task = AnomalyTask(anomalous_classes(id2label, options.classes))
    names = [str(each) for each in wanted]
    if isinstance(segmenter, Segmenter):
        segmenter = uncalibrated(segmenter)  # calibration makes the surest scores equal

    def count_batch(counts: VariantCounts, batch: list[tuple[int, Any]]) -> None:
        answers = answers_to(segmenter, batch, lambda images: segmenter.confidences(images, wanted))
        for (index, entry), (_, maps) in zip(batch, answers, strict=True):
            truth = task.reference(entry)
            for name, counted in counts.counts.items():
                counted.count(index, entry["image_id"], truth, -np.asarray(maps[name]), {})

    counts = all_counts(task, dataset, id2label, count_batch, options, names)
    metrics = {name: counts.counts[name].metrics[MAIN] for name in names}
    images = [ImageScore(*image) for image in counts.images]
    images.sort(key=lambda image: (np.isnan(image.score), image.score, image.index))
    values = {name: metric.compute() for name, metric in metrics.items()}
    notes = []
    if options.classes is not None:
        notes.append(f"anomalies are the classes {', '.join(id2label[label] for label in task.anomalous)}")
    notes += dict.fromkeys(filter(None, (each["undefined"] for each in values.values())))
    if not all(each["exact"] for each in values.values()):
        worst = max(each[f"{name}_bound"] or 0 for each in values.values() for name in ("auprc", "fpr95", "auroc"))
        notes.append(f"scores so many and close that some were merged: values are within {100 * worst:.2g} points")
    curves = {name: _curves(metric) for name, metric in metrics.items()}
    result = AnomalyResult(len(counts.images), values, curves, images, notes)
    if components is not None:
        found = _components(segmenter, dataset, id2label, wanted, result, components, task.anomalous, options)
        sizes = "true ones of at least {1}, predicted ones of at least {0} pixels".format(*TRACKS[components])
        notes.append(f"components are those of the track {components}: {sizes}")
        reasons = dict.fromkeys(each["undefined"] for each in found.values())
        notes += [reason for reason in reasons if reason is not None and reason not in notes]
        result = replace(result, components=found, track=components)
    return result


def _components(
    segmenter: Any,
    dataset: Any,
    id2label: Mapping[int, str],
    wanted: Sequence[Confidence],
    result: AnomalyResult,
    track: str,
    anomalous: Sequence[int],
    options: EvaluationSettings,
) -> dict[str, dict[str, Any]]:
    """Component metrics by confidence, from a second pass, as the thresholds follow from all pixels of all images."""
    thresholds = {name: values["best_f1_threshold"] for name, values in result.scores.items()}
    chosen = [each for each in wanted if thresholds[str(each)] is not None]
    if not chosen:
        absent = dict.fromkeys(("threshold", *COMPONENT_COLUMNS))
        return {name: {**absent, "undefined": values["undefined"]} for name, values in result.scores.items()}
    first, *others = [str(each) for each in chosen]

    def further() -> dict[str, AnomalyComponents]:
        return {name: AnomalyComponents(thresholds[name], track) for name in others}

    def count_batch(counts: VariantCounts, batch: list[tuple[int, Any]]) -> None:
        answers = answers_to(segmenter, batch, lambda images: segmenter.confidences(images, chosen))
        for (index, entry), (_, maps) in zip(batch, answers, strict=True):
            anomaly = {name: -np.asarray(maps[name]) for name in (first, *others)}
            (counted,) = counts.counts.values()
            counted.count(index, entry["image_id"], task.reference(entry), anomaly[first], anomaly)

    task = ComponentTask(anomalous, thresholds[first], track)
    folder = options.partial_folder and component_counts(options.partial_folder)
    identity = {**options.identity, "thresholds": thresholds, "track": track}
    own = replace(options, partial_folder=folder, identity=identity)
    (counted,) = all_counts(task, dataset, id2label, count_batch, own, further=further).counts.values()
    metrics = {first: counted.metrics[MAIN], **{name: counted.metrics[name] for name in others}}
    return {name: {"threshold": thresholds[name], **metric.compute()} for name, metric in metrics.items()}


def component_counts(partial_folder: Path) -> Path:
    """The folder of the second pass's counts, beside that of the first."""
    return partial_folder.with_name(f"{partial_folder.name}-components")


def _curves(metric: AnomalyPixels) -> dict[str, list[tuple[float, float]]]:
    """Curves of at most a few hundred points, evenly spread along both axes; empty where they are not defined."""
    positives, negatives, _ = metric.ranked()
    true, false = np.cumsum(positives), np.cumsum(negatives)
    if not len(true) or not true[-1] or not false[-1]:
        return {"precision_recall": [], "roc": []}
    found, alarms = true / true[-1], false / false[-1]
    steps = np.linspace(0, 1, _CURVE_POINTS)
    kept = np.unique(np.concatenate([np.searchsorted(side, steps) for side in (found, alarms)]))
    precision = true / np.maximum(true + false, 1)
    return {
        "precision_recall": list(zip(found[kept].tolist(), precision[kept].tolist(), strict=True)),
        "roc": [(0.0, 0.0), *zip(alarms[kept].tolist(), found[kept].tolist(), strict=True)],
    }


def anomaly_text(results: Mapping[str, AnomalyResult]) -> str:
    """A table by score and data set; in percent."""
    lines = []
    for name, result in results.items():
        lines.append(f"anomaly, {name}, {result.num_images} images")
        lines += [f"  note: {note}" for note in result.notes]
        columns = (*COLUMNS, *COMPONENT_COLUMNS) if result.components else COLUMNS
        rows = [["score", *columns]]
        for score, values in result.scores.items():
            values = {**values, **result.components.get(score, {})}
            cells = ["-" if values.get(column) is None else f"{100 * values[column]:.2f}" for column in columns]
            rows.append([score, *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for first, *cells in rows:
            line = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append("  " + "  ".join([f"{first:<{widths[0]}}", *line]))
        lines.append("")
    return "\n".join(lines[:-1])


def anomaly_content(results: Mapping[str, AnomalyResult]) -> dict[str, Any]:
    """All of the results, for JSON, by data set."""
    return {
        "task": AnomalyTask.name,
        "results": {
            name: {
                "num_images": result.num_images,
                "notes": result.notes,
                "scores": result.scores,
                "track": result.track,
                "components": result.components,
                "curves": result.curves,
                "pictures": [vars(image) for image in result.images],
            }
            for name, result in results.items()
        },
    }


def plot_anomaly_curves(path: Path, results: Mapping[str, AnomalyResult], title: str = "") -> None:
    """Draw precision over recall, and true over false positives, of each data set."""
    panels = (
        ("precision_recall", "precision over recall", "recall"),
        ("roc", "true over false positives", "rate of false positives"),
    )
    history, x_labels = {}, {}
    for name, result in results.items():
        name = name.replace("/", "\N{DIVISION SLASH}")  # a slash ends the name of a panel
        for kind, words, x_label in panels:
            for score, curves in result.curves.items():
                if curves[kind]:
                    x_labels[f"{name}: {words}"] = x_label
                    history[f"{name}: {words}/{score}"] = curves[kind]
    if history:
        plot_curves(history, path, title=title, x_label=x_labels, columns=len(panels), exact=x_labels)


def draw_worst_anomalies(
    path: Path,
    segmenter: Any,
    dataset: Any,
    id2label: Mapping[int, str],
    result: AnomalyResult,
    count: int = 8,
    classes: Sequence[int] | None = None,
) -> None:
    """Draw the worst images, what is anomalous in them, and the anomaly score by the first confidence.

    Raises:
        ValueError: the file cannot be written.
    """
    task, name = AnomalyTask(anomalous_classes(id2label, classes)), next(iter(result.scores))
    panels, titles = [], []
    for image in [each for each in result.images if not np.isnan(each.score)][:count]:
        entry = dataset[image.index]
        pixels = to_pixels(entry["image"], settings=getattr(segmenter, "image_settings", AS_STORED))
        ((_, maps),) = segmenter.confidences([pixels], name)
        truth = task.reference(entry).astype(np.int64)
        truth[truth == VOID] = -1
        rows = [{"id": label, "label_id": label} for label in (0, 1)]
        drawn = draw_segments(shown_rgb(pixels), truth, rows, dict(enumerate(ANOMALY_CLASSES)))
        panels.append([shown_rgb(pixels), drawn, _heat(-np.asarray(maps[name]))])
        titles.append(f"{image.image_id}: {100 * image.score:.2f}")
    if not panels:
        return
    columns = ("image", "truth", f"{name}: bright is anomalous")
    sheet = contact_sheet(panels, columns, row_titles=titles, panel_size=(480, 360))
    with writing(path) as partial:
        sheet.save(partial)


def _heat(scores: np.ndarray) -> Image.Image:
    """A map of scores in grey, from the lowest 1 % to the highest."""
    low, high = np.percentile(scores, [1, 99.9])
    return Image.fromarray((255 * np.clip((scores - low) / max(high - low, 1e-12), 0, 1)).astype(np.uint8))
