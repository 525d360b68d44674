"""The masks of a model with every query sure of one class: what the oracle labels anew.

An answer holds only what the model's labels let through: masks that compete under a wrong name, or fall below a
threshold as two classes share their probability, would be missing from what perfect labels could do. So the oracle gets
the masks as they are before that: each query has all of its object probability on one class, and keeps the probability
of no-object that the generator gave it. Perfect labels in a fusion of alpha 1 (`normalization="oneformer"`) do just
this.

- `sure_outputs`: for panoptic and instance segmentation.
- `mask_owners`: for semantic segmentation, which mask is the strongest at each pixel.

Shapes: R rows of the outputs (pictures, or windows), Q queries, C classes without no-object, H W pixels of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from ..inference.views import View, post_processed
from ..models.output_geometry import patch_offsets


def sure_outputs(outputs: Any) -> Any:
    """Outputs in which a query's most probable class has all of its object probability.

    Args:
        outputs: with `class_queries_logits`, and of a fused model `generator_class_queries_logits`, which count then.
    """
    logits = _generated(outputs)
    objects, nothing = _object_log_probabilities(logits)
    sure = torch.full_like(logits, -torch.inf, dtype=torch.float32)
    sure.scatter_(-1, logits[..., :-1].argmax(-1, keepdim=True), objects)
    sure[..., -1:] = nothing
    return _with_classes(outputs, sure)


def mask_owners(processor: Any, views: Sequence[View], target_sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """The strongest mask of all views (and windows) at each pixel: object probability x mask probability.

    Args:
        processor: the image processor.
        views: of `ask_views`.
        target_sizes: (height, width) of each answer.

    Returns:
        For each picture `segmentation` (H, W) int64 on the CPU and `segments_info`, rows of `id` and `label_id`, the
        class that the mask's query finds most probable.
    """
    rows: list[list[dict[str, Any]]] = [[] for _ in target_sizes]
    strongest: list[Tensor] = []
    scores: list[Tensor] = []
    for view in views:
        outputs, labels = _queries_as_classes(view.outputs, len(target_sizes))
        view = View(outputs, view.flipped, view.size)
        if len(views) == 1 and not view.flipped:
            strongest = post_processed(processor, view, target_sizes, None)
        else:
            answers = post_processed(processor, view, target_sizes, None, return_segmentation_scores=True)
            found = [answer["segmentation_scores"].max(0) for answer in answers]
            if view.flipped:
                found = [(score.flip(-1), owner.flip(-1)) for score, owner in found]
            owners = [owner + len(known) for (_, owner), known in zip(found, rows, strict=True)]
            if strongest:
                wins = [new > old for (new, _), old in zip(found, scores, strict=True)]
                strongest = [torch.where(*each) for each in zip(wins, owners, strongest, strict=True)]
                scores = [torch.maximum(new, old) for (new, _), old in zip(found, scores, strict=True)]
            else:
                strongest, scores = owners, [score for score, _ in found]
        for known, own in zip(rows, labels, strict=True):
            known += [{"id": len(known) + place, "label_id": label} for place, label in enumerate(own)]
    answers = []
    for owner, known in zip(strongest, rows, strict=True):
        present = set(owner.unique().tolist())
        kept = [row for row in known if row["id"] in present]
        answers.append({"segmentation": owner.cpu(), "segments_info": kept})
    return answers


def _queries_as_classes(outputs: Any, num_pictures: int) -> tuple[Any, list[list[int]]]:
    """Outputs in which every query of a picture is a class of its own, and for each picture the queries' own classes.

    Queries of a picture's windows are counted on.
    """
    logits = _generated(outputs)
    num_queries = logits.shape[1]
    offsets = patch_offsets(outputs)
    pictures = range(len(logits)) if offsets is None else [int(row[0]) for row in offsets]
    labels: list[list[int]] = [[] for _ in range(num_pictures)]
    first: list[int] = []
    for picture, row in zip(pictures, logits[..., :-1].argmax(-1).tolist(), strict=True):
        first.append(len(labels[picture]))
        labels[picture] += row
    objects, nothing = _object_log_probabilities(logits)
    most = max(map(len, labels))
    classes = torch.full((*logits.shape[:2], most + 1), -torch.inf, device=logits.device)
    columns = torch.tensor(first, device=logits.device)[:, None] + torch.arange(num_queries, device=logits.device)
    classes.scatter_(-1, columns[..., None], objects)
    classes[..., -1:] = nothing
    return _with_classes(outputs, classes), labels


def _generated(outputs: Any) -> Tensor:
    """(R, Q, C + 1) class logits of the model that drew the masks."""
    generated = getattr(outputs, "generator_class_queries_logits", None)
    return outputs.class_queries_logits if generated is None else generated


def _object_log_probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the probability of any object, and of none, both (R, Q, 1) float32."""
    log_probabilities = logits.float().log_softmax(-1)
    return log_probabilities[..., :-1].logsumexp(-1, keepdim=True), log_probabilities[..., -1:]


def _with_classes(outputs: Any, logits: Tensor) -> Any:
    changed = ModelOutput()  # not of the same type, which may refuse what the predictor has added
    for name, value in {**outputs, "class_queries_logits": logits}.items():
        changed[name] = value
    return changed
