"""The score that a model's masks would reach with perfect labels.

`OracleClassification` wraps a metric and gives each predicted mask the label of the true segment that it fits best; the
ViT-P paper calls the result the upper bound of a better classifier. `masks_to_label` gives the masks before labels
decide which survive: each query has all of its object probability on one class (`sure_outputs`), and for semantic
segmentation the strongest mask owns the pixel (`mask_owners`).

R rows of the outputs (images, or windows), Q queries, C classes without no-object, H W pixels of the answer, P
predicted and R true segments.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from ..inference.segmenter import Asked, Segmenter
from ..inference.views import View, post_processed
from ..metrics.accumulation import integer_array, require_same_size
from ..metrics.instance_masks import instance_masks
from ..metrics.mask_average_precision import MaskAveragePrecision, mask_overlap
from ..metrics.mean_iou import MeanIoU
from ..metrics.panoptic_quality import PanopticQuality, equal_runs
from ..models.image_geometry import patch_offsets

_ABOVE_ZERO = 1e-12  # smallest score to keep: in `sure_outputs` all classes but one have 0


def masks_to_label(segmenter: Segmenter, asked: Asked) -> list[Any]:
    """The masks of images as `OracleClassification` takes them, whatever the weight of a classifier."""
    # Not the answer's own masks: those that compete under a wrong name, or fall below a threshold as two classes share
    # their probability, would be missing from what perfect labels could do.
    if segmenter.task == "semantic":
        return mask_owners(segmenter.processor, asked.views, asked.sizes)
    threshold = _ABOVE_ZERO if segmenter.task == "instance" else segmenter.ranking_threshold
    # Stuff is not merged yet: what belongs together depends on the true classes.
    return segmenter.post_process(asked, threshold, sure_outputs, stuff_classes=())


# Perfect labels in a fusion of alpha 1 (`normalization="oneformer"`) do just this.
def sure_outputs(outputs: Any) -> Any:
    """Outputs in which each query's most probable class (by the generator) has all its object probability."""
    logits = _generated(outputs)
    objects, nothing = _object_log_probabilities(logits)
    sure = torch.full_like(logits, -torch.inf, dtype=torch.float32)
    sure.scatter_(-1, logits[..., :-1].argmax(-1, keepdim=True), objects)
    sure[..., -1:] = nothing
    return _with_classes(outputs, sure)


def mask_owners(processor: Any, views: Sequence[View], target_sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """The strongest mask of all views (and windows) at each pixel, by object probability x mask probability.

    For each image `segmentation` (H, W) int64 on the CPU and `segments_info`, with the most probable class of the
    query.
    """
    rows: list[list[dict[str, Any]]] = [[] for _ in target_sizes]
    strongest: list[Tensor] = []
    scores: list[Tensor] = []
    for view in views:
        outputs, labels = _queries_as_classes(view.outputs, len(target_sizes))
        view = replace(view, outputs=outputs)
        if len(views) == 1 and not view.flipped:
            strongest = post_processed(processor, view, target_sizes, None)
        else:
            answers = post_processed(processor, view, target_sizes, None, return_segmentation_scores=True)
            best = [answer["segmentation_scores"].max(0) for answer in answers]
            if view.flipped:
                best = [(score.flip(-1), owner.flip(-1)) for score, owner in best]
            # Queries are numbered through all views: the same query draws another mask in each.
            owners = [owner + len(known) for (_, owner), known in zip(best, rows, strict=True)]
            if strongest:
                wins = [new > old for (new, _), old in zip(best, scores, strict=True)]
                strongest = [torch.where(*each) for each in zip(wins, owners, strongest, strict=True)]
                scores = [torch.maximum(new, old) for (new, _), old in zip(best, scores, strict=True)]
            else:
                strongest, scores = owners, [score for score, _ in best]
        for known, own in zip(rows, labels, strict=True):
            known += [{"id": len(known) + query, "label_id": label} for query, label in enumerate(own)]
    answers = []
    for owner, known in zip(strongest, rows, strict=True):
        present = set(owner.unique().tolist())
        kept = [row for row in known if row["id"] in present]
        answers.append({"segmentation": owner.cpu(), "segments_info": kept})
    return answers


def _queries_as_classes(outputs: Any, num_images: int) -> tuple[Any, list[list[int]]]:
    """Outputs in which every query (of all windows) is a class of its own, and the queries' most probable classes."""
    logits = _generated(outputs)
    num_queries = logits.shape[1]
    offsets = patch_offsets(outputs)
    images = range(len(logits)) if offsets is None else [int(row[0]) for row in offsets]
    labels: list[list[int]] = [[] for _ in range(num_images)]
    first: list[int] = []
    for image, row in zip(images, logits[..., :-1].argmax(-1).tolist(), strict=True):
        first.append(len(labels[image]))
        labels[image] += row
    objects, nothing = _object_log_probabilities(logits)
    num_classes = max(map(len, labels))
    classes = torch.full((*logits.shape[:2], num_classes + 1), -torch.inf, device=logits.device)
    columns = torch.tensor(first, device=logits.device)[:, None] + torch.arange(num_queries, device=logits.device)
    classes.scatter_(-1, columns[..., None], objects)
    classes[..., -1:] = nothing
    return _with_classes(outputs, classes), labels


def _generated(outputs: Any) -> Tensor:
    """(R, Q, C + 1) class logits of the model that drew the masks."""
    generated = getattr(outputs, "generator_class_queries_logits", None)
    return outputs.class_queries_logits if generated is None else generated


def _object_log_probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities of any object and of no object, both (R, Q, 1) float32."""
    log_probabilities = logits.float().log_softmax(-1)
    return log_probabilities[..., :-1].logsumexp(-1, keepdim=True), log_probabilities[..., -1:]


def _with_classes(outputs: Any, logits: Tensor) -> Any:
    changed = ModelOutput()  # the plain class: a subclass may require a loss or refuse a field
    for name, value in {**outputs, "class_queries_logits": logits}.items():
        changed[name] = value
    return changed


Metric = PanopticQuality | MaskAveragePrecision | MeanIoU


class OracleClassification:
    """A metric, fed with perfectly labelled predictions.

    Predictions and references are those of the wrapped metric. For `MeanIoU` a prediction may also be `segmentation`
    and `segments_info`, as for panoptic segmentation; otherwise its masks are the regions of its classes. Panoptic
    segments and instances take the label of the true segment of highest IoU, masks for mean IoU that of most of their
    pixels. A mask that touches no true segment keeps its label.
    """

    def __init__(self, metric: Metric) -> None:
        if not isinstance(metric, PanopticQuality | MaskAveragePrecision | MeanIoU):
            raise ValueError(
                f"{type(metric).__name__} has no oracle; give PanopticQuality, MaskAveragePrecision or MeanIoU"
            )
        self.metric = metric

    def reset(self) -> None:
        """Forget everything that was added."""
        self.metric.reset()

    def add_batch(
        self,
        *,
        predictions: Sequence[Any],
        references: Sequence[Any],
        image_ids: Sequence[Hashable] | None = None,
    ) -> None:
        """Relabel a batch and count it; arguments and errors are those of the metric."""
        relabelled = list(predictions)  # other lengths are left to the metric, which refuses them
        if len(predictions) == len(references):
            for index, pair in enumerate(zip(predictions, references, strict=True)):
                relabelled[index] = self._relabelled(*pair, f"image {index}")
        self.metric.add_batch(predictions=relabelled, references=references, image_ids=image_ids)

    def compute(self) -> dict[str, Any]:
        """What the metric computes; nothing is reset."""
        return self.metric.compute()

    def state_dict(self) -> dict[str, Any]:
        """Everything accumulated, see the metric."""
        return self.metric.state_dict()

    def merge(self, other: OracleClassification | Mapping[str, Any]) -> None:
        """Add what another process counted."""
        self.metric.merge(other.state_dict() if isinstance(other, OracleClassification) else other)

    def _relabelled(self, prediction: Any, reference: Any, name: str) -> Any:
        if isinstance(self.metric, PanopticQuality):
            return relabel_segments(prediction, reference, self.metric.stuff_classes, name)
        if isinstance(self.metric, MaskAveragePrecision):
            return relabel_instances(prediction, reference, self.metric.num_labels, name)
        return relabel_regions(prediction, reference, self.metric.ignore_index, name)


def relabel_segments(
    prediction: Mapping[str, Any], reference: Mapping[str, Any], stuff_classes: Sequence[int] = (), name: str = "image"
) -> dict[str, Any]:
    """Label panoptic segments (`segmentation` (H, W), `segments_info`) by the true segments of highest IoU.

    Segments that become stuff of the same class are merged, as in post-processing. Errors name the image by `name`.
    """
    id_map = integer_array(prediction["segmentation"], f"{name}: the prediction")
    true_map = integer_array(reference["segmentation"], f"{name}: the reference")
    ids, true_ids, overlap = _overlap(id_map, true_map, name)
    label_of = {row["id"]: row["label_id"] for row in reference["segments_info"]}
    is_segment = np.array([true_id in label_of for true_id in true_ids.tolist()], dtype=bool)
    union = overlap.sum(1, keepdims=True) + overlap.sum(0) - overlap
    iou = np.where(is_segment, overlap / union, 0.0)
    best = {own: row for own, row in zip(ids.tolist(), iou, strict=True) if row.any()}
    rows, survivors, new_id = [], dict[int, int](), dict[int, int]()
    for row in prediction["segments_info"]:
        label = row["label_id"]
        if row["id"] in best:
            label = label_of[int(true_ids[best[row["id"]].argmax()])]
        # Without merging, all but one segment of a stuff class would count as false positives.
        if label in stuff_classes and label in survivors:
            new_id[row["id"]] = survivors[label]
            continue
        survivors.setdefault(label, row["id"])
        rows.append({**row, "label_id": label})
    if new_id:
        id_map = id_map.astype(np.int64)
        table = np.array([new_id.get(own, own) for own in ids.tolist()], dtype=np.int64)
        id_map = table[np.searchsorted(ids, id_map)]
    return {**prediction, "segmentation": id_map, "segments_info": rows}


def relabel_instances(
    prediction: Mapping[str, Any], reference: Mapping[str, Any], num_labels: int, name: str = "image"
) -> dict[str, Any]:
    """Label instances (see `MaskAveragePrecision`) by the true instances of highest IoU; their scores stay."""
    predicted = instance_masks(prediction, num_labels, f"{name}, prediction", is_reference=False)
    true = instance_masks(reference, num_labels, f"{name}, reference", is_reference=True)
    rows = [dict(row) for row in prediction["segments_info"]]
    if len(predicted) and len(true) and predicted.size == true.size:
        iou = mask_overlap(predicted.rles, true.rles, np.zeros(len(true), dtype=bool))
        # IoU is at most 1, so adding 1 ranks every instance above any crowd.
        rank = np.where(iou > 0, iou + np.where(true.is_crowd, 0, 1), 0)
        for row, ranks in zip(rows, rank, strict=True):
            if ranks.any():
                row["label_id"] = int(true.labels[ranks.argmax()])
    return {**prediction, "segments_info": rows}


def relabel_regions(prediction: Any, reference: Any, ignore_index: int | None = 255, name: str = "image") -> np.ndarray:
    """Label segments, or the regions of classes, by most of their pixels.

    The prediction is a label map (H, W), or `segmentation` and `segments_info`; negative labels of the reference (H, W)
    and `ignore_index` do not count. Gives a label map (H, W) int64, -1 where the prediction has no segment.
    """
    is_map = not isinstance(prediction, Mapping)
    id_map = integer_array(prediction if is_map else prediction["segmentation"], f"{name}: the prediction")
    ids, true_labels, overlap = _overlap(id_map, integer_array(reference, f"{name}: the reference"), name)
    overlap[:, (true_labels < 0) | (true_labels == ignore_index)] = 0
    if is_map:
        labels = ids.astype(np.int64)
    else:
        label_of = {row["id"]: row["label_id"] for row in prediction["segments_info"]}
        labels = np.array([label_of.get(own, -1) for own in ids.tolist()], dtype=np.int64)
    is_relabelled = (labels >= 0) & overlap.any(1)
    labels[is_relabelled] = true_labels[overlap.argmax(1)][is_relabelled]
    return labels[np.searchsorted(ids, id_map)]


def _overlap(predicted: np.ndarray, true: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of two maps (H, W), ascending, and the pixels (P, R) that each pair of values shares."""
    require_same_size(predicted.shape, true.shape, name)
    predicted_runs, true_runs, lengths = equal_runs(predicted, true)
    values, rows = np.unique(predicted_runs, return_inverse=True)
    true_values, columns = np.unique(true_runs, return_inverse=True)
    overlap = np.zeros((len(values), len(true_values)), dtype=np.int64)
    np.add.at(overlap, (rows, columns), lengths)
    return values, true_values, overlap
