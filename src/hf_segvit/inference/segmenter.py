"""Images in, segments out: a model with its image processor on a device.

`Segmenter` answers a batch of images for one task; `SegmentedImage` is the answer, with the class, score, area and
box of every segment, whichever the task. `segment_files.py` writes it to disk. With a fused model `Segmenter.compare`
also says what its generator alone would have answered.

Shapes: H W pixels of the image as it was given, upright.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from ..models.image_post_processing import SegmentationPostProcessing
from ..models.image_processing_eomt import TASKS
from ..models.mask_encoding import decode_mask
from .devices import pick_device
from .loading import is_fused, load_fused_model, load_own_model, with_alpha
from .views import PLAIN, View, Views, ask_views, merge_views, patch_size_of


@dataclass(frozen=True)
class Segment:
    """One segment of an image.

    Attributes:
        id: its value in the image's segment map; the class itself for semantic segmentation.
        label_id: its class.
        label: the name of the class.
        score: class probability (panoptic), that times the mean mask probability inside (instance), or `None`
            (semantic: a pixel's class is decided by all queries together).
        area: pixels; for instances, of the whole mask, hidden pixels included.
        bbox: (x, y, width, height) in pixels, around the same pixels as `area`.
        rle: the mask in COCO's run-length encoding, for instances, which may overlap.
    """

    id: int
    label_id: int
    label: str
    score: float | None
    area: int
    bbox: tuple[int, int, int, int]
    rle: dict[str, Any] | None = None


@dataclass(frozen=True)
class SegmentedImage:
    """The answer for one image.

    Attributes:
        task: `panoptic`, `instance` or `semantic`.
        segment_map: (H, W) int32, the id of the segment at each pixel, void -1. Of overlapping instances the one with
            the highest score is on top.
        segments: in the order of their ids.
    """

    task: str
    segment_map: np.ndarray
    segments: list[Segment]


class Segmenter:
    """A model with its image processor, ready to segment images.

    Args:
        model: an `EoMTForUniversalSegmentation`, a fused model, or any with Mask2Former-style outputs.
        processor: the image processor that belongs to it, of this package.
        task: `panoptic`, `instance` or `semantic`; `None`: what the checkpoint was trained for.
        device: where to compute; `None` takes the best there is, see `pick_device`.
        views: of each image, for semantic segmentation.

    Raises:
        ValueError: the checkpoint cannot do the task, views are given for another than semantic segmentation, or there
            is no such device.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        task: str | None = None,
        device: str | torch.device | None = None,
        views: Views = PLAIN,
    ) -> None:
        self.task = served_task(processor, task)
        refuse_views(self.task, views)
        self.device = device if isinstance(device, torch.device) else pick_device(device)
        self.model = model.eval().to(self.device)
        self.processor, self.views = processor, views
        self.id2label: dict[int, str] = model.config.id2label

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        task: str | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        views: Views = PLAIN,
        classifier: str | None = None,
        alpha: float | None = None,
        label_mismatch: str = "error",
    ) -> "Segmenter":
        """Load a folder or Hub repository.

        Args:
            source: a model of this package; with a classifier, any that `load_universal_model` takes.
            task: as for the class, like `device` and `views`.
            device: where to compute.
            revision: branch, tag or commit of the repository.
            dtype: of the weights.
            views: of each image, for semantic segmentation.
            classifier: a ViT-P that corrects the labels.
            alpha: its weight; `None`: 0.4, or what a fused checkpoint says.
            label_mismatch: `"keep"` where ViT-P knows other classes, see `ViTPFusionConfig`.

        Raises:
            ValueError: as for `load_segmentation_model` and `load_fused_model`.
        """
        device = device if isinstance(device, torch.device) else pick_device(device)
        if classifier is None and alpha is None:
            model, processor = load_own_model(source, revision=revision, dtype=dtype)
        else:
            model, processor = load_fused_model(
                source, classifier, alpha=alpha, label_mismatch=label_mismatch, revision=revision, dtype=dtype
            )
        return cls(model, processor, task=task, device=device, views=views)

    @property
    def default_threshold(self) -> float | None:
        """The score that a segment needs where the caller names none; `None` for semantic segmentation."""
        if self.task == "semantic":
            return None
        return self.processor.instance_threshold if self.task == "instance" else self.processor.threshold

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], threshold: float | None = None) -> list[SegmentedImage]:
        """Segment images, those that may go together in one forward pass (for each view).

        Args:
            images: upright RGB images, as `open_image` returns them.
            threshold: score that a segment needs; `None`: the processor's stored value for the task.

        Returns:
            An answer for each image, at its own size.

        Raises:
            ValueError: an image cannot be brought to the model's input, the threshold is outside [0, 1], or one is
                given for semantic segmentation, where every pixel has a class.
        """
        refuse_threshold(self.task, threshold)
        return [
            answer
            for batch in image_batches(self.processor, images)
            for answer in self._answers(self._ask(batch, threshold), batch, threshold)
        ]

    @torch.inference_mode()
    def compare(
        self, images: Sequence[Image.Image], threshold: float | None = None
    ) -> list[tuple[SegmentedImage, SegmentedImage]]:
        """Segment images with a fused model, and say what its generator alone answers.

        Args:
            images: as for a call.
            threshold: as for a call.

        Returns:
            For each image the generator's answer and the fused one, of the same masks.

        Raises:
            ValueError: as for a call, or the model has no classifier.
        """
        refuse_threshold(self.task, threshold)
        if not is_fused(self.model):
            raise ValueError("there is nothing to compare: the model has no classifier; name one")
        pairs: list[tuple[SegmentedImage, SegmentedImage]] = []
        for batch in image_batches(self.processor, images):
            views = self._ask(batch, threshold)
            alone = self._answers(views, batch, threshold, lambda outputs: with_alpha(self.model, outputs, 0))
            pairs += zip(alone, self._answers(views, batch, threshold), strict=True)
        return pairs

    def _ask(self, images: Sequence[Image.Image], threshold: float | None) -> list[View]:
        settings: dict[str, Any] = {}
        if is_fused(self.model):
            least = self.default_threshold if threshold is None else threshold
            settings = {"task": self.task, "pruning_threshold": least}

        def forward(images: list[Image.Image], **sizes: Any) -> Any:
            inputs = self.processor(images=images, return_tensors="pt", **sizes).to(self.device)
            return self.model(**inputs, **settings)

        return ask_views(forward, self.processor, images, self.views, patch_size_of(self.model))

    def _answers(
        self,
        views: list[View],
        images: Sequence[Image.Image],
        threshold: float | None,
        change: Callable[[Any], Any] | None = None,
    ) -> list[SegmentedImage]:
        sizes = [(image.height, image.width) for image in images]
        if self.task == "semantic":
            maps = merge_views(self.processor, views, sizes, change)
            return [self._semantic(label_map.int().cpu().numpy()) for label_map in maps]
        outputs = views[0].outputs if change is None else change(views[0].outputs)
        if self.task == "instance":
            answers = self.processor.post_process_instance_segmentation(
                outputs, threshold=threshold, target_sizes=sizes, return_coco_annotation=True
            )
            return [self._instance(answer, size) for answer, size in zip(answers, sizes, strict=True)]
        answers = self.processor.post_process_panoptic_segmentation(outputs, threshold=threshold, target_sizes=sizes)
        return [self._panoptic(answer) for answer in answers]

    def _panoptic(self, answer: dict[str, Any]) -> SegmentedImage:
        segment_map = answer["segmentation"].cpu().numpy()
        measures = _areas_and_boxes(segment_map)
        segments = [
            Segment(row["id"], row["label_id"], self.id2label[row["label_id"]], row["score"], *measures[row["id"]])
            for row in answer["segments_info"]
        ]
        return SegmentedImage("panoptic", segment_map, segments)

    def _semantic(self, label_map: np.ndarray) -> SegmentedImage:
        segments = [
            Segment(label, label, self.id2label[label], None, area, box)
            for label, (area, box) in _areas_and_boxes(label_map).items()
        ]
        return SegmentedImage("semantic", label_map, segments)

    def _instance(self, answer: dict[str, Any], size: tuple[int, int]) -> SegmentedImage:
        segment_map = np.full(size, -1, dtype=np.int32)
        segments = []
        for row, rle in sorted(
            zip(answer["segments_info"], answer["segmentation"], strict=True), key=lambda pair: pair[0]["score"]
        ):
            mask = decode_mask(rle)
            segment_map[mask] = row["id"]
            area, box = _areas_and_boxes(mask.astype(np.int32) - 1)[0]
            label = self.id2label[row["label_id"]]
            segments.append(Segment(row["id"], row["label_id"], label, row["score"], area, box, rle))
        return SegmentedImage("instance", segment_map, sorted(segments, key=lambda segment: segment.id))


def image_batches(processor: Any, images: Sequence[Image.Image]) -> list[list[Image.Image]]:
    """Images that may go together, in their order, so that no answer depends on the rest of its batch.

    Processors of Transformers whose size is a rule pad a batch to its largest image; models see that padding, and the
    post-processing that comes with them stretches it over the image.

    Args:
        processor: the image processor, a fused model's, or a OneFormerProcessor.
        images: in the order of the answers.
    """
    if not images:
        return []
    own = getattr(processor, "generator", processor)
    own = getattr(own, "image_processor", own)
    fixed = isinstance(own, SegmentationPostProcessing) or dict(own.size).get("height")
    if fixed or len({image.size for image in images}) == 1:
        return [list(images)]
    return [[image] for image in images]


def served_task(processor: Any, task: str | None = None) -> str:
    """The task asked for if the checkpoint can do it, or the one that it was trained for.

    Raises:
        ValueError: the checkpoint cannot do it; the message names the tasks that it can.
    """
    served = [name for name in TASKS if hasattr(processor, f"post_process_{name}_segmentation")]
    if task is None:
        return getattr(processor, "task", served[0])
    if task not in served:
        raise ValueError(
            f"this checkpoint was trained for {getattr(processor, 'task', 'another task')} segmentation and cannot do "
            f"task {task!r}; it can do {', '.join(served)}"
        )
    return task


def refuse_views(task: str, views: Views) -> None:
    """Refuse several views for tasks whose segments could not be averaged.

    Raises:
        ValueError: naming the task and the remedy.
    """
    if not views.is_plain and task != "semantic":
        raise ValueError(
            f"several views (scales {list(views.scales)}, flip={views.flip}) can be averaged for semantic segmentation "
            f"only, not for {task}; ask for task='semantic', or leave them out"
        )


def refuse_threshold(task: str, threshold: float | None) -> None:
    """Refuse a threshold that is no probability, or that the task has no use for.

    Raises:
        ValueError: naming the value and the remedy.
    """
    if threshold is None:
        return
    if task == "semantic":
        raise ValueError(f"threshold={threshold}: in semantic segmentation every pixel has a class; leave it out")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} is outside [0, 1]")


def _areas_and_boxes(segment_map: np.ndarray) -> dict[int, tuple[int, tuple[int, int, int, int]]]:
    """Area and (x, y, width, height) of every id in a map (H, W) with void -1, in one pass over the map."""
    areas = np.bincount(segment_map.ravel() + 1)
    return {
        number: (
            int(areas[number + 1]),
            (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start),
        )
        for number, place in enumerate(ndimage.find_objects(segment_map + 1))
        if place is not None
        for rows, columns in [place]
    }
