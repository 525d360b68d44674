"""Finding the files of a data set, in a folder or in the zip archives that lie in it.

`DataFolder` lists folders and finds files in either form; `safe_name` and `find_named` take the file names that
annotations hold, which may not leave the folder that they belong to. Links on the disk are followed, as their owner
made them; a loop of links ends the walk there.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from .archives import NESTED, Location, open_archive

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_TAR = re.compile(r"\.(tar|tgz|tbz2?|txz|7z|rar)(\.\w+)?$", re.IGNORECASE)


class FileList(dict[str, Location]):
    """Locations by relative name."""

    @cached_property
    def folded_names(self) -> dict[str, str]:
        """Names by their form without case, to find those that differ in nothing else."""
        return {name.casefold(): name for name in self}


class DataFolder:
    """A data set's folder, or a zip archive in its place.

    Args:
        path: of the folder or the archive.
        archives: names of archives to look into where the folder lacks something; `outer.zip::inner.zip` for nested
            ones. Those that are not there are passed over.

    Raises:
        ValueError: there is nothing at the path, or it is an archive that cannot be read in place.
    """

    def __init__(self, path: str | os.PathLike[str], archives: Sequence[str] = ()) -> None:
        self.path = Path(path).expanduser()
        name = str(self.path)
        if not self.path.exists():
            raise ValueError(f"{name}: no such file or folder; check the path (it is read from {Path.cwd()})")
        self.archives: list[str] = []
        self._top_folders: dict[str, str] = {}
        if self.path.is_file():
            if _TAR.search(name) or not name.lower().endswith(".zip"):
                raise ValueError(
                    f"{name}: is no folder and no zip archive; unpack it first (a tar file cannot be read in place, "
                    "and may hold links and devices: unpack it with `tar --no-same-owner` as a normal user)"
                )
            self.archives = [name]
            return
        for archive in archives:
            outer, *inner = archive.split(NESTED)
            if not (self.path / outer).is_file():
                continue
            path = str(self.path / outer)
            for member in inner:
                path = f"{path}{NESTED}{member}" if member in open_archive(path) else ""
            if path:
                self.archives.append(path)

    def files(self, *folders: str, suffixes: Sequence[str] = ()) -> FileList:
        """The files below the first of these folders that exists.

        Args:
            folders: alternatives, relative, with `/`; `""` is the whole.
            suffixes: lower-case endings; others are passed over, hidden files always.

        Returns:
            Locations by path relative to the folder, sorted; nothing where no folder exists.
        """
        for folder in folders:
            found = self._on_disk(folder) or self._in_archives(folder)
            if found:
                return FileList(
                    (name, found[name])
                    for name in sorted(found)
                    if not suffixes or posixpath.splitext(name)[1].lower() in suffixes
                )
        return FileList()

    def file(self, *names: str) -> Location | None:
        """The first of these files that exists; names are relative, with `/`."""
        for name in names:
            path = self.path / name
            if self.path.is_dir() and path.is_file():
                return {"archive": None, "member": str(path)}
            for archive in self.archives:
                for member in (name, f"{self._top_folder(archive)}{name}"):
                    if member in open_archive(archive):
                        return {"archive": archive, "member": member}
        return None

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders directly in a folder, sorted."""
        names = {name.split("/")[0] for name in self._in_archives(folder) if "/" in name}
        path = self.path / folder
        if path.is_dir():
            names |= {entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
        return sorted(names)

    def _on_disk(self, folder: str) -> dict[str, Location]:
        top = self.path / folder
        if not top.is_dir():
            return {}
        found: dict[str, Location] = {}
        pending, seen = [(str(top), "")], set[tuple[int, int]]()
        while pending:
            path, prefix = pending.pop()
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            try:
                entries = list(os.scandir(path))
            except OSError as error:
                raise ValueError(f"{path}: cannot be listed ({error.strerror}); check its permissions") from error
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    pending.append((entry.path, f"{prefix}{entry.name}/"))
                else:
                    found[prefix + entry.name] = {"archive": None, "member": entry.path}
        return found

    def _in_archives(self, folder: str) -> dict[str, Location]:
        prefix = f"{folder}/" if folder else ""
        for archive in self.archives:
            found = _below(archive, prefix)
            if not found and (top := self._top_folder(archive)):
                found = _below(archive, top + prefix)
            if found:
                return found
        return {}

    def _top_folder(self, archive: str) -> str:
        """`NAME/` if all that an archive holds lies in one folder, as some zip tools wrap it; otherwise ""."""
        if archive not in self._top_folders:
            names = {name.partition("/")[::2] for name in open_archive(archive) if not _is_hidden(name)}
            tops = {top for top, _ in names}
            self._top_folders[archive] = f"{tops.pop()}/" if len(tops) == 1 and all(rest for _, rest in names) else ""
        return self._top_folders[archive]


def safe_name(text: object, where: str) -> str:
    """A file name out of an annotation, as a relative path with `/` that stays below its folder.

    Backslashes are read as `/`.

    Args:
        text: what the annotation says.
        where: file and item, for errors.

    Raises:
        ValueError: no text, an absolute path, or one that leaves its folder.
    """
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise ValueError(f"{where}: the file name is {text!r}; it must be a relative path")
    name = text.replace("\\", "/")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
        raise ValueError(
            f"{where}: the file name {text!r} is absolute or leaves its folder; file names in annotations are relative "
            "to the folder of images"
        )
    return posixpath.normpath(name)


def find_named(files: FileList, text: object, where: str) -> Location:
    """The file that an annotation names.

    Args:
        files: what there is, as `DataFolder.files` lists it.
        text: what the annotation says.
        where: file and item, for errors.

    Raises:
        ValueError: the name is unsafe, or there is no such file; one that differs only in case is named.
    """
    name = safe_name(text, where)
    if name in files:
        return files[name]
    alike = files.folded_names.get(name.casefold())
    hint = f"there is {alike!r}, which differs in case: rename one" if alike else "copy it there, or remove its entry"
    raise ValueError(f"{where}: there is no file {name!r}; {hint}")


def by_stem(files: Mapping[str, Location]) -> dict[str, Location]:
    """Locations by path without ending.

    Raises:
        ValueError: two files differ only in their ending, so that it is unclear which belongs to an annotation.
    """
    found: dict[str, Location] = {}
    for name, location in files.items():
        stem = posixpath.splitext(name)[0]
        if stem in found:
            raise ValueError(
                f"{location['member']}: another file has the same name but for its ending; annotations are found by "
                "the rest of the name, so keep one of the two"
            )
        found[stem] = location
    return found


def _below(archive: str, prefix: str) -> dict[str, Location]:
    """Locations in an archive by their names behind a prefix."""
    return {
        name[len(prefix) :]: {"archive": archive, "member": name}
        for name in open_archive(archive)
        if name.startswith(prefix) and not _is_hidden(name)
    }


def _is_hidden(name: str) -> bool:
    return name.startswith("__MACOSX/") or "/." in f"/{name}"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False
