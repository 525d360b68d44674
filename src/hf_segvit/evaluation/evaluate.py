"""Evaluate a segmentation model: its score, the classes that cost most, the score of every image.

`evaluate` is for one answer to each image, `evaluate_variants` for several from one pass; both take the settings of
`EvaluationSettings`. `count_images` is the loop under them, and under the evaluation of points. Started by `accelerate
launch`, each process takes its share of the images and the counts are merged at the end.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.utils import logging

from ..inference.segmenter import NonFiniteOutputs, Segmenter
from ..metrics.mean_iou import Absent
from ..models.confidence import Confidence
from ..models.image_decoding import to_pixels
from ..models.image_values import AS_STORED
from ..models.label_spaces import match_labels
from .calibration import CalibrationResult
from .counts import (
    CALIBRATION,
    MAIN,
    ORACLE,
    EvaluationCounts,
    PartialResults,
    VariantCounts,
    further_metrics,
    import_path,
)
from .oracle import masks_to_label
from .tasks import EvaluationTask, RichAnswer, evaluation_task

CHUNK_SIZE = 200  # images that an interruption can cost each process

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class EvaluationSettings:
    """How to evaluate: the keyword arguments of `evaluate`, `evaluate_variants`, `sweep_alphas` and `evaluate_points`.

    Attributes:
        absent: how mean IoU treats classes that occur nowhere, see `MeanIoU`.
        max_detections: predictions of a class in an image that mask AP counts; `None`: 100, COCO's rule.
        more_metrics: "oracle" (see oracle.py), "calibration" (see calibration.py) and "boundary", boundary IoU or
            boundary AP.
        metrics: classes of further metrics, fed with the same answers and truths as the task's own, see `Metric`.
        partial_folder: keep counts here and resume from them; the caller deletes them once the result is written.
        about: says what is evaluated; counts of something else in the folder are an error.
        identity: further facts that must be the same, such as the hashes of identity.py.
    """

    stuff_classes: Sequence[int] = ()  # label ids of the data set
    absent: Absent = "exclude"
    max_detections: int | None = None
    classes: Sequence[int] | None = None  # label ids of the data set to score; None: all
    more_metrics: Sequence[str] = ()
    metrics: Sequence[type] = ()
    batch_size: int = 1
    num_workers: int = 0  # processes that read images
    partial_folder: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    chunk_size: int = field(default_factory=lambda: CHUNK_SIZE)  # images to count before counts are saved
    progress: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.chunk_size < 1:
            raise ValueError(
                f"batch_size is {self.batch_size} and chunk_size {self.chunk_size}; both must be at least 1"
            )


@dataclass(frozen=True)
class ImageScore:
    """How well the image at an index of the data set was segmented, in [0, 1].

    The score is panoptic quality of all segments together, mean IoU of the classes in the image, or F1 of instances at
    IoU 0.5; NaN if there is nothing to find and nothing was found.
    """

    index: int
    image_id: Any
    score: float


@dataclass(frozen=True)
class EvaluationResult:
    """The result of an evaluation.

    Attributes:
        metrics: values of the task's metric without `per_class`, and of further ones, such as `oracle_pq`.
        classes: a row for every class that occurs, the costliest first: `label_id`, `label`, `loss` (how much the mean
            would rise if the class were perfect), the columns of the task, and the main one of further metrics.
        images: the score of every image, the worst first.
        notes: remarks for readers of the numbers.
        calibration: of scores, if it was asked for.
    """

    task: str
    num_images: int
    metrics: dict[str, Any]
    classes: list[dict[str, Any]]
    images: list[ImageScore]
    notes: list[str] = field(default_factory=list)
    calibration: CalibrationResult | None = None


def evaluate(segmenter: Segmenter, dataset: Any, id2label: Mapping[int, str], **settings: Any) -> EvaluationResult:
    """Evaluate a model; every process of the run must call it, and all get the same result.

    Args:
        segmenter: the model, for the task that is evaluated; anything with `task`, `id2label` and `answers` will do.
        dataset: entries of our readers, each with a unique `image_id`.
        id2label: the data set's classes.
        settings: fields of `EvaluationSettings`.

    Raises:
        ValueError: model and data set have different classes, an image cannot be read, segmented or counted, or the
            folder holds another evaluation.
    """
    # Only a Segmenter gives masks from before labels decided; of other models the oracle relabels the answers
    # themselves.
    more = settings.get("more_metrics", ()) if isinstance(segmenter, Segmenter) else ()
    with_masks, with_confidence = ORACLE in more, CALIBRATION in more and segmenter.task == "semantic"
    if CALIBRATION in more:
        segmenter = uncalibrated(segmenter)

    def predict(images: list[Image.Image]) -> list[list[Any]]:
        if with_masks or with_confidence:
            return variant_answers(segmenter, images, with_masks=with_masks, with_confidence=with_confidence)
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
    """Evaluate several variants of a model that answer together, by name; other arguments and errors as for `evaluate`.

    Args:
        segmenter: only its `task` and `id2label` are used.
        predict: for each image of a batch, the answers of all variants in their order.
    """
    options = EvaluationSettings(**settings)
    task = evaluation_task(
        segmenter.task, len(id2label), options.stuff_classes, options.absent, options.max_detections, options.classes
    )
    labels = match_labels(segmenter.id2label, id2label)
    if labels.warning and PartialState().is_main_process:
        logger.warning(labels.warning)

    def count_batch(counts: VariantCounts, batch: list[tuple[int, Any]]) -> None:
        rows = answers_to(segmenter, batch, predict)
        for (index, entry), answers in zip(batch, rows, strict=True):
            reference = task.reference(entry)
            for variant, answer in zip(counts.counts.values(), answers, strict=True):
                if labels.table is not None:
                    answer = task.relabel_both(answer, labels.table)
                others = {}
                if isinstance(answer, RichAnswer):
                    others = {ORACLE: answer.masks} if answer.masks is not None else {}
                    if answer.confidence is not None:
                        others[CALIBRATION] = answer.answer, answer.confidence
                    answer = answer.answer
                variant.count(index, entry["image_id"], reference, answer, others)

    notes = [labels.warning]
    if options.classes is not None:
        notes.append(f"only of the classes {', '.join(id2label[label] for label in sorted(options.classes))}")
    return count_images(task, dataset, id2label, count_batch, options, variants, notes=notes)


def answers_to(
    segmenter: Any, batch: Sequence[tuple[int, Any]], ask: Callable[[list[Image.Image]], Sequence[Any]]
) -> Sequence[Any]:
    """What `ask` answers to the images of a batch, as `segmenter` takes them; errors name the images."""
    # An oracle answers with the truth, whatever channels the image has.
    settings = getattr(segmenter, "image_settings", AS_STORED)
    try:
        return ask([to_pixels(entry["image"], f"image {entry['image_id']!r}", settings) for _, entry in batch])
    except ValueError as error:
        names = ", ".join(str(entry["image_id"]) for _, entry in batch)
        kind = NonFiniteOutputs if isinstance(error, NonFiniteOutputs) else ValueError
        raise kind(f"image {names}: {error}") from error


@torch.inference_mode()
def variant_answers(
    segmenter: Segmenter,
    images: Sequence[Image.Image],
    alphas: Sequence[float] | None = None,
    with_masks: bool = False,
    with_confidence: bool = False,
) -> list[list[Any]]:
    """The answers to upright RGB images with each weight of a ViT-P, from one pass of generator and ViT-P.

    Args:
        alphas: weights of the fused model's ViT-P; `None`: one answer, as the model is.
        with_masks: make each answer a `RichAnswer` with masks, which are the same for each alpha.
        with_confidence: make each answer a `RichAnswer` with the confidence of its pixels (task semantic).
    """
    threshold = segmenter.ranking_threshold
    changes = [None] if alphas is None else [segmenter.with_alpha(alpha) for alpha in alphas]
    rows: list[list[Any]] = []
    # With alpha 1 every query is classified, so that the logits of ViT-P serve any alpha.
    for asked in segmenter.ask(images, threshold, alpha=None if alphas is None else 1.0):
        columns: list[list[Any]] = []
        for change in changes:
            if with_confidence:
                found = segmenter.post_process_with_confidences(asked, [Confidence("maxscore")], change)
                columns.append([RichAnswer(labels, None, maps["maxscore"]) for labels, maps in found])
            else:
                columns.append(segmenter.post_process(asked, threshold, change))
        batch = [list(answers) for answers in zip(*columns, strict=True)]
        if with_masks:
            masks = masks_to_label(segmenter, asked)
            batch = [[_with_masks(one, mask) for one in row] for row, mask in zip(batch, masks, strict=True)]
        rows += batch
    return rows


def _with_masks(answer: Any, masks: Any) -> RichAnswer:
    return replace(answer, masks=masks) if isinstance(answer, RichAnswer) else RichAnswer(answer, masks)


def uncalibrated(segmenter: Segmenter) -> Segmenter:
    """The same model, whose scores are as it gives them, whatever temperature its processor has stored."""
    if getattr(segmenter.processor, "temperature", None) is None:
        return segmenter
    segmenter, processor = copy.copy(segmenter), copy.copy(segmenter.processor)
    processor.temperature = None
    segmenter.processor = processor
    return segmenter


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
    """Results by variant from `all_counts`, whose arguments these are, with `notes`."""
    counts = all_counts(task, dataset, id2label, count_batch, settings, variants, further)
    notes = [note for note in notes if note]
    return {name: _result(task, variant, id2label, notes) for name, variant in counts.counts.items()}


def all_counts(
    task: EvaluationTask,
    dataset: Any,
    id2label: Mapping[int, str],
    count_batch: Callable[[VariantCounts, list[tuple[int, Any]]], None],
    settings: EvaluationSettings,
    variants: Sequence[str] = (MAIN,),
    further: Callable[[], Mapping[str, Any]] = dict,
) -> VariantCounts:
    """Count all images of a data set; every process of the run must call it, and all get the same counts.

    Args:
        count_batch: adds a batch of (index in the data set, entry) to counts.
        variants: names of the answers that each image gets.
        further: makes metrics beside those of the settings, by name.
    """
    if not len(dataset):
        raise ValueError("the data set has no images; check its split")

    def new_counts() -> VariantCounts:
        arguments = settings.more_metrics, settings.metrics, id2label, settings.stuff_classes
        return VariantCounts(
            {name: EvaluationCounts(task, {**further(), **further_metrics(task, *arguments)}) for name in variants}
        )

    state = PartialState()
    counts, chunk = new_counts(), new_counts()
    partial = None
    if settings.partial_folder is not None:
        metrics = [MAIN, *settings.more_metrics, *map(import_path, settings.metrics)]
        about = {**settings.about, **settings.identity, "metrics": metrics, "variants": list(variants)}
        partial = PartialResults(settings.partial_folder, {**about, "pictures": len(dataset)})
    # One process alone reads what was saved, as the counts of all are added up at the end, and tells the others.
    shared: list[Any] = [None, None]
    if state.is_main_process and partial is not None:
        try:
            partial.read(lambda saved: counts.merge_stored(saved, new_counts(), len(dataset)), logger.warning)
            shared[0] = {image[0] for image in counts.images}
        except ValueError as error:
            shared[1] = str(error)
    broadcast_object_list(shared)
    if shared[1] is not None:
        raise ValueError(shared[1])
    done = shared[0] or ()
    waiting = [index for index in range(len(dataset)) if index not in done]
    # A strided share without padding: samplers that pad would count some images twice.
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
    return counts


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
    computed = {name: each.compute() for name, each in counts.metrics.items() if ":" not in name}
    per_class = {name: each["per_class"] for name, each in computed.items() if "per_class" in each}
    calibration = computed.get(CALIBRATION, {}).get("result")
    num_classes = max(values["num_classes"], 1)
    rows = []
    for label, of_class in per_class.pop(MAIN).items():
        columns = task.row(label, of_class, metric)
        score = columns.pop(column)
        # Classes without any segment have a PQ of 0, not NaN, and are recognised by their counts.
        if math.isnan(score) or ("tp" in of_class and not of_class["tp"] + of_class["fp"] + of_class["fn"]):
            continue
        if columns.get("mostly taken for") is not None:
            columns["mostly taken for"] = id2label[columns["mostly taken for"]]
        # The mean weighs all classes alike, so a class can raise it by its own distance to 1 over their number.
        row = {"label_id": label, "label": id2label[label], "loss": (1 - score) / num_classes, column: score}
        rows.append(row | {name: further[label][column] for name, further in per_class.items()} | columns)
    weights = ("pixels", "points", "references", "missed")  # by task: frequent classes first among equal losses
    rows.sort(key=lambda row: (-row["loss"], -next(row[name] for name in weights if name in row), row["label_id"]))
    images = [ImageScore(*image) for image in counts.images]
    # NaN compares with nothing, so images without a score are put last by hand.
    images.sort(key=lambda image: (math.isnan(image.score), image.score, image.index))
    notes = [*notes, *filter(None, [task.note(metric)])]
    return EvaluationResult(task.name, metric.num_images, values, rows, images, notes, calibration)
