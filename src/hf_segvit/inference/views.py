"""Test-time augmentation of semantic segmentation: several views of an image, and their scores averaged.

A view is the image at another input size, or mirrored. It is made before the image processor, so whatever the
processor makes of it (padding, windows, the image that a classifier sees, points in masks) belongs together. Scores
of a pixel - the sum over queries of class probability x mask probability - are mirrored back and averaged at the size
of the answer; the class with the largest mean wins. Papers call it multi-scale ("m.s.") evaluation.

- `Views`: which views there are; `Views.of`: those of some images, each a `View` that takes up the model's outputs;
  `merge_views`: the outputs as semantic maps.

Shapes: B images, C classes, H W pixels of the answer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..models.image_post_processing import SegmentationPostProcessing
from ..models.image_processing_eomt import EoMTImageProcessor

MAX_SCALE = 8.0
_OTHERS_MULTIPLE = 32  # what Swin, and the pixel decoders on it, divide a side by


@dataclass
class View:
    """One view of a batch, and what a model says about it.

    Attributes:
        images: as the model sees them, before the image processor.
        flipped: whether they are mirrored.
        size: the input size, `None` for the image processor's own.
        inputs: what the image processor made of the images, and
        outputs: what the model made of that, once it was asked.
    """

    images: list[Image.Image]
    flipped: bool = False
    size: dict[str, int] | None = None
    inputs: Any = None
    outputs: Any = None


@dataclass(frozen=True)
class Views:
    """Which views of an image are asked for.

    Attributes:
        scales: factors of the input size; 1 is the model's own.
        flip: also the mirror image at each scale.

    Raises:
        ValueError: a scale is no number in (0, 8], given twice, or there is none.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        for scale in self.scales:
            if not (math.isfinite(scale) and 0 < scale <= MAX_SCALE):
                raise ValueError(f"scale {scale} of a view is outside (0, {MAX_SCALE:g}]; papers use 0.5 to 2")
        if not self.scales or len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales {list(self.scales)} of views must be at least one, and none of them twice")

    @property
    def is_plain(self) -> bool:
        """Whether this is the image as it is, and nothing else."""
        return self.scales == (1.0,) and not self.flip

    def of(self, images: Sequence[Image.Image], processor: Any, patch_size: int = 1) -> Iterator[View]:
        """The views of some upright RGB images, in the order of scales, plain before mirrored.

        `patch_size` is the model's, of which input sizes are multiples.

        Raises:
            ValueError: the processor has no input size that could be scaled.
        """
        for scale in self.scales:
            size = None if scale == 1 else scaled_size(processor, scale, patch_size)
            yield View(list(images), size=size)
            if self.flip:
                mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
                yield View(mirrored, flipped=True, size=size)


PLAIN = Views()


@torch.no_grad()
def merge_views(
    processor: Any,
    views: Sequence[View],
    target_sizes: Sequence[tuple[int, int]],
    change: Callable[[Any], Any] | None = None,
) -> list[Tensor]:
    """Semantic maps from all views of a batch; memory for two sets of scores (C, H, W) of all images is needed.

    A single view that is not mirrored is the processor's own answer, exactly.

    Args:
        processor: the image processor.
        views: of `Views.of`, with outputs.
        target_sizes: (height, width) of each answer.
        change: applied to the outputs of each view first, such as fusion with another alpha.

    Returns:
        For each image an (H, W) int64 map, on the device of the outputs.
    """
    if len(views) == 1 and not views[0].flipped:
        return post_processed(processor, views[0], target_sizes, change)
    totals: list[Tensor] = []
    for view in views:
        answers = post_processed(processor, view, target_sizes, change, return_segmentation_scores=True)
        scores = [answer["segmentation_scores"] for answer in answers]
        if view.flipped:
            scores = [score.flip(-1) for score in scores]
        totals = scores if not totals else [total.add_(score) for total, score in zip(totals, scores, strict=True)]
    return [total.argmax(0) for total in totals]


def scaled_size(processor: Any, scale: float, patch_size: int = 1) -> dict[str, int]:
    """The input size of an image processor times a factor, its sides multiples of what the model needs.

    Of a fused model's processor it is the generator's input that is scaled.

    Raises:
        ValueError: the processor does not scale images.
    """
    processor = getattr(processor, "image_processor", processor)  # of a OneFormerProcessor
    if not getattr(processor, "do_resize", True):
        raise ValueError(
            f"the image processor leaves images as they are (do_resize=False), so there is no view at scale {scale}; "
            "use scale 1 alone"
        )
    multiple = patch_size if _is_eomt(processor) else _OTHERS_MULTIPLE
    sides = {name: scale * side for name, side in dict(processor.size).items() if side is not None}
    return {
        # Edges are limits of a rule, which rounds by itself; heights and widths are inputs.
        name: max(multiple, multiple * round(side / multiple)) if name in ("height", "width") else max(1, round(side))
        for name, side in sides.items()
    }


def patch_size_of(model: Any) -> int:
    """Of what the sides of an EoMT's input are multiples, also where it is the generator of a fused model."""
    config = getattr(model.config, "generator_config", model.config)
    size = getattr(config, "patch_size", 1)
    return size if isinstance(size, int) else 1


def post_processed(
    processor: Any,
    view: View,
    target_sizes: Sequence[tuple[int, int]],
    change: Callable[[Any], Any] | None,
    **settings: Any,
) -> list[Any]:
    """The image processor's semantic answers to one view, not mirrored back; `settings` are for the processor."""
    outputs = view.outputs if change is None else change(view.outputs)
    if view.size is not None and _is_eomt(processor):
        settings["size"] = view.size
    return processor.post_process_semantic_segmentation(outputs, target_sizes=list(target_sizes), **settings)


def _is_eomt(processor: Any) -> bool:
    """Whether images come to an input as EoMTImageProcessor brings them there: the processor, or a fused one's."""
    return isinstance(processor, SegmentationPostProcessing) and isinstance(
        getattr(processor, "generator", processor), EoMTImageProcessor
    )
