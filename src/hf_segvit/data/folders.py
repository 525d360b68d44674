"""Find the files of a data set in its folder or in zip archives.

`DataFolder` lists folders and finds files in either. `safe_name` and `find_named` resolve the file names in
annotations, which may not leave the folder that they belong to; `find_elsewhere` takes the bare file name of a path or
URL that was right only where it was exported.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

from .annotation_values import shown
from .archives import NESTED, Location, note_path, open_archive

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_TAR = re.compile(r"\.(tar|tgz|tbz2?|txz|7z|rar)(\.\w+)?$", re.IGNORECASE)


class FileList(dict[str, Location]):
    """Locations by relative name."""

    @cached_property
    def folded_names(self) -> dict[str, str]:
        """Names by case-folded name, to find names that differ only in case."""
        return {name.casefold(): name for name in self}

    @cached_property
    def by_bare_name(self) -> dict[str, list[str]]:
        """Names by their last part, one name per file."""
        # A file may be listed under two names; the later one is relative to the folder of images.
        by_file = {(location["archive"], location["member"]): name for name, location in self.items()}
        names: dict[str, list[str]] = {}
        for name in by_file.values():
            names.setdefault(posixpath.basename(name), []).append(name)
        return names

    @cached_property
    def inner_folders(self) -> set[str]:
        """Folders that directly hold a file."""
        return {posixpath.dirname(name) for name in self}


def data_path(path: str | os.PathLike[str]) -> Path:
    """A path that a user gave, with `~` replaced.

    Raises:
        ValueError: it can be no path, or names the home of a user that is not known.
    """
    if "\0" in str(path) or any("\ud800" <= character <= "\udfff" for character in str(path)):
        raise ValueError(f"{str(path)!r} is no path; check it")
    try:
        return Path(path).expanduser()
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{path}: there is no such user's home ({error}); give the whole path") from error


def path_exists(path: str | os.PathLike[str]) -> bool:
    """Whether a file or folder is at a path that a user gave."""
    try:
        return data_path(path).exists()
    except OSError:  # longer than the system allows, or in a folder that may not be read
        return False


class DataFolder:
    """A data set's folder, or a zip archive in its place.

    Args:
        archives: names of archives in which to look for what the folder lacks, `outer.zip::inner.zip` for nested ones;
            missing ones are ignored.

    Raises:
        ValueError: nothing exists at the path, or it is an archive that cannot be read in place.
    """

    def __init__(self, path: str | os.PathLike[str], archives: Sequence[str] = ()) -> None:
        self.path = data_path(path)
        name = str(self.path)
        note_path(self.path)
        if not path_exists(path):
            raise ValueError(
                f"{name[:300]}: no such file or folder; check the path (relative ones start at {Path.cwd()})"
            )
        self.archives: list[str] = []
        self._top_folders: dict[str, str] = {}
        if self.path.is_file():
            if _TAR.search(name) or not name.lower().endswith(".zip"):
                raise ValueError(
                    f"{name}: neither a folder nor a zip archive; unpack it first (a tar file cannot be read in place, "
                    "and may hold links and devices: unpack it with `tar --no-same-owner` as a normal user)"
                )
            self.archives = [name]
            return
        for archive in archives:
            outer, *inner = archive.split(NESTED)
            note_path(self.path / outer)
            if not (self.path / outer).is_file():
                continue
            path = str(self.path / outer)
            for member in inner:
                path = f"{path}{NESTED}{member}" if member in open_archive(path) else ""
            if path:
                self.archives.append(path)

    def files(self, *folders: str, suffixes: Sequence[str] = ()) -> FileList:
        """Files below the first of these folders that has any, by path relative to it, sorted; no hidden ones.

        Args:
            folders: alternatives, relative, with `/`; `""` is the whole data set.
            suffixes: lower-case endings to keep; by default all.
        """
        for folder in folders:
            for locations in (self._on_disk(folder), *self._in_archives(folder)):
                kept = [name for name in locations if not suffixes or posixpath.splitext(name)[1].lower() in suffixes]
                if kept:
                    # Sorted: the order of a listing depends on the file system, and rows must not.
                    return FileList((name, locations[name]) for name in sorted(kept))
        return FileList()

    def names(self, folder: str = "", suffix: str = "") -> list[str]:
        """Names of the files directly in a folder, sorted; no hidden ones."""
        prefix = f"{folder}/" if folder else ""
        names = {name for archive in self.archives for name in _below(archive, prefix) if "/" not in name}
        path = self.path / folder
        note_path(path)
        if path.is_dir():
            # The ending first: a folder may hold a hundred thousand images.
            entries = [entry for entry in os.scandir(path) if entry.name.lower().endswith(suffix)]
            names |= {entry.name for entry in entries if not entry.name.startswith(".") and not _is_folder(entry)}
        return sorted(name for name in names if name.lower().endswith(suffix))

    def file(self, *names: str) -> Location | None:
        """The first of these files that exists; names are relative, with `/`."""
        for name in names:
            path = self.path / name
            note_path(path)
            if self.path.is_dir() and path.is_file():
                return {"archive": None, "member": str(path)}
            for archive in self.archives:
                for member in (name, f"{self._top_folder(archive)}{name}"):
                    if member in open_archive(archive):
                        return {"archive": archive, "member": member}
        return None

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders directly in a folder, sorted."""
        inside = next(iter(self._in_archives(folder)), {})
        names = {name.split("/")[0] for name in inside if "/" in name}
        path = self.path / folder
        note_path(path)
        if path.is_dir():
            names |= {entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
        return sorted(names)

    def _on_disk(self, folder: str) -> dict[str, Location]:
        top = self.path / folder
        note_path(top)
        if not top.is_dir():
            return {}
        locations: dict[str, Location] = {}
        pending, visited = [(str(top), "")], set[tuple[int, int]]()
        while pending:
            path, prefix = pending.pop()
            note_path(path)
            # Links are followed, since their owner made them; device and inode end the walk at a loop of links.
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            try:
                entries = list(os.scandir(path))
            except OSError as error:
                raise ValueError(f"{path}: cannot be listed ({error.strerror}); check its permissions") from error
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if not entry.name.isprintable() and "\ufffd" in os.fsencode(entry.name).decode("utf-8", "replace"):
                    raise ValueError(f"{path}: the file name {entry.name!r} is not UTF-8; rename the file")
                if _is_folder(entry):
                    pending.append((entry.path, f"{prefix}{entry.name}/"))
                else:
                    locations[prefix + entry.name] = {"archive": None, "member": entry.path}
        return locations

    def _in_archives(self, folder: str) -> Iterator[dict[str, Location]]:
        """Locations below a folder in each archive that has it."""
        prefix = f"{folder}/" if folder else ""
        for archive in self.archives:
            locations = _below(archive, prefix)
            if not locations and (top := self._top_folder(archive)):
                locations = _below(archive, top + prefix)
            if locations:
                yield locations

    def _top_folder(self, archive: str) -> str:
        """`NAME/` if everything in an archive is inside one folder, as some zip tools do; otherwise ""."""
        if archive not in self._top_folders:
            names = {name.partition("/")[::2] for name in open_archive(archive) if not _is_hidden(name)}
            tops = {top for top, _ in names}
            self._top_folders[archive] = f"{tops.pop()}/" if len(tops) == 1 and all(rest for _, rest in names) else ""
        return self._top_folders[archive]


def safe_name(text: object, where: str) -> str:
    """A file name from an annotation, as a relative path with `/`; `where` names file and item for error messages.

    Raises:
        ValueError: not text, an absolute path, or one that leaves its folder.
    """
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise ValueError(f"{where}: the file name is {shown(text)}; it must be a relative path")
    name = text.replace("\\", "/")  # tools on Windows write backslashes
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
        raise ValueError(
            f"{where}: the file name {shown(text)} is absolute or leaves its folder; file names in annotations are "
            "relative to the folder of images"
        )
    return posixpath.normpath(name)


def find_named(files: FileList, text: object, where: str) -> Location:
    """The file of `files` that an annotation names; arguments as in `safe_name`.

    Raises:
        ValueError: the name is unsafe, or there is no such file.
    """
    if isinstance(text, str) and text in files:  # what a listing has is safe
        return files[text]
    name = safe_name(text, where)
    if name in files:
        return files[name]
    # The usual cause on Linux of a data set that was made on Windows or macOS, which ignore case.
    alike = files.folded_names.get(name.casefold())
    hint = f"there is {alike!r}, which differs in case: rename one" if alike else "copy it there, or remove its entry"
    raise ValueError(f"{where}: there is no file {shown(name)}; {hint}")


def find_elsewhere(files: FileList, text: object) -> Location | None:
    """The one file that a path or URL of another machine means, by its last parts; `None` if that is unclear.

    Labelling tools export the path in their own storage: `../../media/upload/4/ab12cd34-cat.jpg`, `s3://bucket/cat.jpg`
    or `/data/local-files/?d=cats/cat.jpg`.
    """
    if not isinstance(text, str) or "\0" in text:
        return None
    path = text.replace("\\", "/").strip()
    folder = posixpath.dirname(path)
    # If its folder is here and the file is not in it, another file of the same name is another image.
    is_missing = bool(folder) and folder in files.inner_folders
    unquoted = unquote(path)
    for variant in dict.fromkeys((path, path.split("?")[0], path.rpartition("=")[2], unquoted, unquoted.split("?")[0])):
        parts = variant.split("/")
        # Label Studio puts eight hexadecimal digits before the name of an uploaded file.
        without_digits = re.sub(r"^[0-9a-f]{8}-", "", parts[-1])
        for bare in dict.fromkeys((parts[-1], without_digits)):
            alike = [] if is_missing and bare == parts[-1] else files.by_bare_name.get(bare, [])
            ends = [_common_end([*parts[:-1], bare], name.split("/")) for name in alike]
            if alike and ends.count(max(ends)) == 1:
                return files[alike[ends.index(max(ends))]]
    return None


def _common_end(one: Sequence[str], two: Sequence[str]) -> int:
    """How many parts at the end two paths share."""
    count = 0
    for first, second in zip(reversed(one), reversed(two), strict=False):
        if first != second:
            break
        count += 1
    return count


def by_stem(files: Mapping[str, Location]) -> dict[str, Location]:
    """Locations by path without suffix.

    Raises:
        ValueError: two files differ only in their suffix, so that it is unclear which one an annotation belongs to.
    """
    locations: dict[str, Location] = {}
    for name, location in files.items():
        stem = posixpath.splitext(name)[0]
        if stem in locations:
            raise ValueError(
                f"{location['member']}: another file has the same name but for its ending; annotations are found by "
                "the rest of the name, so keep one of the two"
            )
        locations[stem] = location
    return locations


def _below(archive: str, prefix: str) -> dict[str, Location]:
    """Locations in an archive by their names after a prefix."""
    return {
        name[len(prefix) :]: {"archive": archive, "member": name}
        for name in open_archive(archive)
        if name.startswith(prefix) and not _is_hidden(name)
    }


def _is_hidden(name: str) -> bool:
    # macOS adds a folder of resource forks to its zip archives.
    return name.startswith("__MACOSX/") or "/." in f"/{name}"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points to itself
        return False
