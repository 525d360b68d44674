"""The pipeline: images are read, segmented and written at the same time.

`run_pipeline` takes any iterator of images and yields an `Outcome` for each, in order. Reader threads decode images and
make the model's inputs, the calling thread runs the model, and writer threads turn its outputs into answers and do with
them what the caller wants. Threads suffice, as decoding, PyTorch and compression release the GIL. What is in flight is
bounded by a number of images and of pixels, whatever the length of the iterator.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from ..models.image_claims import FREE_PIXELS, checked_claims
from ..models.image_decoding import image_size
from .memory import available_memory, is_out_of_memory
from .segmented_image import ImageFault, SegmentedImage

Item = TypeVar("Item")

_PREPARED = 2  # batches whose inputs are ready or being made while the model runs
_BYTES_PER_PIXEL = 48  # of an image in flight, see memory.py
_LEAST_PIXELS, _MOST_PIXELS = 16 * 2**20, 512 * 2**20


@dataclass
class Encoded:
    """An image before decoding: its content in any form, and how many pixels it claims to have."""

    content: Any
    pixels: int

    @classmethod
    def of_file(cls, content: bytes, name: str, free_pixels: int = FREE_PIXELS) -> "Encoded":
        """The bytes of a file, whose claims are checked; what takes more than 4 bytes counts as several pixels."""
        claims = checked_claims(content, name, free_pixels)
        return cls(content, 1 if claims is None else claims.width * claims.height * max(claims.bytes_per_pixel, 4) // 4)


@dataclass
class Outcome(Generic[Item]):
    """What became of one image: the value that `finish` returned, or the error that concerns this image alone."""

    item: Item
    value: Any = None
    error: Exception | None = None


@dataclass(frozen=True)
class Steps(Generic[Item]):
    """What is done to an item; all but `name` run in threads.

    Attributes:
        load: gets the content of the image, without decoding it.
        decode: makes upright pixels of it, as `Segmenter` takes them.
        finish: takes the item, its pixels and its answer (with the generator's own before it if `compare`); what it
            returns is the outcome's value. An `ImageFault` is the image's, any other error ends the pipeline.
        name: of the item, for errors.
    """

    load: Callable[[Item], Encoded]
    decode: Callable[[Item, Any], Any]
    finish: Callable[[Item, Any, SegmentedImage, SegmentedImage | None], Any]
    name: Callable[[Item], str]


def default_threads() -> int:
    """Threads for readers, and as many for writers, if the user names no number."""
    return min(4, os.cpu_count() or 1)


def run_pipeline(
    segmenter: Any,
    items: Iterable[Item],
    steps: Steps[Item],
    *,
    batch_size: int = 1,
    workers: int | None = None,
    writers: int | None = None,
    threshold: float | None = None,
    compare: bool = False,
) -> Iterator[Outcome[Item]]:
    """Segment items and yield their outcomes, in order.

    Args:
        segmenter: a `Segmenter`.
        batch_size: images at a time; where the model needs images of one size, those of one size among the next ones.
        workers: reader threads; writers: writer threads; `None`: one for each core, at most 4.
        threshold: score that a segment needs; `None`: the segmenter's.
        compare: also answer with the generator of a fused model alone.

    Raises:
        Exception: what `items` or `finish` raises, after the outcomes of all earlier items.
    """
    threshold = segmenter.default_threshold if threshold is None else threshold
    workers, writers = workers or default_threads(), writers or default_threads()
    with (
        ThreadPoolExecutor(workers, "hf-segvit-reader") as readers,
        ThreadPoolExecutor(writers, "hf-segvit-writer") as finishers,
    ):
        run = _Run(segmenter, iter(items), steps, batch_size, workers, writers, threshold, compare, readers, finishers)
        try:
            yield from run.outcomes()
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            finishers.shutdown(wait=False, cancel_futures=True)


class _Image(Generic[Item]):
    """An item in flight."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.loading: Future[Encoded] | None = None
        self.decoding: Future[Any] | None = None
        self.pixels = 0  # claimed
        self.decoded: Any = None
        self.outcome: Future[Outcome[Item]] = Future()


@dataclass
class _Batch(Generic[Item]):
    images: list[_Image[Item]]
    preparing: "Future[list[Any]]"


class _Run(Generic[Item]):
    """One run of the pipeline; all methods but those given to a pool run in the calling thread."""

    def __init__(
        self,
        segmenter: Any,
        items: Iterator[Item],
        steps: Steps[Item],
        batch_size: int,
        workers: int,
        writers: int,
        threshold: float | None,
        compare: bool,
        readers: ThreadPoolExecutor,
        finishers: ThreadPoolExecutor,
    ) -> None:
        self.segmenter, self.items, self.steps = segmenter, items, steps
        self.batch_size, self.threshold, self.compare = batch_size, threshold, compare
        self.readers, self.finishers = readers, finishers
        self.mixes_sizes = segmenter.mixes_sizes
        # Among so many images, those of one size are looked for.
        self.window = batch_size if self.mixes_sizes or batch_size == 1 else 4 * batch_size
        self.most_images = (_PREPARED + 2) * self.window + workers + 2 * writers
        available = available_memory()
        most = _MOST_PIXELS if available is None else available // (4 * _BYTES_PER_PIXEL)
        self.most_pixels = min(max(most, _LEAST_PIXELS), _MOST_PIXELS)
        self.order: deque[_Image[Item]] = deque()  # all in flight
        self.loading: deque[_Image[Item]] = deque()
        self.decoding: deque[_Image[Item]] = deque()
        self.prepared: deque[_Batch[Item]] = deque()
        self.exhausted = False
        self.error: BaseException | None = None  # of `items`

    def outcomes(self) -> Iterator[Outcome[Item]]:
        while True:
            self._read_ahead()
            if len(self.prepared) < _PREPARED and self._has_window(wait=not self.prepared):
                self._prepare_window()
            elif self.prepared:
                self._infer(self.prepared.popleft())
            elif self.order:
                yield self._next()  # waits
            else:
                break
            while self.order and self.order[0].outcome.done():
                yield self._next()
        if self.error is not None:
            raise self.error

    def _next(self) -> Outcome[Item]:
        outcome = self.order[0].outcome.result()  # raises what ends the pipeline
        self.order.popleft()
        return outcome

    def _read_ahead(self) -> None:
        """Load and decode as many images as may be in flight."""
        while not self.exhausted and len(self.order) < self.most_images:
            try:
                image = _Image(next(self.items))
            except StopIteration:
                self.exhausted = True
                break
            except BaseException as error:  # what was read before it is finished first
                self.exhausted, self.error = True, error
                break
            image.loading = self.readers.submit(self.steps.load, image.item)
            self.order.append(image)
            self.loading.append(image)
        # In order, so that the oldest always fits in and nothing waits for what is behind it. What the model would have
        # to wait for is waited for here.
        while self.loading and (
            self.loading[0].loading.done()  # type: ignore[union-attr]
            or (not self.prepared and len(self.decoding) < self.window)
        ):
            image = self.loading[0]
            try:
                encoded = image.loading.result()  # type: ignore[union-attr]
            except (ValueError, OSError, MemoryError) as error:
                self.loading.popleft()
                self._fail(image, error)
                continue
            others = sum(other.pixels for other in self.order)
            if others and others + encoded.pixels > self.most_pixels:
                return
            self.loading.popleft()
            image.loading, image.pixels = None, max(encoded.pixels, 1)
            image.decoding = self.readers.submit(self.steps.decode, image.item, encoded.content)
            self.decoding.append(image)

    def _has_window(self, wait: bool) -> bool:
        """Whether images for a batch are there; the first window of them is waited for on request."""
        if len(self.decoding) >= self.window:
            return wait or all(image.decoding.done() for image in list(self.decoding)[: self.window])  # type: ignore[union-attr]
        # Fewer only at the end, and where the limits leave no room for more while nothing is being finished.
        is_last = self.exhausted and not self.loading
        is_alone = len(self.order) == len(self.decoding) + len(self.loading)
        return wait and bool(self.decoding) and (is_last or is_alone)

    def _prepare_window(self) -> None:
        """Make batches of the next decoded images, and their inputs."""
        groups: dict[Any, list[_Image[Item]]] = {}
        for _ in range(min(self.window, len(self.decoding))):
            image = self.decoding.popleft()
            try:
                image.decoded = image.decoding.result()  # type: ignore[union-attr]
            except (ValueError, OSError, MemoryError) as error:
                self._fail(image, error)
                continue
            image.decoding = None
            groups.setdefault(None if self.mixes_sizes else image_size(image.decoded), []).append(image)
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                images = group[start : start + self.batch_size]
                preparing = self.readers.submit(self._prepared, [image.decoded for image in images])
                self.prepared.append(_Batch(images, preparing))

    def _prepared(self, images: Sequence[Any]) -> list[Any]:
        with torch.inference_mode():
            return list(self.segmenter.prepare(images))

    def _infer(self, batch: _Batch[Item]) -> None:
        """Run the model on a batch and hand its outputs to a writer."""
        images = batch.images
        try:
            with torch.inference_mode():
                asked = [self.segmenter.infer(each, self.threshold, prune=True) for each in batch.preparing.result()]
        except (ValueError, MemoryError, RuntimeError) as error:
            self._retry(images, error)
            return
        first = 0
        for each in asked:
            count = len(each.sizes)
            self.finishers.submit(self._finish, images[first : first + count], each)
            first += count

    def _retry(self, images: Sequence[_Image[Item]], error: Exception) -> None:
        """Segment the images of a batch one by one, as one bad image must not cost the others."""
        if not is_out_of_memory(error) and not isinstance(error, ValueError):
            raise error
        if len(images) == 1:
            self._fail(images[0], error, by_model=True)
            return
        for image in images:
            self._infer(_Batch([image], self.readers.submit(self._prepared, [image.decoded])))

    def _fail(self, image: _Image[Item], error: BaseException, by_model: bool = False) -> None:
        image.decoded = None
        image.outcome.set_result(Outcome(image.item, error=self._named(image.item, error, by_model)))

    def _named(self, item: Item, error: BaseException, by_model: bool) -> ValueError:
        """The error with the item's name in it."""
        name, text = self.steps.name(item), str(error)
        if is_out_of_memory(error):
            device = self.segmenter.device
            where = f" of {device}" if by_model else ""
            remedy = ", try --dtype bfloat16 or --device cpu" if by_model and device.type != "cpu" else ""
            text = f"the memory{where} does not suffice for it; scale it down, cut it into pieces{remedy}"
        elif text.startswith(name) and isinstance(error, ValueError):
            return error
        return ImageFault(f"{name}: {text}")

    # The following run in writer threads.

    def _finish(self, images: Sequence[_Image[Item]], asked: Any) -> None:
        """Post-process a batch, and finish its images in writers of their own."""
        try:
            answers = self._answers(asked)
        except BaseException as error:
            if not is_out_of_memory(error) and not isinstance(error, ValueError):
                for image in images:
                    image.outcome.set_exception(error)
            elif len(images) == 1:
                self._fail(images[0], error, by_model=True)
            else:
                for image in images:
                    self._finish_alone(image)
            return
        for image, answer in zip(images[1:], answers[1:], strict=True):
            self.finishers.submit(self._finish_one, image, *answer)
        self._finish_one(images[0], *answers[0])

    def _finish_alone(self, image: _Image[Item]) -> None:
        """All of the model's work for an image whose batch could not be post-processed."""
        try:
            with torch.inference_mode():
                [asked] = self._prepared([image.decoded])
                self.segmenter.infer(asked, self.threshold, prune=True)
        except (ValueError, MemoryError, RuntimeError) as error:
            self._fail(image, error, by_model=True)
            return
        self._finish([image], asked)

    def _answers(self, asked: Any) -> Sequence[tuple[SegmentedImage | None, SegmentedImage]]:
        if self.compare:
            return self.segmenter.compared(asked, self.threshold)
        return [(None, answer) for answer in self.segmenter.results(asked, self.threshold)]

    def _finish_one(self, image: _Image[Item], before: SegmentedImage | None, answer: SegmentedImage) -> None:
        decoded, image.decoded = image.decoded, None
        try:
            value = self.steps.finish(image.item, decoded, answer, before)
            image.outcome.set_result(Outcome(image.item, value))
        except (ImageFault, MemoryError) as error:
            self._fail(image, error)
        except BaseException as error:
            image.outcome.set_exception(error)
