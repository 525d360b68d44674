"""A loss: a focal term (Lin et al., arXiv 1708.02002) in addition to those of masks and classes."""

import torch
import torch.nn.functional as F

from hf_segvit.models.mask_criterion import MaskCriterion, MatchedLayer


class FocalCriterion(MaskCriterion):
    """The term `focal` is weighted by `focal_weight`, a new field of the model's configuration."""

    def __init__(self, focal_weight: float = 1.0, **arguments):
        super().__init__(**arguments)
        self.focal_weight = focal_weight

    @classmethod
    def from_config(cls, config):
        return cls(focal_weight=getattr(config, "focal_weight", 1.0), **config.criterion_arguments())

    def layer_losses(self, layer: MatchedLayer) -> dict[str, torch.Tensor]:
        losses = super().layer_losses(layer)
        error = F.binary_cross_entropy_with_logits(layer.logits, layer.truth, layer.counted, reduction="none")
        probability = layer.logits.sigmoid()
        doubt = torch.where(layer.truth > 0.5, 1 - probability, probability)
        focal = (doubt**2 * error).sum(1) / layer.counted.sum(1).clamp(min=1)
        losses["focal"] = focal.sum() / layer.num_pairs
        return losses
