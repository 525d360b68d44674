"""Test-time augmentation of semantic segmentation: several views of an image, averaged.

A view is the image at another input size, or mirrored; papers call it multi-scale ("m.s.") evaluation. `Views` says
which views are wanted and makes a `View` of each; `merge_views` averages their scores (the sum over queries of class
probability x mask probability) and takes the best class. B images, C classes, H W pixels of the answer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..models.confidence import Confidence, calibrated, confidence_maps
from ..models.image_post_processing import SegmentationPostProcessing
from ..models.image_processing_eomt import EoMTImageProcessor
from ..models.semantic_segments import semantic_segments

MAX_SCALE = 8.0  # 64 times the pixels; papers use 0.5 to 2
_OTHERS_MULTIPLE = 32  # total stride of Swin and ResNet backbones, and of the pixel decoders on them


@dataclass
class View:
    """One view of a batch, and what a model says about it.

    Attributes:
        images: as the image processor gets them.
        size: the input size, `None` for the image processor's own.
        inputs: what the image processor made of the images.
        outputs: of the model for these inputs.
    """

    images: list[Any]
    flipped: bool = False
    size: dict[str, int] | None = None
    inputs: Any = None
    outputs: Any = None


@dataclass(frozen=True)
class Views:
    """Which views of an image are asked for.

    Attributes:
        scales: factors of the input size in (0, 8], each once; 1 is the model's own.
        flip: also the mirror image at each scale.
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

    def of(self, images: Sequence[Any], processor: Any, patch_size: int = 1) -> Iterator[View]:
        """Views of upright images, by scale; input sizes are multiples of the model's `patch_size`."""
        # Made before the image processor, so that padding, windows and the image that a classifier sees fit the view.
        for scale in self.scales:
            size = None if scale == 1 else scaled_size(processor, scale, patch_size)
            yield View(list(images), size=size)
            if self.flip:
                mirrored = [_mirrored(image) for image in images]
                yield View(mirrored, flipped=True, size=size)


PLAIN = Views()


def _mirrored(image: Any) -> Any:
    if isinstance(image, Image.Image):
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image[:, ::-1].copy()  # (H, W, C); torch takes no view that runs backwards


@torch.no_grad()
def merge_views(
    processor: Any,
    views: Sequence[View],
    target_sizes: Sequence[tuple[int, int]],
    change: Callable[[Any], Any] | None = None,
) -> list[Tensor]:
    """Semantic maps (H, W) int64 from all views of a batch, on the device of the outputs.

    Args:
        views: from `Views.of`, with outputs.
        target_sizes: (height, width) of each answer.
        change: applied to the outputs of each view first, such as fusion with another alpha.
    """
    # A single view is the processor's own answer, exactly, and needs no memory for scores (C, H, W).
    if len(views) == 1 and not views[0].flipped:
        return post_processed(processor, views[0], target_sizes, change)
    return [total.argmax(0) for total in _summed(processor, views, target_sizes, change)]


@torch.no_grad()
def merge_confidences(
    processor: Any,
    views: Sequence[View],
    target_sizes: Sequence[tuple[int, int]],
    confidences: Sequence[Confidence],
    change: Callable[[Any], Any] | None = None,
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """For each image the map of `merge_views`, and confidences (H, W) float32 by name, of the averaged scores."""
    if len(views) > 1 or views[0].flipped:
        results = []
        for total in _summed(processor, views, target_sizes, change):
            labels = total.argmax(0)
            maps = confidence_maps(total.div_(len(views)), confidences)
            if "maxscore" in maps:
                maps["maxscore"] = calibrated(maps["maxscore"], getattr(processor, "temperature", None))
            results.append((labels, maps))
        return results
    if isinstance(processor, SegmentationPostProcessing):
        answers = post_processed(processor, views[0], target_sizes, change, return_confidence=list(confidences))
        return [(answer["segmentation"], answer["confidence"]) for answer in answers]
    # Transformers' processors stretch masks over the image, some of them from a grid of 384 x 384.
    answers = post_processed(processor, views[0], target_sizes, change)
    outputs = views[0].outputs if change is None else change(views[0].outputs)
    name = type(getattr(processor, "image_processor", processor)).__name__
    found = semantic_segments(
        outputs.class_queries_logits,
        outputs.masks_queries_logits,
        target_sizes,
        input_size=(384, 384) if name.startswith("Mask2Former") else None,
        confidences=confidences,
    )
    return [(label_map, maps) for label_map, (_, _, maps) in zip(answers, found, strict=True)]


def _summed(
    processor: Any,
    views: Sequence[View],
    target_sizes: Sequence[tuple[int, int]],
    change: Callable[[Any], Any] | None,
) -> list[Tensor]:
    """For each image the scores (C, H, W), summed over its views."""
    totals: list[Tensor] = []
    for view in views:
        answers = post_processed(processor, view, target_sizes, change, return_segmentation_scores=True)
        scores = [answer["segmentation_scores"] for answer in answers]
        if view.flipped:
            scores = [score.flip(-1) for score in scores]
        # In place: two sets of scores in memory at a time, however many views there are.
        totals = scores if not totals else [total.add_(score) for total, score in zip(totals, scores, strict=True)]
    return totals


def scaled_size(processor: Any, scale: float, patch_size: int = 1) -> dict[str, int]:
    """The input size of an image processor (of a fused one, of its generator) times a factor."""
    processor = getattr(processor, "image_processor", processor)  # a OneFormerProcessor wraps one
    if not getattr(processor, "do_resize", True):
        raise ValueError(
            f"the image processor leaves images as they are (do_resize=False), so there is no view at scale {scale}; "
            "use scale 1 alone"
        )
    multiple = patch_size if _is_eomt(processor) else _OTHERS_MULTIPLE
    sides = {name: scale * side for name, side in dict(processor.size).items() if side is not None}
    return {
        # Heights and widths are inputs and must be multiples; edges are limits of a rule, which rounds by itself.
        name: max(multiple, multiple * round(side / multiple)) if name in ("height", "width") else max(1, round(side))
        for name, side in sides.items()
    }


def patch_size_of(model: Any) -> int:
    """Patch size of an EoMT, or of the EoMT inside a fused model; 1 for other models."""
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
    """The image processor's semantic answers to one view, not mirrored back; `settings` go to the processor."""
    outputs = view.outputs if change is None else change(view.outputs)
    if view.size is not None and _is_eomt(processor):
        settings["size"] = view.size
    return processor.post_process_semantic_segmentation(outputs, target_sizes=list(target_sizes), **settings)


def _is_eomt(processor: Any) -> bool:
    """Whether the processor, or the generator's in a fused one, is an EoMTImageProcessor."""
    return isinstance(processor, SegmentationPostProcessing) and isinstance(
        getattr(processor, "generator", processor), EoMTImageProcessor
    )
