"""Evaluation of a segmentation model: what it scores, which classes cost most, and the score of every image.

`evaluate` is for one answer to each image, `evaluate_variants` for several. The loop, also over processes and after
an interruption, is in counting_loop.py.

The loop of every evaluation: each image is counted once, and counts are kept on disk until the result is there.

Started by `accelerate launch`, each process takes its share of the images, by index and without padding, and the
counts are merged at the end; alone it does everything itself. What is counted is `Counts`, in counting.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from accelerate import PartialState
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.utils import logging

from ..metrics.mean_iou import Absent
from ..models.label_spaces import match_labels
from .counts import MAIN, ORACLE, EvaluationCounts, PartialResults, VariantCounts
from .predictor import Predictor
from .tasks import EvaluationTask, evaluation_task

CHUNK_SIZE = 200  # images that an interruption can lose


class Counts(Protocol):
    """What an evaluation counts, and the [place in the data set, image id, score] of the images that it is of."""

    @property
    def images(self) -> list[list[Any]]:
        """One row for each image."""

    def state_dict(self) -> dict[str, Any]:
        """Everything counted, `images` among it, as plain objects and arrays."""

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add a `state_dict()`."""

    def reset(self) -> None:
        """Forget everything."""

    def merge_across_processes(self) -> None:
        """Make every process of the run hold what all have counted."""


AnyCounts = TypeVar("AnyCounts", bound=Counts)


def count_images(
    dataset: Any,
    new_counts: Callable[[], AnyCounts],
    count_batch: Callable[[AnyCounts, list[tuple[int, Any]]], None],
    *,
    batch_size: int = 1,
    num_workers: int = 0,
    partial_folder: Path | None = None,
    about: Mapping[str, Any] | None = None,
    chunk_size: int = CHUNK_SIZE,
    progress: bool = False,
) -> AnyCounts:
    """Count all images of a data set; every process of the run must call it, and all get the same counts.

    Args:
        dataset: what is asked for by index, in the processes that read.
        new_counts: makes empty ones.
        count_batch: adds a batch of (place in the data set, entry) to counts.
        batch_size: images at a time.
        num_workers: processes that read images.
        partial_folder: keep counts here, and go on from those that are there; `None` keeps none. They stay when the
            counts are returned: the caller deletes them once the result is written.
        about: what is evaluated; counts in the folder of something else are an error.
        chunk_size: images to count before counts are saved.
        progress: show a progress bar.

    Raises:
        ValueError: a size is below 1, there is no image, or the folder holds another evaluation.
    """
    if batch_size < 1 or chunk_size < 1:
        raise ValueError(f"batch_size is {batch_size} and chunk_size {chunk_size}; both must be at least 1")
    if not len(dataset):
        raise ValueError("the data set has no images; check its split")
    state = PartialState()
    counts, chunk = new_counts(), new_counts()
    saved: list[dict[str, Any]] = []
    partial = None
    if partial_folder is not None:
        partial = PartialResults(partial_folder, {**(about or {}), "pictures": len(dataset)})
        saved = partial.read()
    state.wait_for_everyone()  # before anyone writes what others must not read

    done = {image[0] for part in saved for image in part["pictures"]}
    waiting = [index for index in range(len(dataset)) if index not in done]
    if state.is_main_process:
        for part in saved:
            counts.merge(part)
    own = waiting[state.process_index :: state.num_processes]
    loader: DataLoader = DataLoader(
        _Indexed(dataset, own), batch_size=batch_size, num_workers=num_workers, collate_fn=list
    )
    show = progress and state.is_main_process
    with tqdm(total=len(own), unit="image", disable=None if show else True) as bar:
        for batch in loader:
            count_batch(chunk, batch)
            bar.update(len(batch))
            if len(chunk.images) >= chunk_size:
                _move(chunk, counts, partial)
    if chunk.images:
        _move(chunk, counts, partial)
    counts.merge_across_processes()
    return counts


def rgb_image(entry: Mapping[str, Any]) -> Image.Image:
    """The image of a reader's entry."""
    image = entry["image"]
    return image.convert("RGB") if isinstance(image, Image.Image) else Image.fromarray(image)


def _move(chunk: Counts, counts: Counts, partial: PartialResults | None) -> None:
    """Add a chunk to all counts, save it, and start another."""
    state = chunk.state_dict()
    counts.merge(state)
    if partial is not None:
        partial.save(state)
    chunk.reset()


class _Indexed(Dataset):
    """Some entries of a data set, with their places in it."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, Any]:
        index = self.indices[place]
        return index, self.dataset[index]


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ImageScore:
    """How well one image was segmented.

    Attributes:
        index: its place in the data set.
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
        task: `panoptic`, `instance` or `semantic`.
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
        batch_size: images at a time.
        num_workers: processes that read images.
        absent: what classes that occur nowhere mean for mean IoU, see `MeanIoU`.
        more_metrics: what to compute beside the task's own metric: "oracle", the score that the model's masks would
            reach with perfect labels (see `OracleClassification` and sure_masks.py), and "boundary", boundary IoU or
            boundary AP.
        partial_folder: keep counts here, and go on from those that are there; `None` keeps none. They stay when the
            result is returned: the caller deletes them once it has written that.
        about: what is evaluated; counts in the folder of something else are an error.
        chunk_size: images to count before counts are saved.
        progress: show a progress bar.

    Raises:
        ValueError: model and data set have different classes, an image cannot be read, segmented or counted, or the
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
        lambda images: [[answer] for answer in ask(images)],
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
        predict: for each image of a batch the answers of all variants, in their order.
        dataset: as for `evaluate`, as are all arguments below.
        id2label: the data set's classes.
        variants: names.
        stuff_classes: label ids.
        batch_size: images at a time.
        num_workers: processes that read images.
        absent: what classes that occur nowhere mean for mean IoU.
        more_metrics: what to compute beside the task's own metric, for each variant.
        partial_folder: where to keep counts.
        about: what is evaluated.
        chunk_size: images to count before counts are saved.
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
        images = [rgb_image(entry) for _, entry in batch]
        for (index, entry), answers in zip(batch, predict(images), strict=True):
            if table is not None:
                answers = [task.relabel_both(answer, table) for answer in answers]
            counts.count(index, entry, answers)

    counts = count_images(
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
    images = [ImageScore(*image) for image in counts.images]
    images.sort(key=lambda image: (math.isnan(image.score), image.score, image.index))
    return EvaluationResult(name, metric.num_images, computed, rows, images, notes)
