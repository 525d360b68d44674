"""What of a model is exported: its graphs, their inputs and outputs, and the sizes that they take.

An EoMT is one graph, a ViT-P is one, and a fused model is both: points and fusion between them stay outside, because
which queries are asked depends on the image. Post-processing stays outside too, but for an optional semantic map.

Shapes: B batch, Q queries, C classes without no-object, N prompts, H W pixels, h w mask cells.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
_PLANNED_PROMPTS = 512  # where memory is reserved for all of them
# Rows, columns and batch of the traced input: all different, so that none is taken for another, and no position
# table's own. The second is for graphs of few patches.
_TRACED_GRIDS, _TRACED_BATCH, _TRACED_PROMPTS = ((5, 7), (2, 3)), 2, 3
# Of the inputs that are compared with PyTorch.
_CHECKED_PROMPTS = (1, 5, 37)


@dataclass(frozen=True)
class Sizes:
    """The only batch, height and width that an export takes; `None`: any, of a planned one up to the largest.

    `planned` is for ExecuTorch, which reserves the memory of the largest input: by default the model's own size.
    """

    batch: int | None = None
    height: int | None = None
    width: int | None = None
    planned: bool = False
    max_height: int | None = None
    max_width: int | None = None

    @property
    def max_prompts(self) -> int:
        """The most prompts of an image."""
        return _PLANNED_PROMPTS if self.planned else MAX_PROMPTS

    def for_model(self, config: Any) -> "Sizes":
        """With the largest sides for a model of this configuration; `ValueError` for sizes that it cannot take."""
        patch = config.patch_size
        if self.batch is not None and not 1 <= self.batch <= MAX_BATCH:
            raise ValueError(f"batch={self.batch} must be from 1 to {MAX_BATCH}")
        for name in ("height", "width", "max_height", "max_width"):
            side, least = getattr(self, name), 1 if name in ("height", "width") else _TRACED_GRIDS[-1][-1]
            if side is not None and (side < least * patch or side % patch):
                near = patch * max(least, round(side / patch))
                raise ValueError(f"{name}={side} must be a multiple of patch_size={patch}; the nearest is {near}")
        if not self.planned:
            return self
        own = max(*config.image_height_width, patch * _TRACED_GRIDS[-1][-1])  # either way round
        return replace(self, max_height=self.max_height or own, max_width=self.max_width or own)


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

    @property
    def limits(self) -> dict[str, int]:
        """The largest height, width and number of prompts, where memory is planned for them."""
        sizes = self.sizes
        if not sizes.planned:
            return {}
        sides = (("height", sizes.height, sizes.max_height), ("width", sizes.width, sizes.max_width))
        found = {name: largest for name, fixed, largest in sides if fixed is None and largest is not None}
        return found if isinstance(self.module, EoMTGraph) else {**found, "prompts": sizes.max_prompts}

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
        most = [MAX_PATCHES if side is None else side // patch for side in (sizes.max_height, sizes.max_width)]
        grid = next(grid for grid in _TRACED_GRIDS if grid[0] <= most[0] and grid[1] <= most[1])
        sides = [fixed or patch * n for fixed, n in zip((sizes.height, sizes.width), grid, strict=True)]
        dims: dict[int, Any] = {}
        if sizes.batch is None:
            dims[0] = Dim("batch", min=1, max=MAX_BATCH)
        if sizes.height is None:
            dims[2] = patch * Dim("rows", min=1, max=most[0])
        if sizes.width is None:
            dims[3] = patch * Dim("columns", min=1, max=most[1])
        shapes: tuple[Any, ...] = (dims,)
        if isinstance(self.module, ViTPGraph):
            of_prompts = {axis: dim for axis, dim in dims.items() if axis == 0}
            of_prompts[1] = Dim("prompts", min=1, max=sizes.max_prompts)
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
            sides = zip(
                (self.sizes.height, self.sizes.width), size, (self.sizes.max_height, self.sizes.max_width), strict=True
            )
            height, width = (fixed or min(side, largest or side) for fixed, side, largest in sides)
            yield self.inputs(self.sizes.batch or batch, height, width, _CHECKED_PROMPTS[index], seed=index)


def graphs_of(model: Any, sizes: Sizes, semantic_map: bool) -> list[Graph]:
    """The graphs of a model; `ValueError` for one that has none, or that the sizes do not fit."""
    if isinstance(model, ViTPFusionForUniversalSegmentation):
        if not isinstance(model.generator, EoMTForUniversalSegmentation):
            raise ValueError(
                f"the generator of the fused model is a {type(model.generator).__name__} of Transformers, whose "
                "attention is not exported at any size; fuse with an EoMT, whose export works, or run this model in "
                "PyTorch"
            )
        if semantic_map:
            raise ValueError(
                "a fused model names its masks outside of its graphs, so they cannot give a semantic map; leave "
                "semantic_map out, or export the generator alone"
            )
        # A fixed or largest size is that of the generator; the classifier sees images without padding.
        of_classifier = Sizes(sizes.batch, planned=sizes.planned)
        parts = graphs_of(model.generator, sizes, False) + graphs_of(model.classifier, of_classifier, False)
        names = ("generator", "classifier")
        return [
            Graph(name, part.module, part.sizes, part.output_names) for name, part in zip(names, parts, strict=True)
        ]
    if isinstance(model, EoMTForUniversalSegmentation):
        sizes = sizes.for_model(model.config)
        _refuse_masked(model)
        outputs: tuple[str, ...] = ("class_queries_logits", "masks_queries_logits")
        if semantic_map:
            if model.num_labels > 256:
                raise ValueError(f"a semantic map of uint8 has 256 classes at most, not {model.num_labels}")
            outputs = (*outputs, SEMANTIC_MAP)
        return [Graph("model", EoMTGraph(model, semantic_map), sizes, outputs)]
    if isinstance(model, ViTPForPointClassification):
        sizes = sizes.for_model(model.config)
        if semantic_map:
            raise ValueError("a ViT-P classifies points and has no semantic map; leave semantic_map out")
        return [Graph("model", ViTPGraph(model), sizes, ("logits",))]
    raise ValueError(
        f"{type(model).__name__} cannot be exported; EoMT, ViT-P and fused models of this package can "
        "(`hf-segvit convert` brings other checkpoints into its form)"
    )


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
