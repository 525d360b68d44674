"""Find the images that a command line names, and name their results.

`find_images` expands files, folders (recursively), quoted globs, lists and containers, `pages_of` files of several
pages; `output_names` gives every image a unique name, so that `a.jpg` and `a.png` do not overwrite each other's
results.
"""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ..data.folders import IMAGE_SUFFIXES
from .containers import (
    CONTAINER_SUFFIXES,
    DATASET_PREFIX,
    VIDEO_SUFFIXES,
    is_container,
    is_video,
    member_name,
    members_of,
    read_member,
)

# Images that this package writes: running twice on one folder must not segment its own results.
RESULT_ENDINGS = (".overlay.png", ".overlay.jpg", ".comparison.png", ".panoptic.png", ".semantic.png")

# File systems take 255 bytes; the longest endings and a number need the rest.
_MOST_BYTES = 200
_LONGEST_LINE = 10_000  # characters of a path in a list


@dataclass(frozen=True)
class ImageFile:
    """An image that was asked for; `relative_path`, below the folder that was named, names its results."""

    path: Path
    relative_path: PurePosixPath
    page: int = 0  # of a TIFF of several pages, or an animation
    member: Any = None  # of a container, see containers.py; of a video the index of the frame

    @property
    def name(self) -> str:
        """The path, and which page or member of it, for messages."""
        inside = ""
        if self.member is not None:
            inside = f", frame {self.member}" if is_video(self.path) else f"/{member_name(self.member)}"
        return f"{self.path}{inside}, page {self.page + 1}" if self.page else f"{self.path}{inside}"

    def read(self) -> Any:
        """The content of the file, or of the member of its container; a ValueError if it cannot be read."""
        from ..models.image_files import read_content

        content = self.path if self.member is None else read_member(str(self.path), self.member)
        return read_content(content, self.name)

    @property
    def source(self) -> str:
        """What a job knows the image by: its absolute path, and page."""
        path = str(self.path) if str(self.path).startswith(DATASET_PREFIX) else os.path.abspath(self.path)
        path += "" if self.member is None else f"#{member_name(self.member)}"
        return f"{path}#page={self.page + 1}" if self.page else path

    def version(self) -> str:
        """Size and time of the file, which differ once it has been changed; "" if it is not there."""
        try:
            status = os.stat(self.path)
        except (OSError, ValueError):
            return ""
        return f"{status.st_size}-{status.st_mtime_ns}"


def pages_of(file: ImageFile) -> list[ImageFile]:
    """The pages of a file; what is no image, or has one page, stays as it is."""
    # These import PyTorch, which the command line does not need for --help.
    from ..models.image_claims import FREE_FOR_INFERENCE
    from ..models.image_files import count_pages

    if file.member is not None:
        return [file]
    return [replace(file, page=page) for page in range(count_pages(file.path, FREE_FOR_INFERENCE))]


def find_images(patterns: Iterable[str], stdin: IO[str] | None = None) -> tuple[list[ImageFile], list[str]]:
    """The images that files, folders, globs, lists and containers mean, each once, and the patterns that mean none.

    Files are taken whatever their ending. Of folders and globs (`*`, `?`, `[...]`, `**`) only names that end like
    images count, but not `RESULT_ENDINGS`; and in globs that end like a container or video, those. `@FILE` is a list
    of patterns, one a line, and `-` such a list from `stdin`.

    Raises:
        ValueError: a list or container cannot be read.
    """
    by_source: dict[Any, ImageFile] = {}
    empty = []
    for pattern in _listed(patterns, stdin):
        path = Path(pattern).expanduser()
        if pattern.startswith(DATASET_PREFIX):
            images = _in_container(pattern)
        elif path.is_file():
            images = _in_file(path)
        elif path.is_dir():
            images = [
                ImageFile(file, PurePosixPath(file.relative_to(path).as_posix()))
                for file in sorted(path.rglob("*"))
                if _is_image(file)
            ]
        else:
            matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
            # Of archives and videos only where the pattern asks for them: a folder of images may hold some, too.
            if pattern.lower().endswith((*CONTAINER_SUFFIXES, *VIDEO_SUFFIXES)):
                images = [image for file in matches if file.is_file() for image in _in_file(file)]
            else:
                images = [ImageFile(file, PurePosixPath(file.name)) for file in matches if _is_image(file)]
        if not images:
            empty.append(pattern)
        for image in images:  # two patterns may mean one file
            by_source.setdefault((os.path.realpath(image.path), image.member), image)
    return list(by_source.values()), empty


def _listed(patterns: Iterable[str], stdin: IO[str] | None) -> Iterator[str]:
    """The patterns, with those of lists in the place of the lists."""
    for pattern in patterns:
        if pattern == "-" and stdin is not None:
            yield from _lines(stdin, "-")
        elif pattern.startswith("@") and not Path(pattern).exists():
            try:
                with open(Path(pattern[1:]).expanduser(), encoding="utf-8", errors="surrogateescape") as file:
                    yield from _lines(file, pattern)
            except OSError as error:
                raise ValueError(f"{pattern}: the list cannot be read ({error.strerror or error})") from error
        else:
            yield pattern


def _lines(file: IO[str], name: str) -> Iterator[str]:
    for line in file:
        if "\0" in line or len(line) > _LONGEST_LINE:
            raise ValueError(f"{name}: no list of paths, one a line; give images without the @")
        if line.strip():
            yield line.rstrip("\r\n")


def _in_file(path: Path) -> list[ImageFile]:
    """A file, or the images in it."""
    return _in_container(str(path)) if is_container(path.name) else [ImageFile(path, PurePosixPath(path.name))]


def _in_container(path: str) -> list[ImageFile]:
    return [ImageFile(Path(path), relative_path, member=member) for member, relative_path in members_of(path)]


def output_names(paths: Sequence[PurePosixPath]) -> list[str]:
    """Unique names for results: the path without its ending; with it, or also a number, if several images share it."""
    # Names are compared without case, as some file systems do.
    stems = Counter(str(path.with_suffix("")).casefold() for path in paths)
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        stem = str(path.with_suffix(""))
        wanted = _shortened(stem if stems[stem.casefold()] == 1 else str(path))
        name, number = wanted, 2
        while name.casefold() in taken:
            name, number = f"{wanted}-{number}", number + 1
        taken.add(name.casefold())
        names.append(name)
    return names


def is_shortened(path: PurePosixPath, name: str) -> bool:
    """Whether the name of an image's results had to be shortened."""
    return not name.startswith(str(path.with_suffix("")))


def _shortened(name: str) -> str:
    """A name that file systems take with the endings of results; a long one is cut and ends in a hash of it."""
    folder, separator, last = name.rpartition("/")
    content = os.fsencode(last)
    if len(content) <= _MOST_BYTES:
        return name
    mark = hashlib.sha256(os.fsencode(name)).hexdigest()[:10]
    kept = content[: _MOST_BYTES - len(mark) - 1].decode("utf-8", "ignore")  # a cut character is dropped
    return f"{folder}{separator}{kept}-{mark}"


def _is_image(path: Path) -> bool:
    name = path.name.lower()
    return name.endswith(IMAGE_SUFFIXES) and not name.endswith(RESULT_ENDINGS) and path.is_file()
