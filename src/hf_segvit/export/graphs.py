"""What of a model is exported: its graphs, their inputs and outputs, and the sizes that they take.

An EoMT is one graph, a ViT-P is one, and a fused model is both: points and fusion between them stay outside, because
which queries are asked depends on the image. Post-processing stays outside too, but for an optional semantic map.

Shapes: B batch, Q queries, C classes without no-object, N prompts, H W pixels, h w mask cells.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..inference.exported_models import SEMANTIC_MAP
from ..models.modeling_eomt import EoMTForUniversalSegmentation
from ..models.modeling_vit_p import ViTPForPointClassification
from ..models.modeling_vit_p_fusion import ViTPFusionForUniversalSegmentation

# Bounds of what one file takes, which AOTInductor checks: images, patches along a side, prompts of an image.
MAX_BATCH, MAX_PATCHES, MAX_PROMPTS = 1024, 1024, 4096
# Rows, columns and batch of the traced input: all different, so that none is taken for another.
_TRACED_GRID, _TRACED_BATCH, _TRACED_PROMPTS = (5, 7), 2, 3
# Of the inputs that are compared with PyTorch.
_CHECKED_PROMPTS = (1, 5, 37)


@dataclass(frozen=True)
class Sizes:
    """The only batch, height and width that an export takes; `None`: any."""

    batch: int | None = None
    height: int | None = None
    width: int | None = None


class EoMTGraph(nn.Module):
    """An EoMT from pixels to logits, and to a semantic map on request."""

    def __init__(self, model: EoMTForUniversalSegmentation, semantic_map: bool):
        super().__init__()
        self.model, self.semantic_map = model, semantic_map

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Class logits (B, Q, C + 1) and mask logits (B, Q, h, w); on request (B, H, W) uint8 classes of pixels."""
        outputs = self.model(pixel_values)
        classes, masks = outputs.class_queries_logits, outputs.masks_queries_logits
        if not self.semantic_map:
            return classes, masks
        # As `semantic_segments` at the input's size: mask probabilities of pixels, weighted by class.
        upscaled = F.interpolate(masks, size=pixel_values.shape[-2:], mode="bilinear").sigmoid()
        scores = classes.softmax(-1)[..., :-1].transpose(1, 2) @ upscaled.flatten(2)
        labels = scores.argmax(1).to(torch.uint8)
        return classes, masks, labels.unflatten(1, (pixel_values.shape[-2], pixel_values.shape[-1]))


class ViTPGraph(nn.Module):
    """A ViT-P from pixels and prompts to logits."""

    def __init__(self, model: ViTPForPointClassification):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, prompts: Tensor, prompt_mask: Tensor) -> tuple[Tensor]:
        """Logits (B, N, C) of prompts (B, N, 4), of which `prompt_mask` (B, N) marks the real ones."""
        return (self.model(pixel_values, prompts, prompt_mask).logits,)


@dataclass(frozen=True)
class Graph:
    """A graph to export, with the sizes that it shall take."""

    name: str
    module: EoMTGraph | ViTPGraph
    sizes: Sizes
    output_names: tuple[str, ...]

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs in their order."""
        return ("pixel_values",) if isinstance(self.module, EoMTGraph) else ("pixel_values", "prompts", "prompt_mask")

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.module.model.config.patch_size

    def inputs(self, batch: int, height: int, width: int, num_prompts: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs; of each image but the first, the last prompt is padding."""
        generator = torch.Generator().manual_seed(seed)
        channels = self.module.model.config.num_channels
        images = torch.randn(batch, channels, height, width, generator=generator)
        if isinstance(self.module, EoMTGraph):
            return (images,)
        prompts = torch.rand(batch, num_prompts, 4, generator=generator)
        real = torch.ones(batch, num_prompts, dtype=torch.bool)
        if num_prompts > 1:
            real[1:, -1] = False
        return images, prompts, real

    def trace(self) -> ExportedProgram:
        """The graph, of symbolic sizes where they are not fixed."""
        sizes, patch = self.sizes, self.patch_size
        batch = sizes.batch or _TRACED_BATCH
        sides = [fixed or patch * n for fixed, n in zip((sizes.height, sizes.width), _TRACED_GRID, strict=True)]
        dims: dict[int, Any] = {}
        if sizes.batch is None:
            dims[0] = Dim("batch", min=1, max=MAX_BATCH)
        if sizes.height is None:
            dims[2] = patch * Dim("rows", min=1, max=MAX_PATCHES)
        if sizes.width is None:
            dims[3] = patch * Dim("columns", min=1, max=MAX_PATCHES)
        shapes: tuple[Any, ...] = (dims,)
        if isinstance(self.module, ViTPGraph):
            of_prompts = {axis: dim for axis, dim in dims.items() if axis == 0}
            of_prompts[1] = Dim("prompts", min=1, max=MAX_PROMPTS)
            shapes = (dims, of_prompts, dict(of_prompts))
        sample = self.inputs(batch, sides[0], sides[1], _TRACED_PROMPTS)
        with torch.no_grad():
            return torch.export.export(self.module.eval(), sample, dynamic_shapes=shapes)

    def checked_inputs(self) -> Iterator[tuple[Tensor, ...]]:
        """Inputs to compare with PyTorch: three sizes, the position table's own among them, and two batches."""
        patch = self.patch_size
        own = self.module.model.config.image_height_width
        smaller = tuple(patch * max(1, side // patch * 3 // 4) for side in own)
        oblong = (patch * (own[0] // patch // 2 + 1), patch * (own[1] // patch + 2))
        for index, (batch, size) in enumerate(((1, own), (2, smaller), (1, oblong))):
            height, width = self.sizes.height or size[0], self.sizes.width or size[1]
            yield self.inputs(self.sizes.batch or batch, height, width, _CHECKED_PROMPTS[index], seed=index)


def graphs_of(model: Any, sizes: Sizes, semantic_map: bool) -> list[Graph]:
    """The graphs of a model; `ValueError` for one that has none, or that the sizes do not fit."""
    if isinstance(model, ViTPFusionForUniversalSegmentation):
        if not isinstance(model.generator, EoMTForUniversalSegmentation):
            raise ValueError(
                f"the generator of the fused model is a {type(model.generator).__name__} of Transformers, and only an "
                "EoMT of this package can be exported; fuse with that"
            )
        if semantic_map:
            raise ValueError(
                "a fused model names its masks outside of its graphs, so they cannot give a semantic map; leave "
                "semantic_map out, or export the generator alone"
            )
        # A fixed size is that of the generator: its processor has one input size, while the classifier sees images
        # without padding.
        parts = graphs_of(model.generator, sizes, False) + graphs_of(model.classifier, Sizes(sizes.batch), False)
        names = ("generator", "classifier")
        return [
            Graph(name, part.module, part.sizes, part.output_names) for name, part in zip(names, parts, strict=True)
        ]
    if isinstance(model, EoMTForUniversalSegmentation):
        _check_size(sizes, model.config.patch_size)
        _refuse_masked(model)
        outputs: tuple[str, ...] = ("class_queries_logits", "masks_queries_logits")
        if semantic_map:
            if model.num_labels > 256:
                raise ValueError(f"a semantic map of uint8 has 256 classes at most, not {model.num_labels}")
            outputs = (*outputs, SEMANTIC_MAP)
        return [Graph("model", EoMTGraph(model, semantic_map), sizes, outputs)]
    if isinstance(model, ViTPForPointClassification):
        _check_size(sizes, model.config.patch_size)
        if semantic_map:
            raise ValueError("a ViT-P classifies points and has no semantic map; leave semantic_map out")
        return [Graph("model", ViTPGraph(model), sizes, ("logits",))]
    raise ValueError(
        f"{type(model).__name__} cannot be exported; EoMT, ViT-P and fused models of this package can "
        "(`hf-segvit convert` brings other checkpoints into its form)"
    )


def _check_size(sizes: Sizes, patch: int) -> None:
    for name, side in (("height", sizes.height), ("width", sizes.width)):
        if side is not None and (side < patch or side % patch):
            near = patch * max(1, round(side / patch))
            raise ValueError(f"{name}={side} must be a multiple of patch_size={patch}; the nearest is {near}")
    if sizes.batch is not None and not 1 <= sizes.batch <= MAX_BATCH:
        raise ValueError(f"batch={sizes.batch} must be from 1 to {MAX_BATCH}")


def _refuse_masked(model: EoMTForUniversalSegmentation) -> None:
    probabilities = model.config.masked_attention_probabilities or []
    masked = [index for index, value in enumerate(probabilities) if value >= 0.5]
    if model.config.masked_attention and masked:
        raise ValueError(
            f"the model still masks its attention in query layers {', '.join(map(str, masked))} "
            f"(masked_attention_probabilities={list(probabilities)}), which is slow and hardly any runtime has; train "
            "it until its masks are annealed (`hf-segvit train` with mask annealing ends at 0), or, if you have seen "
            "that its score holds without them, set masked_attention_probabilities to zeros in its config.json"
        )
