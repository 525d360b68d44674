"""Find the images that a command line names, and name their results.

`find_images` expands files, folders (recursively) and quoted globs, `pages_of` files of several pages; `output_names`
gives every image a unique name, so that `a.jpg` and `a.png` do not overwrite each other's results.
"""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ..data.folders import IMAGE_SUFFIXES

# Images that this package writes: running twice on one folder must not segment its own results.
RESULT_ENDINGS = (".overlay.png", ".comparison.png", ".panoptic.png", ".semantic.png")

# File systems take 255 bytes; the longest endings and a number need the rest.
_MOST_BYTES = 200


@dataclass(frozen=True)
class ImageFile:
    """An image that was asked for; `relative_path`, below the folder that was named, names its results."""

    path: Path
    relative_path: PurePosixPath
    page: int = 0  # of a TIFF of several pages, or an animation

    @property
    def name(self) -> str:
        """The path, and which page of it, for messages."""
        return f"{self.path}, page {self.page + 1}" if self.page else str(self.path)


def pages_of(file: ImageFile) -> list[ImageFile]:
    """The pages of a file; what is no image, or has one page, stays as it is."""
    # These import PyTorch, which the command line does not need for --help.
    from ..models.image_claims import FREE_FOR_INFERENCE
    from ..models.image_files import count_pages

    return [replace(file, page=page) for page in range(count_pages(file.path, FREE_FOR_INFERENCE))]


def find_images(patterns: Iterable[str]) -> tuple[list[ImageFile], list[str]]:
    """The images that files, folders and globs mean, each once, and the patterns that mean none.

    Files are taken whatever their ending. Of folders and globs (`*`, `?`, `[...]`, `**`) only names that end like
    images count, but not `RESULT_ENDINGS`.
    """
    by_real_path: dict[str, ImageFile] = {}
    empty = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_file():
            images = [ImageFile(path, PurePosixPath(path.name))]
        elif path.is_dir():
            images = [
                ImageFile(file, PurePosixPath(file.relative_to(path).as_posix()))
                for file in sorted(path.rglob("*"))
                if _is_image(file)
            ]
        else:
            matches = sorted(glob.glob(str(path), recursive=True))
            images = [ImageFile(file, PurePosixPath(file.name)) for file in map(Path, matches) if _is_image(file)]
        if not images:
            empty.append(pattern)
        for image in images:
            by_real_path.setdefault(os.path.realpath(image.path), image)  # two patterns may mean one file
    return list(by_real_path.values()), empty


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
