"""Images in, segments out: a model with its image processor on a device.

`Segmenter` answers a batch of images for one task, whichever model it holds: ours, any of Transformers' for universal
segmentation (Mask2Former, MaskFormer, OneFormer, EoMT), whose peculiarities it hides, or one of them joined with a
ViT-P. A call gives a `SegmentedImage` for each image, with the class, score, area and box of every segment; `compare`
also what the generator alone would have answered; `answers` what metrics take. These, and `hf_segvit.evaluation`, are
made of two steps: `ask` runs the model, `post_process` makes answers of what it said.

Shapes: H W pixels of the image as it was given, upright.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from ..models.image_post_processing import SegmentationPostProcessing, instance_segments
from ..models.image_processing_eomt import TASKS
from ..models.label_spaces import match_labels
from ..models.mask_encoding import decode_mask, encode_mask
from .devices import pick_device
from .loading import is_fused, load_fused_model, load_universal_model, with_alpha
from .views import PLAIN, View, Views, merge_views, patch_size_of

Change = Callable[[Any], Any]  # of a model's outputs, such as fusion with another alpha


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

    @property
    def segments_info(self) -> list[dict[str, Any]]:
        """The segments as Transformers' post-processing tells them: rows of `id`, `label_id` and `score`."""
        return [{"id": one.id, "label_id": one.label_id, "score": one.score} for one in self.segments]

    @property
    def measures(self) -> list[tuple[int, tuple[int, int, int, int]]] | None:
        """Area and box of each segment in the map; `None` for instances, which may be hidden there in part."""
        return None if self.task == "instance" else [(one.area, one.bbox) for one in self.segments]


@dataclass(frozen=True)
class Asked:
    """What a model said about a batch of images, before post-processing.

    Attributes:
        views: with the model's outputs.
        sizes: (height, width) of each image.
    """

    views: list[View]
    sizes: list[tuple[int, int]]


class Segmenter:
    """A model with its image processor, ready to segment images.

    Args:
        model: any model whose outputs have `class_queries_logits` and `masks_queries_logits`.
        processor: the image processor that belongs to it (of a OneFormer, its OneFormerProcessor).
        task: `panoptic`, `instance` or `semantic`; `None`: what the checkpoint was trained for.
        device: where to compute; `None` takes the best there is, see `pick_device`.
        threshold: score that a segment needs; `None`: the processor's own value.
        stuff_classes: label ids whose panoptic segments are merged, where the processor stores none.
        data_labels: classes of the data set that `stuff_classes` numbers; `None` where these are the model's own ids.
        views: of each image, for semantic segmentation.

    Raises:
        ValueError: the checkpoint cannot do the task, the task has no use for views or threshold, the threshold is
            outside [0, 1], the data set has another number of classes, or there is no such device.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        task: str | None = None,
        device: str | torch.device | None = None,
        threshold: float | None = None,
        stuff_classes: Sequence[int] = (),
        data_labels: Mapping[int, str] | None = None,
        views: Views = PLAIN,
    ) -> None:
        self.task = served_task(processor, task)
        refuse_views(self.task, views)
        refuse_threshold(self.task, threshold)
        self.device = device if isinstance(device, torch.device) else pick_device(device)
        self.model = model.eval().to(self.device)
        self.processor, self.threshold, self.views = processor, threshold, views
        self.id2label: dict[int, str] = {int(index): name for index, name in model.config.id2label.items()}
        if data_labels is not None:
            stuff_classes = match_labels(self.id2label, data_labels).model_ids(stuff_classes)
        self.stuff_classes = list(stuff_classes)
        self._is_ours = isinstance(processor, SegmentationPostProcessing)
        self._is_oneformer = getattr(model.config, "model_type", None) == "oneformer"

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        device: str | torch.device | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        classifier: str | None = None,
        alpha: float | None = None,
        label_mismatch: str = "error",
        **settings: Any,
    ) -> "Segmenter":
        """Load a folder or Hub repository.

        Args:
            source: a model of this package, or any of Transformers' for universal segmentation.
            device: as for the class.
            revision: branch, tag or commit of the repository.
            dtype: of the weights.
            classifier: a ViT-P that corrects the labels.
            alpha: its weight; `None`: 0.4, or what a fused checkpoint says.
            label_mismatch: `"keep"` where ViT-P knows other classes, see `ViTPFusionConfig`.
            settings: `task`, `threshold`, `stuff_classes`, `data_labels` and `views` as for the class.

        Raises:
            ValueError: as for `load_universal_model` and `load_fused_model`.
        """
        # A device that is not there is told before minutes are spent on loading.
        device = device if isinstance(device, torch.device) else pick_device(device)
        if classifier is None and alpha is None:
            model, processor = load_universal_model(source, revision=revision, dtype=dtype)
        else:
            model, processor = load_fused_model(
                source, classifier, alpha=alpha, label_mismatch=label_mismatch, revision=revision, dtype=dtype
            )
        return cls(model, processor, device=device, **settings)

    @property
    def default_threshold(self) -> float | None:
        """The score that a segment needs where the caller names none; `None` for semantic segmentation."""
        if self.task == "semantic":
            return None
        if self.threshold is not None:
            return self.threshold
        # Transformers' processors store none; 0.5 is what their methods say.
        return getattr(self.processor, "instance_threshold" if self.task == "instance" else "threshold", 0.5)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], threshold: float | None = None) -> list[SegmentedImage]:
        """Segment images, those that may go together in one forward pass (for each view).

        Args:
            images: upright RGB images, as `open_image` returns them.
            threshold: score that a segment needs; `None`: the segmenter's, else the processor's stored value.

        Returns:
            An answer for each image, at its own size.

        Raises:
            ValueError: an image cannot be brought to the model's input, the threshold is outside [0, 1], or one is
                given for semantic segmentation, where every pixel has a class.
        """
        refuse_threshold(self.task, threshold)
        threshold = self.default_threshold if threshold is None else threshold
        return [
            self._image(answer, size)
            for asked in self.ask(images, threshold)
            for answer, size in zip(self.post_process(asked, threshold), asked.sizes, strict=True)
        ]

    @torch.inference_mode()
    def compare(
        self, images: Sequence[Image.Image], threshold: float | None = None
    ) -> list[tuple[SegmentedImage, SegmentedImage]]:
        """Segment images with a fused model, and say what its generator alone answers.

        Returns:
            For each image the generator's answer and the fused one, of the same masks.

        Raises:
            ValueError: as for a call, or the model has no classifier.
        """
        refuse_threshold(self.task, threshold)
        if not is_fused(self.model):
            raise ValueError("there is nothing to compare: the model has no classifier; name one")
        threshold = self.default_threshold if threshold is None else threshold
        pairs: list[tuple[SegmentedImage, SegmentedImage]] = []
        for asked in self.ask(images, threshold):
            alone, fused = (self.post_process(asked, threshold, change) for change in (self.with_alpha(0), None))
            for before, after, size in zip(alone, fused, asked.sizes, strict=True):
                pairs.append((self._image(before, size), self._image(after, size)))
        return pairs

    @torch.inference_mode()
    def answers(self, images: Sequence[Image.Image]) -> list[Any]:
        """Segment images, in the form that the metrics take.

        Returns:
            For each image a label map (H, W), or `segmentation` and `segments_info`; tensors are on the CPU. Instances
            are all there, in COCO's run-length encoding, as average precision ranks them.

        Raises:
            ValueError: an image cannot be brought to the model's input.
        """
        threshold = self.ranking_threshold
        return [answer for asked in self.ask(images, threshold) for answer in self.post_process(asked, threshold)]

    @property
    def ranking_threshold(self) -> float | None:
        """The score that a segment needs for metrics: as for a call, but instances are not sorted out."""
        return 0.0 if self.task == "instance" else self.default_threshold

    def ask(
        self, images: Sequence[Image.Image], threshold: float | None = None, alpha: float | None = None
    ) -> Iterator[Asked]:
        """Run the model on images, on those at a time that may go together.

        Args:
            images: upright RGB images.
            threshold: score that will be asked of a segment; a fused model need not classify what cannot reach it.
            alpha: fuse with this weight, and classify everything.
        """
        fusion: dict[str, Any] = {}
        if is_fused(self.model):
            fusion = {"pruning_threshold": threshold} if alpha is None else {"alpha": alpha}
            fusion["task"] = self.task
        for batch in image_batches(self.processor, images):
            views = list(self.views.of(batch, self.processor, patch_size_of(self.model)))
            for view in views:
                settings: dict[str, Any] = {} if view.size is None else {"size": view.size}
                if self._is_oneformer:  # it is told in words what to do
                    settings["task_inputs"] = [self.task] * len(batch)
                view.inputs = self.processor(images=view.images, return_tensors="pt", **settings).to(self.device)
                view.outputs = self.model(**view.inputs, **fusion)
            yield Asked(views, [(image.height, image.width) for image in batch])

    def with_alpha(self, alpha: float) -> Change:
        """Fusion of a fused model's outputs with another weight of ViT-P, for `post_process`; 0 is the generator."""
        return lambda outputs: with_alpha(self.model, outputs, alpha)

    def post_process(
        self,
        asked: Asked,
        threshold: float | None = None,
        change: Change | None = None,
        stuff_classes: Sequence[int] | None = None,
    ) -> list[Any]:
        """Answers in the form that the metrics take, from what the model said.

        Args:
            asked: of `ask`.
            threshold: score that a segment needs; `None`: the processor's.
            change: applied to the outputs first.
            stuff_classes: label ids whose panoptic segments are merged; `None`: the processor's or the segmenter's.
        """
        if self.task == "semantic":
            return [label_map.cpu() for label_map in merge_views(self.processor, asked.views, asked.sizes, change)]
        outputs = asked.views[0].outputs if change is None else change(asked.views[0].outputs)
        settings: dict[str, Any] = {"target_sizes": asked.sizes}
        if threshold is not None:
            settings["threshold"] = threshold
        if self.task == "panoptic":
            if stuff_classes is None:
                stuff_classes = (self._is_ours and self.processor.stuff_classes) or self.stuff_classes
            settings["label_ids_to_fuse"] = list(stuff_classes) if self._is_ours else set(stuff_classes)
            answers = self.processor.post_process_panoptic_segmentation(outputs, **settings)
            if not self._is_ours:
                return [_renumbered(answer) for answer in answers]
            return [{**answer, "segmentation": answer["segmentation"].cpu()} for answer in answers]
        if self._is_oneformer:
            # Its processor takes logits for probabilities, and gives masks that do not overlap; the official code's
            # rule, which is ours too, takes the best pairs of query and class as they are.
            height, width = asked.views[0].inputs["pixel_values"].shape[-2:]
            logits = outputs.class_queries_logits, outputs.masks_queries_logits
            return instance_segments(*logits, input_size=(height, width), return_coco_annotation=True, **settings)
        form = {"return_coco_annotation": True} if self._is_ours else {"return_binary_maps": True}
        answers = self.processor.post_process_instance_segmentation(outputs, **form, **settings)
        return answers if self._is_ours else [_encoded(answer) for answer in answers]

    def _image(self, answer: Any, size: tuple[int, int]) -> SegmentedImage:
        """What is shown of an answer to an image of size (H, W)."""
        rows: Sequence[Mapping[str, Any]] = () if self.task == "semantic" else answer["segments_info"]
        rles: list[Any] = [None] * len(rows)
        if self.task == "instance":
            rles, segment_map = answer["segmentation"], np.full(size, -1, dtype=np.int32)
            measures = {}
            for row, rle in sorted(zip(rows, rles, strict=True), key=lambda pair: pair[0]["score"]):
                mask = decode_mask(rle)
                segment_map[mask] = row["id"]  # so the best is on top
                measures[row["id"]] = _areas_and_boxes(mask.astype(np.int32) - 1)[0]
        else:
            segment_map = answer.int().numpy() if self.task == "semantic" else answer["segmentation"].numpy()
            measures = _areas_and_boxes(segment_map)
        if self.task == "semantic":
            rows = [{"id": label, "label_id": label, "score": None} for label in measures]
            rles = [None] * len(rows)
        segments = [
            Segment(row["id"], row["label_id"], self.id2label[row["label_id"]], row["score"], *measures[row["id"]], rle)
            for row, rle in zip(rows, rles, strict=True)
        ]
        return SegmentedImage(self.task, segment_map, segments)


def image_batches(processor: Any, images: Sequence[Image.Image]) -> list[list[Image.Image]]:
    """Images that may go together, in their order, so that no answer depends on the rest of its batch.

    Processors of Transformers whose size is a rule pad a batch to its largest image; models see that padding, and the
    post-processing that comes with them stretches it over the image.
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


def _renumbered(answer: Mapping[str, Any]) -> dict[str, Any]:
    """A panoptic answer of Transformers' processors in our form: ids from 0, void -1, one row for each segment.

    They write a row for every query that they fuse into a segment, and void as 0 or -1, in float32 where all is void.
    """
    ids = answer["segmentation"].cpu().long()
    rows: dict[int, Mapping[str, Any]] = {}
    for row in answer["segments_info"]:
        rows.setdefault(row["id"], row)
    new_ids = torch.full((max([*rows, int(ids.max())]) + 2,), -1, dtype=torch.int32)
    present = set(ids.unique().tolist())
    kept = [row for id_, row in rows.items() if id_ in present]
    new_ids[[row["id"] + 1 for row in kept]] = torch.arange(len(kept), dtype=torch.int32)
    return {
        "segmentation": new_ids[ids + 1],
        "segments_info": [{**row, "id": index} for index, row in enumerate(kept)],
    }


def _encoded(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An instance answer of Transformers' processors, whose masks are binary maps, with COCO's run-length encoding."""
    rows = answer["segments_info"]  # without any, there is an id map in place of the masks
    masks = [encode_mask(mask.numpy()) for mask in answer["segmentation"].cpu()] if rows else []
    return {**answer, "segmentation": masks}


def _areas_and_boxes(segment_map: np.ndarray) -> dict[int, tuple[int, tuple[int, int, int, int]]]:
    """Area and (x, y, width, height) of every id in a map (H, W) with void -1, in one pass over the map."""
    areas = np.bincount(segment_map.ravel() + 1)
    return {
        segment_id: (
            int(areas[segment_id + 1]),
            (box[1].start, box[0].start, box[1].stop - box[1].start, box[0].stop - box[0].start),
        )
        for segment_id, box in enumerate(ndimage.find_objects(segment_map + 1))
        if box is not None
    }
