"""Segment images: a model with its image processor on a device.

`Segmenter` answers for one task, with our models, any of Transformers' for universal segmentation, or one joined with a
ViT-P. A call gives a `SegmentedImage` for each image, `stream` those of any number of images; `compare` adds what the
generator alone would answer; `answers` is for metrics. All are made of three steps: `prepare` makes inputs, `infer`
runs the model, `post_process` turns its outputs into answers. H W pixels of the image as it was given, upright.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from ..lookup import suggestion
from ..models.confidence import Confidence, calibrated, confidences_named
from ..models.image_decoding import image_size, is_address, open_image, to_pixels
from ..models.image_files import read_content
from ..models.image_post_processing import SegmentationPostProcessing, instance_segments
from ..models.image_processing_plain_vit import image_settings
from ..models.image_values import ImageSettings
from ..models.label_spaces import match_labels
from ..models.modeling_eomt import EoMTForUniversalSegmentation
from ..models.token_merging import refuse_odd_grid
from .devices import describe_device, pick_device, pick_dtype
from .loading import (
    is_exported,
    is_fused,
    load_fused_model,
    load_universal_model,
    with_alpha,
)
from .memory import refuse_without_memory
from .pipeline import Encoded, Steps, run_pipeline
from .processor_answers import as_segmented_image, encoded, renumbered
from .quantization import check_quantization, quantize_model
from .runtimes import RuntimeSettings
from .segmented_image import SegmentedImage
from .task_settings import checked_confidence, refuse_max_segments, refuse_threshold, refuse_views, served_task
from .views import PLAIN, View, Views, merge_confidences, merge_views, patch_size_of

Change = Callable[[Any], Any]  # of a model's outputs, such as fusion with another alpha


@dataclass(frozen=True)
class Asked:
    """Outputs of a model for a batch of images, in its views, and the (height, width) of each image."""

    views: list[View]
    sizes: list[tuple[int, int]]


class Segmenter:
    """A model with its image processor, ready to segment images.

    Args:
        model: any model whose outputs have `class_queries_logits` and `masks_queries_logits`.
        processor: the image processor that belongs to it (of a OneFormer, its OneFormerProcessor).
        task: `panoptic`, `instance` or `semantic`; `None`: what the checkpoint was trained for.
        device: as for `pick_device`.
        threshold: score that a segment needs; `None`: the processor's own value.
        stuff_classes: label ids whose panoptic segments are merged, where the processor stores none.
        data_labels: classes of the data set that `stuff_classes` refers to; `None` if these are the model's own ids.
        views: views of each image, for semantic segmentation only.
        max_segments: the most objects in an image, the best ones, for instance segmentation only; `None`: the
            processor's `num_instances`.
        confidence: add a map of how sure the model is of each pixel, by a name in models/confidence.py, such as
            `"rba"`, for semantic segmentation only.
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
        max_segments: int | None = None,
        confidence: str | Confidence | None = None,
    ) -> None:
        self.task = served_task(processor, task)
        refuse_max_segments(self.task, max_segments)
        self.confidence = checked_confidence(self.task, confidence, views)
        refuse_views(self.task, views)
        refuse_threshold(self.task, threshold)
        self.device = pick_device(device)
        self.model = model.eval().to(self.device)
        self.processor, self.threshold, self.views = processor, threshold, views
        self.id2label: dict[int, str] = {int(index): name for index, name in model.config.id2label.items()}
        if data_labels is not None:
            # Model and data set may number the same classes differently.
            stuff_classes = match_labels(self.id2label, data_labels).model_ids(stuff_classes)
        self.stuff_classes = list(stuff_classes)
        self._is_ours = isinstance(processor, SegmentationPostProcessing)
        self._is_oneformer = getattr(model.config, "model_type", None) == "oneformer"
        if max_segments is not None and self._is_ours:
            self.processor = copy.copy(processor)  # the caller's own keeps its settings
            self.processor.num_instances = max_segments
        self.max_segments = max_segments

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        device: str | torch.device | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        optimize: bool | Mapping[str, Any] = False,
        quantization: str | None = None,
        classifier: str | None = None,
        alpha: float | None = None,
        label_mismatch: str = "error",
        runtime: str | None = None,
        threads: int | None = None,
        allow_native_code: bool = False,
        token_merging: float | Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> "Segmenter":
        """Load a folder or Hub repository; arguments and errors as for `load_universal_model` and `load_fused_model`.

        `dtype` may be `"auto"`, see `pick_dtype`. `optimize` calls the model's `optimize_for_inference`, with these
        switches if it is a mapping. `quantization` is a method of `quantize_model`: `"int8"`, `"int8-weight-only"` or
        `"fp8"`; the checkpoint stays as it is. `token_merging` is a threshold for the model's `merge_tokens`, or a
        mapping of its arguments; `False` turns off what the checkpoint has on, `None` keeps that. `runtime`, `threads`
        and `allow_native_code` are those of `RuntimeSettings`, for exported models; `threads` for PyTorch, too.

        `settings` are `task`, `threshold`, `stuff_classes`, `data_labels`, `views`, `max_segments` and `confidence`, as
        for the class.
        """
        running = RuntimeSettings(runtime, threads, allow_native_code=allow_native_code)
        if is_exported(source, revision):
            if classifier is not None or alpha is not None:
                raise ValueError(
                    f"{source} is an exported model, whose labels and alpha are fixed; join generator and classifier "
                    "first, and export the fused model"
                )
            running = replace(running, device=None if device is None else str(device))
            device = "cpu"  # of the tensors that go in and come out
            if dtype == "auto":  # the runtimes choose for themselves
                dtype = torch.float32
            for name, value in (("optimize", optimize or None), ("quantization", quantization)):
                if value is not None:
                    raise ValueError(f"{source} is an exported model, which its runtime optimises; leave {name} out")
        device = pick_device(device)  # an unknown device is refused before minutes of loading
        dtype = pick_dtype(dtype, device)
        if quantization is not None:
            check_quantization(quantization, device, dtype)
        if classifier is None and alpha is None:
            model, processor = load_universal_model(source, revision=revision, dtype=dtype, runtime=running)
        else:
            model, processor = load_fused_model(
                source, classifier, alpha=alpha, label_mismatch=label_mismatch, revision=revision, dtype=dtype
            )
        segmenter = cls(model, processor, device=device, **settings)
        if token_merging is not None:
            merge_tokens(segmenter.model, segmenter.processor, token_merging)
        if quantization is not None:
            quantize_model(segmenter.model, quantization)
        if optimize is not False:  # the device decides about some switches, so the model must be there
            optimize_model(segmenter.model, {} if optimize is True else optimize)
        return segmenter

    @property
    def device_description(self) -> str:
        """Where the model runs, for people."""
        return getattr(self.model, "description", None) or describe_device(self.device)

    @property
    def default_threshold(self) -> float | None:
        """The score that a segment needs where the caller names none; `None` for semantic segmentation."""
        if self.task == "semantic":
            return None
        if self.threshold is not None:
            return self.threshold
        # Transformers' processors store none; 0.5 is the default of their methods.
        return getattr(self.processor, "instance_threshold" if self.task == "instance" else "threshold", 0.5)

    @property
    def image_settings(self) -> ImageSettings:
        """How images in memory become those that the model takes: its channels, and the range of values it knows."""
        return replace(self.file_settings, bands=None)

    @property
    def file_settings(self) -> ImageSettings:
        """`image_settings` for the files of new images, of which a model may take certain bands."""
        processor = getattr(self.processor, "generator", self.processor)
        return image_settings(vars(processor)) if self._is_ours else ImageSettings(channels=3)

    def __call__(self, images: Any, threshold: float | None = None) -> Any:
        """Segment an image or many.

        Args:
            images: a path or address, the bytes of a file, a Pillow image, an array (H, W, C) or (H, W) of uint8, or a
                tensor (C, H, W) of uint8 or of floats in [0, 1]. Or a sequence of them, or one more dimension, which
                run as one batch; or an iterator, for `stream`.
            threshold: score that a segment needs; `None`: the segmenter's or the processor's.

        Returns:
            A `SegmentedImage`; for a sequence a list, for an iterator an iterator of them.

        Raises:
            ValueError: an image cannot be read or does not fit the model's input, the threshold is outside [0, 1], or
                is given for semantic segmentation.
        """
        refuse_threshold(self.task, threshold)
        if is_one_image(images):
            return self._batch([images], threshold)[0]
        if isinstance(images, Iterator):
            return self.stream(images, threshold)
        return self._batch(list(images), threshold)

    @torch.inference_mode()
    def _batch(self, sources: Sequence[Any], threshold: float | None) -> list[SegmentedImage]:
        """The answers for images, in one batch where they may go together."""
        threshold = self.default_threshold if threshold is None else threshold
        images = [self.opened(source, f"images[{index}]") for index, source in enumerate(sources)]
        results = [
            result for asked in self.ask(images, threshold, prune=True) for result in self.results(asked, threshold)
        ]
        return [
            replace(result, image=image, source=source_name(source))
            for result, image, source in zip(results, images, sources, strict=True)
        ]

    def stream(
        self,
        images: Iterable[Any],
        threshold: float | None = None,
        *,
        batch_size: int = 1,
        workers: int | None = None,
        writers: int | None = None,
        failed: Callable[[Any, Exception], None] | None = None,
    ) -> Iterator[SegmentedImage]:
        """Segment any number of images, in order, with few of them in memory at a time; see pipeline.py.

        Args:
            images: each as for a call.
            threshold: as for a call; batch_size, workers, writers: as for `run_pipeline`.
            failed: is called for an image that cannot be segmented, which is then left out; `None` raises its error.
        """
        refuse_threshold(self.task, threshold)
        names = {}

        def numbered() -> Iterator[tuple[int, Any]]:
            for index, source in enumerate(images):
                names[index] = source_name(source) or f"images[{index}]"
                yield index, source

        def load(item: tuple[int, Any]) -> Encoded:
            content = item[1]
            if isinstance(content, str | PathLike) and not is_address(content):
                content = read_content(content, names[item[0]])
            if isinstance(content, bytes):
                return Encoded.of_file(content, names[item[0]])
            return Encoded(content, math.prod(getattr(content, "size", (1,)) if isinstance(content, Image) else (1,)))

        def finish(item: tuple[int, Any], image: Any, answer: SegmentedImage, _: Any) -> SegmentedImage:
            return replace(answer, image=image, source=source_name(item[1]))

        steps = Steps(
            load, lambda item, content: self.opened(content, names[item[0]]), finish, lambda item: names[item[0]]
        )
        settings = {"batch_size": batch_size, "workers": workers, "writers": writers, "threshold": threshold}
        for outcome in run_pipeline(self, numbered(), steps, **settings):  # type: ignore[arg-type]
            names.pop(outcome.item[0])
            if outcome.error is None:
                yield outcome.value
            elif failed is None:
                raise outcome.error
            else:
                failed(outcome.item[1], outcome.error)

    def opened(self, source: Any, name: str = "image") -> Any:
        """An image of any kind that a call takes as upright pixels; errors call it `name`."""
        if isinstance(source, Tensor):
            source = _array(source, name)
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim not in (2, 3):
                raise ValueError(
                    f"{name}: an array of {source.dtype} and shape {source.shape}; give uint8 (height, width, channels)"
                )
            if source.ndim == 2:
                source = source[..., None] if self.image_settings.channels == 1 else np.stack([source] * 3, -1)
            return to_pixels(source, name, ImageSettings(self.image_settings.channels))
        if isinstance(source, str | PathLike | bytes | bytearray) or hasattr(source, "read"):
            named = name if isinstance(source, bytes | bytearray) or hasattr(source, "read") else None
            return open_image(source, named, self.file_settings)
        return to_pixels(source, name, self.image_settings)

    @property
    def mixes_sizes(self) -> bool:
        """Whether images of several sizes may go together in a batch without changing each other's answers."""
        return mixes_sizes(self.processor)

    @torch.inference_mode()
    def results(self, asked: Asked, threshold: float | None = None) -> list[SegmentedImage]:
        """The answers of a batch from the outputs of `infer`; `threshold` as there."""
        if self.confidence is not None:
            return self._with_confidences(asked)
        answers = self.post_process(asked, threshold)
        answered = [self._segmented(answer, size) for answer, size in zip(answers, asked.sizes, strict=True)]
        return self._with_highest_scores(asked, answered)

    def _with_confidences(self, asked: Asked) -> list[SegmentedImage]:
        """The answers of a batch, with the confidence that is asked for."""
        assert self.confidence is not None
        answers = self.post_process_with_confidences(asked, [self.confidence])
        return [
            replace(
                self._segmented(label_map, size),
                confidence=maps[str(self.confidence)].numpy(),
                confidence_score=self.confidence,
            )
            for (label_map, maps), size in zip(answers, asked.sizes, strict=True)
        ]

    @torch.inference_mode()
    def confidences(
        self, images: Sequence[Any], confidences: str | Confidence | Sequence[str | Confidence]
    ) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """For each image its label map (H, W) and confidences (H, W) float32 by name, on the CPU, from one pass.

        Args:
            images: as for `answers`.
            confidences: names in models/confidence.py; higher is surer, and the negative is the anomaly score.

        Raises:
            ValueError: the task is not semantic, a confidence is unknown, or is not defined for several views.
        """
        wanted = confidences_named(confidences)
        for each in wanted:
            checked_confidence(self.task, each, self.views)
        return [pair for asked in self.ask(images) for pair in self.post_process_with_confidences(asked, wanted)]

    def post_process_with_confidences(
        self, asked: Asked, wanted: Sequence[Confidence], change: Change | None = None
    ) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """The pairs of `confidences`, from the outputs of `ask`."""
        found = merge_confidences(self.processor, asked.views, asked.sizes, wanted, change)
        return [(labels.cpu(), {name: values.cpu() for name, values in maps.items()}) for labels, maps in found]

    def _with_highest_scores(self, asked: Asked, results: list[SegmentedImage]) -> list[SegmentedImage]:
        """The results, with the best score in images without segments, where the threshold may be too high."""
        if self.task == "semantic" or all(result.segments for result in results):
            return results
        if self._prunes:
            # Rare enough to run the model again for the masks that were not decoded.
            (asked,) = self.ask(asked.views[0].images)
        scores = [
            max((row["score"] for row in answer["segments_info"]), default=None)
            for answer in self.post_process(asked, 0.0)
        ]
        if (temperature := getattr(self.processor, "temperature", None)) is not None:
            # Thresholds are about scores before calibration, which this undoes.
            raw = [None if score is None else calibrated(torch.tensor(score), 1 / temperature) for score in scores]
            scores = [None if score is None else round(float(score), 6) for score in raw]
        return [
            result if result.segments else replace(result, highest_score=score)
            for result, score in zip(results, scores, strict=True)
        ]

    def _segmented(self, answer: Any, size: tuple[int, int]) -> SegmentedImage:
        """The answer for an image of size (H, W)."""
        limit = None
        if self.task == "instance":
            limit = self.max_segments or getattr(self.processor, "num_instances", None)
        return as_segmented_image(answer, self.task, size, self.id2label, limit)

    @torch.inference_mode()
    def compare(
        self, images: Sequence[Any], threshold: float | None = None
    ) -> list[tuple[SegmentedImage, SegmentedImage]]:
        """For each image the answer of a fused model's generator alone and the fused one, of the same masks."""
        refuse_threshold(self.task, threshold)
        if not is_fused(self.model):
            raise ValueError("there is nothing to compare: the model has no classifier; name one")
        threshold = self.default_threshold if threshold is None else threshold
        return [pair for asked in self.ask(images, threshold) for pair in self.compared(asked, threshold)]

    @torch.inference_mode()
    def compared(self, asked: Asked, threshold: float | None = None) -> list[tuple[SegmentedImage, SegmentedImage]]:
        """The pairs of `compare` for a batch, from the outputs of `infer`."""
        # One pass of the model serves both: the answers differ only in how the class logits are fused.
        alone, fused = (self.post_process(asked, threshold, change) for change in (self.with_alpha(0), None))
        before, after = (
            [self._segmented(answer, size) for answer, size in zip(side, asked.sizes, strict=True)]
            for side in (alone, fused)
        )
        if self.confidence is not None:
            after = self._with_confidences(asked)
        return list(zip(before, self._with_highest_scores(asked, after), strict=True))

    @torch.inference_mode()
    def answers(self, images: Sequence[Any]) -> list[Any]:
        """Segment images, in the form that the metrics take.

        For each image a label map (H, W), or `segmentation` and `segments_info`; tensors are on the CPU, instances in
        COCO's run-length encoding, whatever their score.
        """
        threshold = self.ranking_threshold
        batches = self.ask(images, threshold, prune=True)
        return [answer for asked in batches for answer in self.post_process(asked, threshold)]

    @property
    def ranking_threshold(self) -> float | None:
        """The score that a segment needs for metrics: 0 for instances, which average precision ranks itself."""
        return 0.0 if self.task == "instance" else self.default_threshold

    @property
    def _prunes(self) -> bool:
        return self.task != "semantic" and getattr(self.model, "prunes_masks", False)

    def ask(
        self,
        images: Sequence[Any],
        threshold: float | None = None,
        alpha: float | None = None,
        *,
        prune: bool = False,
    ) -> Iterator[Asked]:
        """Run the model on upright images, in batches that may go together.

        Args:
            threshold: score that will be required of a segment; a fused model skips queries that cannot reach it.
            alpha: fuse with this weight, and classify all queries.
            prune: let a model optimised for that leave out the queries that cannot reach the threshold.
        """
        for asked in self.prepare(images):
            yield self.infer(asked, threshold, alpha, prune=prune)

    def prepare(self, images: Sequence[Any]) -> Iterator[Asked]:
        """The model's inputs for upright images, on the CPU, in batches that may go together; the model does not run.

        Raises:
            ValueError: an image has other channels, does not fit the model's input, or needs too much memory.
        """
        # Four bands would pass as colours with transparency, so the number of channels is checked here.
        channels = ImageSettings(self.image_settings.channels)
        images = [to_pixels(image, f"images[{index}]", channels) for index, image in enumerate(images)]
        for batch in image_batches(self.processor, images):
            sizes = [image_size(image) for image in batch]
            names = [f"images[{index}]" for index in range(len(batch))]
            refuse_without_memory(sizes, self.processor, self.model.config, self.device, names)
            views = []
            for view in self.views.of(batch, self.processor, patch_size_of(self.model)):
                settings: dict[str, Any] = {} if view.size is None else {"size": view.size}
                if self._is_oneformer:  # it takes the task as text
                    settings["task_inputs"] = [self.task] * len(batch)
                view.inputs = self.processor(images=view.images, return_tensors="pt", **settings)
                views.append(view)
            yield Asked(views, sizes)

    def infer(
        self, asked: Asked, threshold: float | None = None, alpha: float | None = None, *, prune: bool = False
    ) -> Asked:
        """Run the model on what `prepare` made, whose views get the outputs; arguments as for `ask`."""
        fusion: dict[str, Any] = {}
        if is_fused(self.model):
            fusion = {"pruning_threshold": threshold} if alpha is None else {"alpha": alpha}
            fusion["task"] = self.task
        elif prune and self._prunes:
            fusion = {"pruning_threshold": threshold, "task": self.task}
        for view in asked.views:
            view.inputs = view.inputs.to(self.device)
            view.outputs = self.model(**view.inputs, **fusion)
            refuse_non_finite(view.outputs)
        return asked

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
        """Answers in the form that the metrics take, from the outputs of `ask`.

        Args:
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
                return [renumbered(answer) for answer in answers]
            return [{**answer, "segmentation": answer["segmentation"].cpu()} for answer in answers]
        if self._is_oneformer:
            # Not its own processor, which takes logits for probabilities and gives masks that do not overlap. The
            # official code's rule, which is ours too, takes the best pairs of query and class as they are.
            height, width = asked.views[0].inputs["pixel_values"].shape[-2:]
            logits = outputs.class_queries_logits, outputs.masks_queries_logits
            if self.max_segments is not None:
                settings["num_instances"] = self.max_segments
            return instance_segments(*logits, input_size=(height, width), return_coco_annotation=True, **settings)
        form = {"return_coco_annotation": True} if self._is_ours else {"return_binary_maps": True}
        answers = self.processor.post_process_instance_segmentation(outputs, **form, **settings)
        return answers if self._is_ours else [encoded(answer, self.max_segments) for answer in answers]


def is_one_image(images: Any) -> bool:
    """Whether this is a single image for a `Segmenter`, rather than several."""
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim < 4
    # An open file is an iterator, too, of lines.
    is_many = isinstance(images, Sequence | Iterator) and not hasattr(images, "read")
    return not is_many or isinstance(images, str | bytes | bytearray)


def source_name(source: Any) -> str:
    """The path or address of an image; "" if it has none."""
    return str(source) if isinstance(source, str | PathLike) else ""


def _array(pixels: Tensor, name: str) -> np.ndarray:
    """(H, W, C) uint8 of a tensor (C, H, W) or (H, W)."""
    if pixels.ndim not in (2, 3):
        raise ValueError(f"{name}: a tensor of shape {tuple(pixels.shape)}; give (channels, height, width)")
    pixels = pixels.detach().cpu()
    if pixels.is_floating_point():
        low, high = (float(pixels.min()), float(pixels.max())) if pixels.numel() else (0.0, 0.0)
        if not (low >= 0 and high <= 1):  # also false for NaN
            raise ValueError(f"{name}: floats from {low:g} to {high:g}; give values in [0, 1], or uint8")
        pixels = (pixels.float() * 255).round().to(torch.uint8)
    array = pixels.numpy()
    return np.ascontiguousarray(array.transpose(1, 2, 0)) if array.ndim == 3 else array


def optimize_model(model: Any, switches: Mapping[str, Any]) -> None:
    """Optimise a model for inference; a ValueError if it cannot be, or has no such switch."""
    method = getattr(model, "optimize_for_inference", None)
    if method is None:
        raise ValueError(f"a {type(model).__name__} cannot be optimised for inference; leave optimize out")
    known = list(signature(method).parameters)
    unknown = [name for name in switches if name not in known]
    if unknown:
        raise ValueError(f"optimize: there is no switch {unknown[0]!r}; {suggestion(unknown[0], known)}")
    method(**switches)


def merge_tokens(model: Any, processor: Any, token_merging: float | Mapping[str, Any]) -> None:
    """Turn token merging of a model, or of a fused model's generator, on or off (`False`).

    Raises:
        ValueError: the model cannot merge tokens, an argument is unknown or impossible, or the processor's images have
            an odd grid.
    """
    model, processor = getattr(model, "generator", model), getattr(processor, "generator", processor)
    if not isinstance(model, EoMTForUniversalSegmentation):
        if token_merging is False:
            return
        raise ValueError(f"token_merging={token_merging}: a {type(model).__name__} cannot merge tokens; leave it out")
    if isinstance(token_merging, Mapping):
        known = list(signature(model.merge_tokens).parameters)
        unknown = [name for name in token_merging if name not in known]
        if unknown:
            raise ValueError(f"token_merging: there is no argument {unknown[0]!r}; {suggestion(unknown[0], known)}")
        if "threshold" not in token_merging:
            raise ValueError(f"token_merging={dict(token_merging)} lacks the threshold; add one, such as 0.9")
        model.merge_tokens(**token_merging)
    elif token_merging is True:
        raise ValueError("token_merging=True names no threshold; give one, such as 0.9")
    else:
        model.merge_tokens(None if token_merging is False else token_merging)
    if model.config.token_merging_threshold is not None and processor.do_pad:  # every input has this size
        refuse_odd_grid((processor.size["height"], processor.size["width"]), model.config.patch_size)


class NonFiniteOutputs(ValueError):
    """A model answered NaN or infinity, from which post-processing would make an empty answer."""


def refuse_non_finite(outputs: Any) -> None:
    """Raise `NonFiniteOutputs` unless the logits of a model, of masks, classes or points, are numbers."""
    # A sum takes a fraction of the time of a look at each value, and whatever is no number spoils it; it may also
    # overflow, so that only the look decides.
    if not any(_broken_inputs(outputs, lambda rows: ~rows.sum(1, dtype=torch.float32).isfinite())):
        return
    broken = _broken_inputs(outputs, lambda rows: ~rows.isfinite().all(1))
    if any(broken):
        some = "" if len(broken) == 1 else f" for {sum(broken)} of {len(broken)} inputs"
        raise NonFiniteOutputs(
            f"the model answers NaN or infinity instead of numbers{some}: float16 overflows in some models (use "
            "float32 or bfloat16), or its weights are damaged"
        )


def _broken_inputs(outputs: Any, is_broken: Callable[[Tensor], Tensor]) -> list[bool]:
    """Whether each input's logits are no numbers, by a function of those of masks or points as rows."""
    checks = []
    for name in ("class_queries_logits", "masks_queries_logits", "logits"):
        values = getattr(outputs, name, None)
        if values is None or not values.numel():
            continue
        rows = values.flatten(1)
        if name == "class_queries_logits":
            # Fusion excludes classes by -inf, but never all of them.
            checks.append(~(rows < torch.inf).all(1) | (values == -torch.inf).all(-1).flatten(1).any(1))
        else:
            checks.append(is_broken(rows))
    # One synchronisation of the device for all.
    return torch.stack(checks).any(0).tolist() if checks else []


def image_batches(processor: Any, images: Sequence[Any]) -> list[list[Any]]:
    """Images, in their order, in batches whose answers do not depend on the rest of the batch."""
    if not images:
        return []
    if mixes_sizes(processor) or len({image_size(image) for image in images}) == 1:
        return [list(images)]
    return [[image] for image in images]


def mixes_sizes(processor: Any) -> bool:
    """Whether images of several sizes may go together in a batch without changing each other's answers."""
    # Processors of Transformers whose size is a rule pad a batch to its largest image. Models see that padding, and the
    # post-processing stretches it over the image, so only images of one size may go together there.
    image_processor = getattr(processor, "generator", processor)
    image_processor = getattr(image_processor, "image_processor", image_processor)
    return isinstance(image_processor, SegmentationPostProcessing) or bool(dict(image_processor.size).get("height"))
