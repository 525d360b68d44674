"""An additional head: a box for each query, its loss, and the task that trains it."""

import torch
import torch.nn.functional as F
from torch import nn

from hf_segvit import EoMTForUniversalSegmentation
from hf_segvit.models.mask_criterion import MaskCriterion
from hf_segvit.training.tasks.eomt import EoMTTask


class BoxCriterion(MaskCriterion):
    """Adds the L1 distance of the boxes, relative to the image, from those of the matched segments."""

    box_weight = 5.0

    def layer_losses(self, layer):
        losses = super().layer_losses(layer)
        boxes, truth = layer.of_queries(layer.prediction.others["boxes"]), layer.of_segments("box_labels")
        losses["box"] = F.l1_loss(boxes.float(), truth, reduction="sum") / layer.num_pairs
        return losses


class EoMTWithBoxes(EoMTForUniversalSegmentation):
    """Predicts left, top, right and bottom of each query's segment, in [0, 1]."""

    criterion_class = BoxCriterion

    def __init__(self, config):
        super().__init__(config)
        self.bbox_head = nn.Linear(config.hidden_size, 4)

    def predict_queries(self, queries):
        return {**super().predict_queries(queries), "boxes": self.bbox_head(queries).sigmoid()}


class BoxTask(EoMTTask):
    """Trains it on the boxes of the masks."""

    model_class = EoMTWithBoxes

    def prepare_batch(self, batch, processor):
        prepared = super().prepare_batch(batch, processor)
        return {**prepared, "box_labels": [boxes_of(masks) for masks in prepared["mask_labels"]]}


def boxes_of(masks: torch.Tensor) -> torch.Tensor:
    """Boxes (n, 4) of masks (n, H, W); that of an empty mask is the whole image."""
    sides = []
    for dim in (1, 2):  # columns, then rows
        covered = masks.bool().any(dim)
        share = torch.linspace(0, 1, covered.shape[1] + 1, device=masks.device)
        first = torch.where(covered, share[:-1], 1.0).amin(1) if covered.numel() else share.new_zeros(len(masks))
        last = torch.where(covered, share[1:], 0.0).amax(1) if covered.numel() else share.new_zeros(len(masks))
        sides.append(torch.stack([torch.minimum(first, last), torch.maximum(first, last)], 1))
    return torch.stack([sides[0][:, 0], sides[1][:, 0], sides[0][:, 1], sides[1][:, 1]], 1)
