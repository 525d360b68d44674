"""The loop of every evaluation: each picture is counted once, and counts are kept on disk until the result is there.

Started by `accelerate launch`, each process takes its share of the pictures, by index and without padding, and the
counts are merged at the end; alone it does everything itself. What is counted is `Counts`, in counting.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from accelerate import PartialState
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .partial_results import PartialResults

CHUNK_SIZE = 200  # pictures that an interruption can lose


class Counts(Protocol):
    """What an evaluation counts, and the [place in the data set, image id, score] of the pictures that it is of."""

    @property
    def pictures(self) -> list[list[Any]]:
        """One row for each picture."""

    def state_dict(self) -> dict[str, Any]:
        """Everything counted, `pictures` among it, as plain objects and arrays."""

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add a `state_dict()`."""

    def reset(self) -> None:
        """Forget everything."""

    def merge_across_processes(self) -> None:
        """Make every process of the run hold what all have counted."""


AnyCounts = TypeVar("AnyCounts", bound=Counts)


def count_pictures(
    dataset: Any,
    new_counts: Callable[[], AnyCounts],
    count_batch: Callable[[AnyCounts, list[tuple[int, Any]]], None],
    *,
    batch_size: int = 1,
    num_workers: int = 0,
    partial_folder: Path | None = None,
    about: Mapping[str, Any] | None = None,
    chunk_size: int = CHUNK_SIZE,
    progress: bool = False,
) -> AnyCounts:
    """Count all pictures of a data set; every process of the run must call it, and all get the same counts.

    Args:
        dataset: what is asked for by index, in the processes that read.
        new_counts: makes empty ones.
        count_batch: adds a batch of (place in the data set, entry) to counts.
        batch_size: pictures at a time.
        num_workers: processes that read pictures.
        partial_folder: keep counts here, and go on from those that are there; `None` keeps none. They stay when the
            counts are returned: the caller deletes them once the result is written.
        about: what is evaluated; counts in the folder of something else are an error.
        chunk_size: pictures to count before counts are saved.
        progress: show a progress bar.

    Raises:
        ValueError: a size is below 1, there is no picture, or the folder holds another evaluation.
    """
    if batch_size < 1 or chunk_size < 1:
        raise ValueError(f"batch_size is {batch_size} and chunk_size {chunk_size}; both must be at least 1")
    if not len(dataset):
        raise ValueError("the data set has no pictures; check its split")
    state = PartialState()
    counts, chunk = new_counts(), new_counts()
    saved: list[dict[str, Any]] = []
    partial = None
    if partial_folder is not None:
        partial = PartialResults(partial_folder, {**(about or {}), "pictures": len(dataset)})
        saved = partial.read()
    state.wait_for_everyone()  # before anyone writes what others must not read

    done = {picture[0] for part in saved for picture in part["pictures"]}
    waiting = [index for index in range(len(dataset)) if index not in done]
    if state.is_main_process:
        for part in saved:
            counts.merge(part)
    own = waiting[state.process_index :: state.num_processes]
    loader: DataLoader = DataLoader(
        _Indexed(dataset, own), batch_size=batch_size, num_workers=num_workers, collate_fn=list
    )
    show = progress and state.is_main_process
    with tqdm(total=len(own), unit="picture", disable=None if show else True) as bar:
        for batch in loader:
            count_batch(chunk, batch)
            bar.update(len(batch))
            if len(chunk.pictures) >= chunk_size:
                _move(chunk, counts, partial)
    if chunk.pictures:
        _move(chunk, counts, partial)
    counts.merge_across_processes()
    return counts


def rgb_picture(entry: Mapping[str, Any]) -> Image.Image:
    """The picture of a reader's entry."""
    image = entry["image"]
    return image.convert("RGB") if isinstance(image, Image.Image) else Image.fromarray(image)


def _move(chunk: Counts, counts: Counts, partial: PartialResults | None) -> None:
    """Add a chunk to all counts, save it, and start another."""
    state = chunk.state_dict()
    counts.merge(state)
    if partial is not None:
        partial.save(state)
    chunk.reset()


class _Indexed(Dataset):
    """Some entries of a data set, with their places in it."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, Any]:
        index = self.indices[place]
        return index, self.dataset[index]
