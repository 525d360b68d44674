"""Train a Mask2Former on a plain ViT, whole or with parts removed.

Everything is EoMT's (eomt.py) but the model: data and scores, loss and matching, annealing of masked attention, starts.
The ViT's blocks learn with layer-wise decay of the learning rate; adapter, decoders and heads learn at the base rate.
"""

from __future__ import annotations

from typing import Any

from ...inference.loading import load_mask2former_vit
from ...models.modeling_mask2former_vit import Mask2FormerViTForUniversalSegmentation
from ..declarations import Mask2FormerViTDeclaration
from .eomt import QueryTask


class Mask2FormerViTTask(Mask2FormerViTDeclaration, QueryTask):
    """Training of `Mask2FormerViTForUniversalSegmentation`; see `QueryTask`."""

    model_class = own_model_class = Mask2FormerViTForUniversalSegmentation
    layers = "decoder layer"

    def _load(self, source: str) -> tuple[Any, Any]:
        return load_mask2former_vit(source)
