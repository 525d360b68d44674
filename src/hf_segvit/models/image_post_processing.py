"""The `post_process_*` methods of the image processors.

The methods check arguments and find the geometry; `segment_masks.py` and `semantic_segments.py` do the work. They
read `class_queries_logits` (B, Q, C+1) and `masks_queries_logits` (B, Q, h, w) from any model's outputs, and its
`content_sizes` and `patch_offsets` if it passes them through; if not, the size of the image inside the input follows
from `target_sizes`. Signatures are Mask2Former's, plus `stuff_classes` as another name of `label_ids_to_fuse`,
defaults that the processor stores, and `size` for calls that overrode the processor's.
"""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, TypedDict

from torch import Tensor
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput

from .confidence import Confidence, calibrated, check_temperature, confidences_named
from .image_geometry import Size, patch_offsets, whole_geometry, window_geometry
from .published_labels import TASKS
from .segment_masks import instance_segments, panoptic_segments
from .semantic_segments import semantic_segments, semantic_segments_from_windows

__all__ = [
    "PostProcessingSettings",
    "SegmentationPostProcessing",
    "instance_segments",
    "panoptic_segments",
    "refuse_for_one_call",
    "semantic_segments",
    "semantic_segments_from_windows",
    "served_by_tasks",
]


class PostProcessingSettings(TypedDict, total=False):
    """Settings that only post-processing uses, as stored in preprocessor_config.json."""

    task: str
    stuff_classes: list[int] | None
    threshold: float
    mask_threshold: float
    overlap_mask_area_threshold: float
    instance_threshold: float
    num_instances: int
    temperature: float | int | None


class served_by_tasks:
    """Make a method exist only on processors with one of the given `task`s; on the class it always exists."""

    def __init__(self, *tasks: str) -> None:
        self.tasks = tasks

    def __call__(self, method: Callable[..., Any]) -> "served_by_tasks":
        """Take the method; used as `@served_by_tasks("panoptic")`."""
        self.method = method
        self.__doc__ = method.__doc__
        return self

    # Transformers' segmentation pipeline asks `hasattr` what a processor can do, so a method that a checkpoint cannot
    # serve must be missing, not merely refuse.
    def __get__(self, processor: Any, owner: type | None = None) -> Any:
        if processor is None:
            return self.method
        if processor.task not in self.tasks:
            raise AttributeError(
                f"{self.method.__name__} is not served by a processor of task={processor.task!r}, but by "
                f"{' and '.join(map(repr, self.tasks))}; load it with task= if the model was trained for that"
            )
        return MethodType(self.method, processor)


class SegmentationPostProcessing:
    """Mixin of image processors for mask classification; settings are those of `EoMTImageProcessor`."""

    task: str
    size: Any
    do_resize: bool
    do_pad: bool
    do_split_image: bool | None
    threshold: float
    mask_threshold: float
    overlap_mask_area_threshold: float
    instance_threshold: float
    num_instances: int
    stuff_classes: list[int] | None
    # Of scores and of the confidence `maxscore`, as `hf-segvit evaluate --calibration` finds it; see `calibrated`.
    temperature: float | None = None

    def check_post_processing(self) -> None:
        """Check the settings that belong to post-processing, and sort `stuff_classes`."""
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r}; it is one of {', '.join(map(repr, TASKS))}")
        for name in PostProcessingSettings.__annotations__:
            if name.endswith("threshold") and not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1]")
        if self.temperature is not None:
            check_temperature(self.temperature)
        self.stuff_classes = sorted({int(label) for label in self.stuff_classes or ()})

    def __dir__(self) -> list[str]:
        # `dir` lists names of the class; those that the task hides must not be offered for completion.
        hidden = {name for name in super().__dir__() if name.startswith("post_process_") and not hasattr(self, name)}
        return [name for name in super().__dir__() if name not in hidden]

    @served_by_tasks("semantic", "panoptic")
    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Any = None,
        return_segmentation_scores: bool = False,
        size: Any = None,
        return_confidence: str | Confidence | Sequence[str | Confidence] | None = None,
    ) -> list[Any]:
        """A label for every pixel: for each image an (H, W) int64 map of label ids in [0, C).

        Args:
            outputs: the model's. With windows, all windows of each image.
            target_sizes: (height, width) of each image, a list of pairs or a tensor (B, 2); `None`: the size of the
                model's input, padding included (with windows: of the scaled image).
            return_segmentation_scores: return objects with `segmentation` and `segmentation_scores` (C, H, W) instead.
            size: the input size, if the call that made the input overrode the processor's.
            return_confidence: a name in confidence.py, such as `"rba"`: return objects that also have `confidence`,
                (H, W) float32, higher where the model is surer. For several names, it is maps by name. `maxscore`
                heeds the stored `temperature`.

        Raises:
            ValueError: the number of sizes is not that of the images, windows of an image are missing, there is no such
                confidence, or it is NaN.
        """
        wanted = [] if return_confidence is None else confidences_named(return_confidence)
        settings: dict[str, Any] = {"return_segmentation_scores": return_segmentation_scores, "confidences": wanted}
        # Outputs without sizes are taken to be prepared as the processor would; a call of a windowed processor with
        # do_split_image=False gives its content_sizes.
        unknown = getattr(outputs, "content_sizes", None) is None
        if patch_offsets(outputs) is not None or (self.do_split_image and unknown):
            windows = window_geometry(outputs, target_sizes, self._input_size(size))
            results: list[Any] = semantic_segments_from_windows(
                outputs.class_queries_logits, outputs.masks_queries_logits, **(windows | settings)
            )
        else:
            geometry = self._geometry(outputs, target_sizes, size)
            results = semantic_segments(
                outputs.class_queries_logits, outputs.masks_queries_logits, **(geometry | settings)
            )
        if wanted:
            return [
                self._with_confidence(segmentation, scores, maps, return_confidence)
                for segmentation, scores, maps in results
            ]
        if not return_segmentation_scores:
            return results
        return [
            SemanticSegmentationPostProcessorOutput({"segmentation": segmentation, "segmentation_scores": scores})
            for segmentation, scores in results
        ]

    def _with_confidence(self, segmentation: Tensor, scores: Tensor | None, maps: dict[str, Tensor], asked: Any) -> Any:
        """An object of what is asked for; `asked` is a name, or several."""
        if "maxscore" in maps:
            maps["maxscore"] = calibrated(maps["maxscore"], self.temperature)
        confidence = next(iter(maps.values())) if isinstance(asked, str | Confidence) else maps
        data = {"segmentation": segmentation, "segmentation_scores": scores, "confidence": confidence}
        return SemanticSegmentationPostProcessorOutput(
            {name: value for name, value in data.items() if value is not None}
        )

    @served_by_tasks("instance", "panoptic")
    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        overlap_mask_area_threshold: float | None = None,
        target_sizes: Any = None,
        return_coco_annotation: bool = False,
        return_binary_maps: bool = False,
        size: Any = None,
    ) -> list[dict[str, Any]]:
        """Objects, each with its class, score and mask; masks may overlap.

        Args:
            outputs: the model's.
            threshold: objects with a score of at least this are kept; `None`: the stored `instance_threshold`.
            mask_threshold: probability above which a pixel belongs to a mask; `None`: the stored value.
            overlap_mask_area_threshold: has no effect, as objects do not compete for pixels.
            target_sizes: as for semantic segmentation; so is `size`.
            return_coco_annotation: masks as COCO's run-length encoding.
            return_binary_maps: masks as (n, H, W) bool.

        Returns:
            For each image a dict with `segmentation`, an (H, W) int32 id map, void -1, or the masks asked for, and
            `segments_info`, rows `id, label_id, was_fused, score`.

        Raises:
            ValueError: thresholds outside [0, 1], both kinds of masks asked for, or target sizes that do not fit.
        """
        del overlap_mask_area_threshold  # the segmentation pipeline passes it to every method
        return instance_segments(
            outputs.class_queries_logits,
            outputs.masks_queries_logits,
            **self._geometry(outputs, target_sizes, size),
            threshold=_probability("threshold", threshold, self.instance_threshold),
            mask_threshold=_probability("mask_threshold", mask_threshold, self.mask_threshold),
            num_instances=self.num_instances,
            return_coco_annotation=return_coco_annotation,
            return_binary_maps=return_binary_maps,
            temperature=self.temperature,
        )

    @served_by_tasks("panoptic")
    def post_process_panoptic_segmentation(
        self,
        outputs: Any,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        overlap_mask_area_threshold: float | None = None,
        label_ids_to_fuse: Sequence[int] | None = None,
        target_sizes: Any = None,
        stuff_classes: Sequence[int] | None = None,
        size: Any = None,
    ) -> list[dict[str, Any]]:
        """Segments that do not overlap: things one by one, stuff of a class as one.

        Args:
            outputs: the model's.
            threshold: queries with a class probability above this are kept; `None`: the stored value.
            mask_threshold: probability from which a pixel belongs to a mask; `None`: the stored value.
            overlap_mask_area_threshold: share of its own mask that a segment must keep against the others, or it is
                dropped; `None`: the stored value.
            label_ids_to_fuse: classes whose segments are merged into one; `None`: the stored `stuff_classes`.
            target_sizes: as for semantic segmentation; so is `size`.
            stuff_classes: another name of `label_ids_to_fuse`.

        Returns:
            For each image a dict with `segmentation`, an (H, W) int32 id map, void -1, and `segments_info`, rows
            `id, label_id, was_fused, score`.

        Raises:
            ValueError: thresholds outside [0, 1], two different lists of classes, or target sizes that do not fit.
        """
        return panoptic_segments(
            outputs.class_queries_logits,
            outputs.masks_queries_logits,
            **self._geometry(outputs, target_sizes, size),
            threshold=_probability("threshold", threshold, self.threshold),
            mask_threshold=_probability("mask_threshold", mask_threshold, self.mask_threshold),
            overlap_mask_area_threshold=_probability(
                "overlap_mask_area_threshold", overlap_mask_area_threshold, self.overlap_mask_area_threshold
            ),
            stuff_classes=self._classes_to_fuse(label_ids_to_fuse, stuff_classes),
            temperature=self.temperature,
        )

    def _classes_to_fuse(
        self, label_ids_to_fuse: Sequence[int] | None, stuff_classes: Sequence[int] | None
    ) -> list[int]:
        given = [sorted(map(int, ids)) for ids in (label_ids_to_fuse, stuff_classes) if ids is not None]
        if len(given) == 2 and given[0] != given[1]:
            raise ValueError(
                f"label_ids_to_fuse={given[0]} and stuff_classes={given[1]} are two names of the same setting and "
                "differ; pass one of them"
            )
        return given[0] if given else list(self.stuff_classes or ())

    def _input_size(self, size: Any) -> Size:
        size = self.size if size is None else size
        if isinstance(size, int):
            return size, size
        # A dict or Transformers' SizeDict, which is no Mapping but has `get`.
        return (size["height"], size["width"]) if hasattr(size, "get") else (int(size[0]), int(size[1]))

    def _geometry(self, outputs: Any, target_sizes: Any, size: Any) -> dict[str, Any]:
        if patch_offsets(outputs) is not None:
            raise ValueError(
                "the outputs are of windows (patch_offsets), which can be merged into a semantic map only; prepare the "
                "images with do_split_image=False"
            )
        return whole_geometry(
            outputs, target_sizes, self._input_size(size), do_resize=self.do_resize, do_pad=self.do_pad
        )


def refuse_for_one_call(names: Sequence[str]) -> None:
    """Refuse settings that a call of a processor was given but that only the processor itself can have."""
    if names:
        raise ValueError(
            f"{', '.join(names)}: cannot be set for one call; set it when the processor is made, "
            "or pass thresholds and stuff_classes to post-processing"
        )


def _probability(name: str, value: Any, stored: float) -> float:
    if value is None:
        return stored
    # An easy mistake: Transformers' EoMT takes target_sizes in this position.
    if isinstance(value, Sequence | Tensor):
        raise ValueError(f"{name}={value} is not a number; if these are the sizes of the images, pass target_sizes=")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is outside [0, 1]")
    return float(value)
