"""Finding the images that a command line means, and naming the results of each.

`find_images` expands files, folders (with all below them) and quoted globs; `output_names` gives every image a name
of its own, so that `a.jpg` and `a.png` do not overwrite each other's results.
"""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..data.folders import IMAGE_SUFFIXES

# Images that this package writes; a folder that holds them too is not segmented twice.
RESULT_ENDINGS = (".overlay.png", ".comparison.png", ".panoptic.png", ".semantic.png")


@dataclass(frozen=True)
class ImageFile:
    """An image that was asked for.

    Attributes:
        path: where it is.
        relative_path: below the folder that was named, or its file name: what results are named after.
    """

    path: Path
    relative_path: PurePosixPath


def find_images(patterns: Iterable[str]) -> tuple[list[ImageFile], list[str]]:
    """The images that files, folders and globs mean.

    Args:
        patterns: paths of files, taken whatever their ending; of folders, searched with all below them; and globs
            (`*`, `?`, `[...]`, `**` for folders at any depth). Of folders and globs only names that end like images
            count, but not `RESULT_ENDINGS`.

    Returns:
        The images, each once, sorted within a folder or glob; and the patterns that mean none.
    """
    found: dict[str, ImageFile] = {}
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
            found.setdefault(os.path.realpath(image.path), image)
    return list(found.values()), empty


def output_names(paths: Sequence[PurePosixPath]) -> list[str]:
    """A name for the results of each image, all different on every file system.

    Args:
        paths: paths of images relative to where results go; folders are kept.

    Returns:
        The path without its ending; with it, where several images share the rest; and with a number, where they
        share even that.
    """
    stems = Counter(str(path.with_suffix("")).casefold() for path in paths)
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        stem = str(path.with_suffix(""))
        wanted = stem if stems[stem.casefold()] == 1 else str(path)
        name, number = wanted, 2
        while name.casefold() in taken:
            name, number = f"{wanted}-{number}", number + 1
        taken.add(name.casefold())
        names.append(name)
    return names


def _is_image(path: Path) -> bool:
    name = path.name.lower()
    return name.endswith(IMAGE_SUFFIXES) and not name.endswith(RESULT_ENDINGS) and path.is_file()
