"""Finding the pictures that a command line means, and naming the results of each.

`find_pictures` expands files, folders (with all below them) and quoted globs; `output_names` gives every picture a name
of its own, so that `a.jpg` and `a.png` do not overwrite each other's results.
"""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# Pictures that this package writes; a folder that holds them too is not segmented twice.
RESULT_ENDINGS = (".overlay.png", ".comparison.png", ".panoptic.png", ".semantic.png")


@dataclass(frozen=True)
class PictureFile:
    """A picture that was asked for.

    Attributes:
        path: where it is.
        place: its path below the folder that was named, or its file name: what results are named after.
    """

    path: Path
    place: PurePosixPath


def find_pictures(patterns: Iterable[str]) -> tuple[list[PictureFile], list[str]]:
    """The pictures that files, folders and globs mean.

    Args:
        patterns: paths of files, taken whatever their ending; of folders, searched with all below them; and globs
            (`*`, `?`, `[...]`, `**` for folders at any depth). Of folders and globs only names that end like pictures
            count, but not `RESULT_ENDINGS`.

    Returns:
        The pictures, each once, sorted within a folder or glob; and the patterns that mean none.
    """
    found: dict[str, PictureFile] = {}
    empty = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_file():
            pictures = [PictureFile(path, PurePosixPath(path.name))]
        elif path.is_dir():
            pictures = [
                PictureFile(file, PurePosixPath(file.relative_to(path).as_posix()))
                for file in sorted(path.rglob("*"))
                if _is_picture(file)
            ]
        else:
            matches = sorted(glob.glob(str(path), recursive=True))
            pictures = [PictureFile(file, PurePosixPath(file.name)) for file in map(Path, matches) if _is_picture(file)]
        if not pictures:
            empty.append(pattern)
        for picture in pictures:
            found.setdefault(os.path.realpath(picture.path), picture)
    return list(found.values()), empty


def output_names(places: Sequence[PurePosixPath]) -> list[str]:
    """A name for the results of each picture, all different on every file system.

    Args:
        places: paths of pictures relative to where results go; folders are kept.

    Returns:
        The path without its ending; with it, where several pictures share the rest; and with a number, where they
        share even that.
    """
    stems = Counter(str(place.with_suffix("")).casefold() for place in places)
    names: list[str] = []
    taken: set[str] = set()
    for place in places:
        stem = str(place.with_suffix(""))
        wanted = stem if stems[stem.casefold()] == 1 else str(place)
        name, number = wanted, 2
        while name.casefold() in taken:
            name, number = f"{wanted}-{number}", number + 1
        taken.add(name.casefold())
        names.append(name)
    return names


def _is_picture(path: Path) -> bool:
    name = path.name.lower()
    return name.endswith(PICTURE_SUFFIXES) and not name.endswith(RESULT_ENDINGS) and path.is_file()
