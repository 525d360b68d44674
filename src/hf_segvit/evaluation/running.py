"""Evaluation of a segmentation model: what it scores, which classes cost most, and the score of every picture.

`evaluate` is for one answer to each picture, `evaluate_variants` for several. The loop, also over processes and after
an interruption, is in counting_loop.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image
from transformers.utils import logging

from ..metrics.mean_iou import Absent
from .counting import MAIN, ORACLE, EvaluationCounts, VariantCounts
from .counting_loop import CHUNK_SIZE, count_pictures, rgb_picture
from .label_matching import match_labels
from .predicting import Predictor
from .tasks import EvaluationTask, evaluation_task

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class PictureScore:
    """How well one picture was segmented.

    Attributes:
        index: its place in the data set.
        image_id: its name there.
        score: in [0, 1]: of all segments together the panoptic quality, the mean IoU of the classes in the picture, or
            the F1 of instances at IoU 0.5; NaN where there is nothing to find and nothing was found.
    """

    index: int
    image_id: Any
    score: float


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        task: `panoptic`, `instance` or `semantic`.
        num_images: pictures that were counted.
        metrics: what the metric computes, without its `per_class`; with further metrics also theirs, as `oracle_pq`
            and the like.
        classes: a row for every class that occurs, what hurts most first: `label_id`, `label`, `loss` (by how much the
            mean would rise if the class were perfect), the columns of the task, and the main one of further metrics.
        pictures: the score of every picture, the worst first.
        notes: what a reader of the numbers should know.
    """

    task: str
    num_images: int
    metrics: dict[str, Any]
    classes: list[dict[str, Any]]
    pictures: list[PictureScore]
    notes: list[str] = field(default_factory=list)


def evaluate(
    predictor: Predictor,
    dataset: Any,
    id2label: Mapping[int, str],
    *,
    stuff_classes: Sequence[int] = (),
    batch_size: int = 1,
    num_workers: int = 0,
    absent: Absent = "exclude",
    more_metrics: Sequence[str] = (),
    partial_folder: Path | None = None,
    about: Mapping[str, Any] | None = None,
    chunk_size: int = CHUNK_SIZE,
    progress: bool = False,
) -> EvaluationResult:
    """Evaluate a model; every process of the run must call it, and all get the same result.

    Args:
        predictor: the model, for the task that is evaluated.
        dataset: entries of our readers, each with an `image_id` of its own.
        id2label: the data set's classes.
        stuff_classes: those that are stuff.
        batch_size: pictures at a time.
        num_workers: processes that read pictures.
        absent: what classes that occur nowhere mean for mean IoU, see `MeanIoU`.
        more_metrics: what to compute beside the task's own metric: "oracle", the score that the model's masks would
            reach with perfect labels (see `OracleClassification` and sure_masks.py), and "boundary", boundary IoU or
            boundary AP.
        partial_folder: keep counts here, and go on from those that are there; `None` keeps none. They stay when the
            result is returned: the caller deletes them once it has written that.
        about: what is evaluated; counts in the folder of something else are an error.
        chunk_size: pictures to count before counts are saved.
        progress: show a progress bar.

    Raises:
        ValueError: model and data set have different classes, a picture cannot be read, segmented or counted, or the
            folder holds another evaluation; the message says which and why.
    """
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": num_workers,
        "absent": absent,
        "more_metrics": more_metrics,
    }
    settings |= {"partial_folder": partial_folder, "about": about, "chunk_size": chunk_size, "progress": progress}
    ask = predictor.with_masks if ORACLE in more_metrics and isinstance(predictor, Predictor) else predictor
    results = evaluate_variants(
        predictor.task,
        predictor.id2label,
        lambda pictures: [[answer] for answer in ask(pictures)],
        dataset,
        id2label,
        variants=(MAIN,),
        stuff_classes=stuff_classes,
        **settings,
    )
    return results[MAIN]


def evaluate_variants(
    task_name: str,
    model_labels: Mapping[int, str],
    predict: Callable[[Sequence[Image.Image]], Sequence[Sequence[Any]]],
    dataset: Any,
    id2label: Mapping[int, str],
    *,
    variants: Sequence[str],
    stuff_classes: Sequence[int] = (),
    batch_size: int = 1,
    num_workers: int = 0,
    absent: Absent = "exclude",
    more_metrics: Sequence[str] = (),
    partial_folder: Path | None = None,
    about: Mapping[str, Any] | None = None,
    chunk_size: int = CHUNK_SIZE,
    progress: bool = False,
) -> dict[str, EvaluationResult]:
    """Evaluate several variants of a model that answer together; every process of the run must call it.

    Args:
        task_name: `panoptic`, `instance` or `semantic`.
        model_labels: the model's classes.
        predict: for each picture of a batch the answers of all variants, in their order.
        dataset: as for `evaluate`, as are all arguments below.
        id2label: the data set's classes.
        variants: names.
        stuff_classes: label ids.
        batch_size: pictures at a time.
        num_workers: processes that read pictures.
        absent: what classes that occur nowhere mean for mean IoU.
        more_metrics: what to compute beside the task's own metric, for each variant.
        partial_folder: where to keep counts.
        about: what is evaluated.
        chunk_size: pictures to count before counts are saved.
        progress: show a progress bar.

    Returns:
        The result of each variant, by name.

    Raises:
        ValueError: as `evaluate`.
    """
    task = evaluation_task(task_name, len(id2label), stuff_classes, absent)
    labels = match_labels(model_labels, id2label)
    table = labels.table
    if labels.warning and PartialState().is_main_process:
        logger.warning(labels.warning)

    def count_batch(counts: VariantCounts, batch: list[tuple[int, Any]]) -> None:
        pictures = [rgb_picture(entry) for _, entry in batch]
        for (index, entry), answers in zip(batch, predict(pictures), strict=True):
            if table is not None:
                answers = [task.relabel_both(answer, table) for answer in answers]
            counts.count(index, entry, answers)

    counts = count_pictures(
        dataset,
        lambda: VariantCounts(task, variants, more_metrics),
        count_batch,
        batch_size=batch_size,
        num_workers=num_workers,
        partial_folder=partial_folder,
        about={**(about or {}), "metrics": [MAIN, *more_metrics], "variants": list(variants)},
        chunk_size=chunk_size,
        progress=progress,
    )
    notes = [labels.warning] if labels.warning else []
    return {name: _result(task, task_name, one, id2label, notes) for name, one in counts.counts.items()}


def _result(
    task: EvaluationTask, name: str, counts: EvaluationCounts, id2label: Mapping[int, str], notes: list[str]
) -> EvaluationResult:
    metric = counts.metrics[MAIN]
    computed = metric.compute()
    per_class, further = computed.pop("per_class"), dict[str, dict[int, float]]()
    num_classes = max(computed["num_classes"], 1)
    for other, values in ((key, one.compute()) for key, one in counts.metrics.items() if key != MAIN):
        further[other] = {label: row[task.columns[0]] for label, row in values.pop("per_class").items()}
        scores = {key: value for key, value in values.items() if isinstance(value, float)}
        computed |= {f"{other}_{key.removeprefix(f'{other}_')}": value for key, value in scores.items()}
    rows = []
    for label, values in per_class.items():
        columns = task.row(label, values, metric)
        score = columns.pop(task.columns[0])
        if math.isnan(score) or ("tp" in values and not values["tp"] + values["fp"] + values["fn"]):
            continue
        if columns.get("mostly taken for") is not None:
            columns["mostly taken for"] = id2label[columns["mostly taken for"]]
        row = {"label_id": label, "label": id2label[label], "loss": (1 - score) / num_classes, task.columns[0]: score}
        rows.append(row | {other: values[label] for other, values in further.items()} | columns)
    weight = "pixels" if "pixels" in task.columns else "references"
    rows.sort(key=lambda row: (-row["loss"], -row.get(weight, row.get("missed", 0)), row["label_id"]))
    pictures = [PictureScore(*picture) for picture in counts.pictures]
    pictures.sort(key=lambda picture: (math.isnan(picture.score), picture.score, picture.index))
    return EvaluationResult(name, metric.num_images, computed, rows, pictures, notes)
