"""Segment files in bulk: from image files to the files of an output folder, through the pipeline.

`segment_files` is what `hf-segvit segment` runs: it skips what its job knows as complete, writes the chosen files of
each image, and notes in the job what has become of it.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..models.image_claims import FREE_FOR_INFERENCE
from ..models.image_decoding import image_size, open_image, to_pixels
from ..models.image_values import ImageSettings
from .containers import frames_of, is_video
from .exports import FOLDER_EXPORTS, row_of, write_image_exports
from .input_files import ImageFile, pages_of
from .jobs import Job
from .output_files import changes_text, label_changes, remark, write_segment_files
from .pipeline import Encoded, Outcome, Steps, run_pipeline
from .segmented_image import ImageFault, OutputChoice, SegmentedImage
from .segmenter import Segmenter

_PAGES_AHEAD = 32  # files whose pages are counted before they are needed


@dataclass(frozen=True)
class Work:
    """An image and the name of its results, below the output folder; `frame` is one that is decoded already."""

    file: ImageFile
    name: str
    frame: Any = None


@dataclass
class Done:
    """What a user should know about an image that is done; `row` is for the job.

    Attributes:
        remark: why it has no segments, or as many as there may be; else "".
        changes: with a comparison, the labels that changed.
    """

    version: str
    remark: str = ""
    changes: str | None = None
    row: dict[str, Any] = field(default_factory=dict)


def with_pages(
    files: Iterable[tuple[ImageFile, str]],
    counted: Callable[[ImageFile, int], None],
    failed: Callable[[ValueError], None],
    every: int = 1,
) -> Iterator[Work]:
    """The pages and frames of files and the names of their results.

    Args:
        files: with the names of their results. They are looked into in threads, a few ahead of the reader.
        counted: hears of files with several pages or frames, frames one by one.
        failed: hears of a video that breaks off, after the frames before.
        every: takes every n-th frame of a video.
    """
    ahead: deque[tuple[ImageFile, str, Future[list[ImageFile]]]] = deque()

    def works(file: ImageFile, name: str, counting: "Future[list[ImageFile]]") -> Iterator[Work]:
        if is_video(file.path) and file.member is None:
            number = 0
            try:
                for number, (index, frame) in enumerate(frames_of(file.path, every), start=1):
                    if number > 1:
                        counted(file, 2)
                    yield Work(replace(file, member=index), f"{name}.frame-{index:06}", frame)
            except ValueError as error:
                counted(file, 2 if number else 1)
                failed(error)
            return
        pages = counting.result()
        if len(pages) > 1:
            counted(file, len(pages))
        for page in pages:
            yield Work(page, f"{name}.page-{page.page + 1}" if page.page else name)

    with ThreadPoolExecutor(2, "hf-segvit-pages") as pool:
        try:
            for file, name in files:
                ahead.append((file, name, pool.submit(pages_of, file)))
                if len(ahead) > _PAGES_AHEAD:
                    yield from works(*ahead.popleft())
            while ahead:
                yield from works(*ahead.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def segment_files(
    segmenter: Segmenter,
    work: Iterable[Work],
    folder: Path,
    *,
    about: dict[str, Any],
    choice: OutputChoice,
    image_settings: ImageSettings,
    job: Job,
    compare: bool = False,
    batch_size: int = 1,
    workers: int | None = None,
    writers: int | None = None,
) -> Iterator[Outcome[Work]]:
    """Segment images and write their files into `folder`; yields an `Outcome` for each, whose value is `Done`.

    Args:
        about: what the JSON files say of the model.
        image_settings: how files become pixels.
        job: gets a line for each image, once its files are in place.

    Raises:
        ValueError: a file cannot be written, for instance since the disk is full.
    """
    versions: dict[str, str] = {}
    whole = bool(choice.kinds and choice.kinds & set(FOLDER_EXPORTS))

    def load(each: Work) -> Encoded:
        version = each.file.version()
        if each.frame is not None:
            versions[each.file.source] = version
            return Encoded(each.frame, each.frame.width * each.frame.height)
        content = each.file.read()
        if each.file.version() != version:
            raise ImageFault(f"{each.file.name}: changed while it was read; segment it again")
        versions[each.file.source] = version
        return Encoded.of_file(content, each.file.name, FREE_FOR_INFERENCE)

    def decode(each: Work, content: Any) -> Any:
        if each.frame is not None:
            return to_pixels(content, each.file.name, replace(image_settings, bands=None))
        return open_image(content, each.file.name, image_settings, each.file.page, FREE_FOR_INFERENCE)

    def finish(each: Work, image: Any, answer: SegmentedImage, before: SegmentedImage | None) -> Done:
        facts = {**about, "picture": each.file.name}
        write_segment_files(folder / each.name, image, answer, segmenter.id2label, facts, before, choice)
        done = Done(versions[each.file.source], remark(answer, segmenter.default_threshold))
        if before is not None:
            done.changes = changes_text(label_changes(before, answer), math.prod(image_size(image)))
        if choice.kinds:
            drawn = replace(answer, image=image, source=str(each.file.relative_path))
            write_image_exports(choice.kinds, folder, each.name, drawn)
        done.row = row_of(each.name, each.file.name, answer, whole)
        return done

    outcomes = run_pipeline(
        segmenter,
        work,
        Steps(load, decode, finish, lambda each: each.file.name),
        batch_size=batch_size,
        workers=workers,
        writers=writers,
        compare=compare,
    )
    for outcome in outcomes:
        source = outcome.item.file.source
        versions.pop(source, None)
        if outcome.error is None:
            job.record(source, outcome.value.version, outcome.value.row)
        else:
            job.record_failure(source, str(outcome.error))
        yield outcome
