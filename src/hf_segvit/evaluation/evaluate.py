"""Evaluation of a segmentation model: what it scores, which classes cost most, and the score of every image.

`evaluate` is for one answer to each image, `evaluate_variants` for several from one pass; `EvaluationSettings` are the
settings of both. Under them `count_images` is the loop of every evaluation: each image is counted once, and counts are
kept on disk until the result is there. Started by `accelerate launch`, each process takes its share of the images, by
index and without padding, and the counts are merged at the end; alone it does everything itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.utils import logging

from ..inference.segmenter import Segmenter
from ..metrics.mean_iou import Absent
from ..models.image_decoding import to_rgb
from ..models.label_spaces import match_labels
from .counts import MAIN, ORACLE, EvaluationCounts, PartialResults, VariantCounts, further_metrics, import_path
from .oracle import masks_to_label
from .tasks import EvaluationTask, MaskedAnswer, evaluation_task

CHUNK_SIZE = 200  # images that an interruption can lose

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class EvaluationSettings:
    """How to evaluate: the keyword arguments of `evaluate`, `evaluate_variants`, `sweep_alphas` and `evaluate_points`.

    Attributes:
        stuff_classes: label ids of the data set that are stuff.
        absent: what classes that occur nowhere mean for mean IoU, see `MeanIoU`.
        more_metrics: what to compute beside the task's own metric: "oracle", the score that the model's masks would
            reach with perfect labels (see oracle.py), and "boundary", boundary IoU or boundary AP.
        metrics: classes of further metrics, fed with the same answers and truths as the task's own. Each is called as
            `Class(id2label=..., stuff_classes=...)`, with the data set's; `Metric` says what it must have. Its values
            stand in the result under the names that it gives them.
        batch_size: images at a time.
        num_workers: processes that read images.
        partial_folder: keep counts here, and go on from those that are there; `None` keeps none. They stay when the
            result is returned: the caller deletes them once it has written that.
        about: what is evaluated; counts in the folder of something else are an error.
        chunk_size: images to count before counts are saved.
        progress: show a progress bar.

    Raises:
        ValueError: a size is below 1.
    """

    stuff_classes: Sequence[int] = ()
    absent: Absent = "exclude"
    more_metrics: Sequence[str] = ()
    metrics: Sequence[type] = ()
    batch_size: int = 1
    num_workers: int = 0
    partial_folder: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    chunk_size: int = field(default_factory=lambda: CHUNK_SIZE)
    progress: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.chunk_size < 1:
            raise ValueError(
                f"batch_size is {self.batch_size} and chunk_size {self.chunk_size}; both must be at least 1"
            )


@dataclass(frozen=True)
class ImageScore:
    """How well one image was segmented.

    Attributes:
        index: its index in the data set.
        image_id: its name there.
        score: in [0, 1]: of all segments together the panoptic quality, the mean IoU of the classes in the image, or
            the F1 of instances at IoU 0.5; NaN where there is nothing to find and nothing was found.
    """

    index: int
    image_id: Any
    score: float


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        task: `panoptic`, `instance`, `semantic` or `points`.
        num_images: images that were counted.
        metrics: what the metric computes, without its `per_class`; with further metrics also theirs, as `oracle_pq`
            and the like.
        classes: a row for every class that occurs, what hurts most first: `label_id`, `label`, `loss` (by how much the
            mean would rise if the class were perfect), the columns of the task, and the main one of further metrics.
        images: the score of every image, the worst first.
        notes: what a reader of the numbers should know.
    """

    task: str
    num_images: int
    metrics: dict[str, Any]
    classes: list[dict[str, Any]]
    images: list[ImageScore]
    notes: list[str] = field(default_factory=list)


def evaluate(segmenter: Segmenter, dataset: Any, id2label: Mapping[int, str], **settings: Any) -> EvaluationResult:
    """Evaluate a model; every process of the run must call it, and all get the same result.

    Args:
        segmenter: the model, for the task that is evaluated; whatever has its `task`, `id2label` and `answers` will do.
        dataset: entries of our readers, each with an `image_id` of its own.
        id2label: the data set's classes.
        settings: of `EvaluationSettings`.

    Raises:
        ValueError: model and data set have different classes, an image cannot be read, segmented or counted, or the
            folder holds another evaluation; the message says which and why.
    """
    with_masks = ORACLE in settings.get("more_metrics", ()) and isinstance(segmenter, Segmenter)

    def predict(images: list[Image.Image]) -> list[list[Any]]:
        if with_masks:
            return variant_answers(segmenter, images, with_masks=True)
        return [[answer] for answer in segmenter.answers(images)]

    return evaluate_variants(segmenter, predict, dataset, id2label, (MAIN,), **settings)[MAIN]


def evaluate_variants(
    segmenter: Segmenter,
    predict: Callable[[list[Image.Image]], Sequence[Sequence[Any]]],
    dataset: Any,
    id2label: Mapping[int, str],
    variants: Sequence[str],
    **settings: Any,
) -> dict[str, EvaluationResult]:
    """Evaluate several variants of a model that answer together; otherwise as `evaluate`.

    Args:
        segmenter: the model, of which `task` and `id2label` are asked.
        predict: for each image of a batch the answers of all variants, in their order.
        dataset: entries of our readers.
        id2label: the data set's classes.
        variants: their names.
        settings: of `EvaluationSettings`.

    Returns:
        The result of each variant, by name.
    """
    how = EvaluationSettings(**settings)
    task = evaluation_task(segmenter.task, len(id2label), how.stuff_classes, how.absent)
    labels = match_labels(segmenter.id2label, id2label)
    if labels.warning and PartialState().is_main_process:
        logger.warning(labels.warning)

    def count_batch(counts: VariantCounts, batch: list[tuple[int, Any]]) -> None:
        rows = predict([to_rgb(entry["image"]) for _, entry in batch])
        for (index, entry), answers in zip(batch, rows, strict=True):
            reference = task.reference(entry)
            for one, answer in zip(counts.counts.values(), answers, strict=True):
                if labels.table is not None:
                    answer = task.relabel_both(answer, labels.table)
                others = {}
                if isinstance(answer, MaskedAnswer):
                    answer, others = answer.answer, {ORACLE: answer.masks}
                one.count(index, entry["image_id"], reference, answer, others)

    return count_images(task, dataset, id2label, count_batch, how, variants, notes=[labels.warning])


@torch.inference_mode()
def variant_answers(
    segmenter: Segmenter,
    images: Sequence[Image.Image],
    alphas: Sequence[float] | None = None,
    with_masks: bool = False,
) -> list[list[Any]]:
    """The answers to images with each weight of a ViT-P, which is asked once, as is the generator.

    Args:
        segmenter: of a fused model, or without alphas of any.
        images: upright RGB images.
        alphas: weights of ViT-P; `None`: one answer, as the model is.
        with_masks: make each answer a `MaskedAnswer`; the masks are the same for each alpha.
    """
    threshold = segmenter.ranking_threshold
    changes = [None] if alphas is None else [segmenter.with_alpha(alpha) for alpha in alphas]
    rows: list[list[Any]] = []
    # Alpha 1 has ViT-P asked about all queries, so that its answers serve any alpha.
    for asked in segmenter.ask(images, threshold, alpha=None if alphas is None else 1.0):
        columns = [segmenter.post_process(asked, threshold, change) for change in changes]
        batch = [list(answers) for answers in zip(*columns, strict=True)]
        if with_masks:
            masks = masks_to_label(segmenter, asked)
            batch = [[MaskedAnswer(one, mask) for one in row] for row, mask in zip(batch, masks, strict=True)]
        rows += batch
    return rows


def count_images(
    task: EvaluationTask,
    dataset: Any,
    id2label: Mapping[int, str],
    count_batch: Callable[[VariantCounts, list[tuple[int, Any]]], None],
    settings: EvaluationSettings,
    variants: Sequence[str] = (MAIN,),
    further: Callable[[], Mapping[str, Any]] = dict,
    notes: Sequence[str] = (),
) -> dict[str, EvaluationResult]:
    """Count all images of a data set; every process of the run must call it, and all get the same results.

    Args:
        task: what is evaluated.
        dataset: what is asked for by index, in the processes that read.
        id2label: its classes.
        count_batch: adds a batch of (index in the data set, entry) to counts.
        settings: see there.
        variants: names of the answers that each image gets.
        further: makes metrics beside those of the settings, by name.
        notes: for the results; empty ones are left out.

    Raises:
        ValueError: there is no image, or the folder holds another evaluation.
    """
    if not len(dataset):
        raise ValueError("the data set has no images; check its split")

    def new_counts() -> VariantCounts:
        asked = settings.more_metrics, settings.metrics, id2label, settings.stuff_classes
        return VariantCounts(
            {name: EvaluationCounts(task, {**further(), **further_metrics(task, *asked)}) for name in variants}
        )

    state = PartialState()
    counts, chunk = new_counts(), new_counts()
    saved: list[dict[str, Any]] = []
    partial = None
    if settings.partial_folder is not None:
        metrics = [MAIN, *settings.more_metrics, *map(import_path, settings.metrics)]
        about = {**settings.about, "metrics": metrics, "variants": list(variants), "pictures": len(dataset)}
        partial = PartialResults(settings.partial_folder, about)
        saved = partial.read()
    state.wait_for_everyone()  # before anyone writes what others must not read

    done = {image[0] for part in saved for image in part["pictures"]}
    waiting = [index for index in range(len(dataset)) if index not in done]
    if state.is_main_process:
        for part in saved:
            counts.merge(part)
    own = waiting[state.process_index :: state.num_processes]
    loader: DataLoader = DataLoader(
        _Indexed(dataset, own), batch_size=settings.batch_size, num_workers=settings.num_workers, collate_fn=list
    )
    show = settings.progress and state.is_main_process
    with tqdm(total=len(own), unit="image", disable=None if show else True) as bar:
        for batch in loader:
            count_batch(chunk, batch)
            bar.update(len(batch))
            if len(chunk.images) >= settings.chunk_size:
                _move(chunk, counts, partial)
    if chunk.images:
        _move(chunk, counts, partial)
    counts.merge_across_processes()
    kept = [note for note in notes if note]
    return {name: _result(task, one, id2label, kept) for name, one in counts.counts.items()}


def _move(chunk: VariantCounts, counts: VariantCounts, partial: PartialResults | None) -> None:
    """Add a chunk to all counts, save it, and start another."""
    state = chunk.state_dict()
    counts.merge(state)
    if partial is not None:
        partial.save(state)
    chunk.reset()


class _Indexed(Dataset):
    """Some entries of a data set, with their indices in it."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return self.indices[index], self.dataset[self.indices[index]]


def _result(
    task: EvaluationTask, counts: EvaluationCounts, id2label: Mapping[int, str], notes: list[str]
) -> EvaluationResult:
    metric, column, values = counts.metrics[MAIN], task.columns[0], counts.values()
    per_class = {name: one.compute()["per_class"] for name, one in counts.metrics.items() if ":" not in name}
    num_classes = max(values["num_classes"], 1)
    rows = []
    for label, of_class in per_class.pop(MAIN).items():
        columns = task.row(label, of_class, metric)
        score = columns.pop(column)
        if math.isnan(score) or ("tp" in of_class and not of_class["tp"] + of_class["fp"] + of_class["fn"]):
            continue
        if columns.get("mostly taken for") is not None:
            columns["mostly taken for"] = id2label[columns["mostly taken for"]]
        row = {"label_id": label, "label": id2label[label], "loss": (1 - score) / num_classes, column: score}
        rows.append(row | {name: further[label][column] for name, further in per_class.items()} | columns)
    weights = ("pixels", "points", "references", "missed")  # how much there is of a class, by task
    rows.sort(key=lambda row: (-row["loss"], -next(row[name] for name in weights if name in row), row["label_id"]))
    images = [ImageScore(*image) for image in counts.images]
    images.sort(key=lambda image: (math.isnan(image.score), image.score, image.index))
    return EvaluationResult(task.name, metric.num_images, values, rows, images, notes)
