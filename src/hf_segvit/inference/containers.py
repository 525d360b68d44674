"""Images inside of zip and tar archives, Parquet files, data sets and videos, read in place.

`members_of` lists the images of a container and `read_member` reads one, from any thread. Nothing is unpacked to disk,
and nothing is trusted: names that leave the archive, members that reach beyond its end and sizes above limits are
refused. `frames_of` decodes a video in order.
"""

import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ..data.archives import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, open_archive
from ..data.folders import IMAGE_SUFFIXES

CONTAINER_SUFFIXES = (".zip", ".tar", ".parquet")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
DATASET_PREFIX = "dataset:"

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "bytes", "content")
_PATH_COLUMNS = ("path", "file", "file_name", "filename", "image_path", "image")
_ROW_GROUPS = 2  # of all Parquet files, in memory


def is_container(name: str) -> bool:
    """Whether a name is that of an archive, table or data set with images."""
    return name.startswith(DATASET_PREFIX) or name.lower().endswith(CONTAINER_SUFFIXES)


def is_video(path: Path) -> bool:
    """Whether a path ends like that of a video."""
    return path.name.lower().endswith(VIDEO_SUFFIXES)


def members_of(path: str) -> list[tuple[Any, PurePosixPath]]:
    """The images of a container: what `read_member` takes, and the path that names their results.

    Raises:
        ValueError: it cannot be read, is unsafe, ends early, or has no column of images.
    """
    if path.startswith(DATASET_PREFIX):
        dataset, _ = _dataset(path)
        stem = path.removeprefix(DATASET_PREFIX).replace("@", "-").strip("/.").rpartition("/")[2]
        return [(row, PurePosixPath(stem, f"row-{row:08}")) for row in range(len(dataset))]
    stem, suffix = Path(path).stem, Path(path).suffix.lower()
    if suffix == ".zip":
        names = [name for name in open_archive(path) if _is_image(name)]
        return [(name, PurePosixPath(stem, name)) for name in names]
    if suffix == ".tar":
        return [(member, PurePosixPath(stem, member[0])) for member in _tar_members(path)]
    return _table(path).members(stem)


def read_member(path: str, member: Any) -> Any:
    """The bytes of a member's file (of a data set perhaps the path of one).

    Raises:
        ValueError: it is missing, too large or damaged.
    """
    if path.startswith(DATASET_PREFIX):
        dataset, column = _dataset(path)
        value = dataset[member][column]
        return value["bytes"] if value["bytes"] is not None else value["path"]
    suffix = Path(path).suffix.lower()
    if suffix == ".zip":
        return open_archive(path).read(member)
    if suffix == ".tar":
        return _read_span(path, *member)
    return _table(path).read(member)


def member_name(member: Any) -> str:
    """What messages call a member."""
    if isinstance(member, int):
        return f"row {member}"
    return member[0] if isinstance(member, tuple) else member


def _is_image(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last.lower().endswith(IMAGE_SUFFIXES) and not last.startswith(".") and not name.startswith("__MACOSX/")


def _tar_members(path: str) -> Iterator[tuple[str, int, int]]:
    """(name, offset, bytes) of each image in a tar archive that is not compressed, such as a WebDataset shard."""
    seen = set()
    try:
        size = os.stat(path).st_size
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                if not info.isreg() or not _is_image(info.name):
                    continue
                name = PurePosixPath(info.name)
                if name.is_absolute() or ".." in name.parts or "\0" in info.name or info.sparse is not None:
                    raise ValueError(
                        f"{path}: member {info.name!r} names a file outside the archive or has holes; such an archive "
                        "can be an attack, get it from its official source"
                    )
                if info.name in seen:
                    raise ValueError(f"{path}: two members are called {info.name!r}; repack the archive")
                if info.offset_data + info.size > size:
                    raise ValueError(f"{path}: ends early, within {info.name}; copy or download it again")
                seen.add(info.name)
                yield info.name, info.offset_data, info.size
    except tarfile.TarError as error:
        raise ValueError(
            f"{path}: not a whole tar archive without compression ({error}); download it again, or unpack a .tar.gz"
        ) from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def _read_span(path: str, name: str, offset: int, size: int) -> bytes:
    if size > MAX_IMAGE_BYTES:
        raise ValueError(f"{path}/{name}: {size:,} bytes, more than the limit of {MAX_IMAGE_BYTES:,}")
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise ValueError(f"{path}/{name}: cannot be read ({error.strerror or error})") from error
    if len(content) != size:
        raise ValueError(f"{path}/{name}: the archive ends early; copy or download it again")
    return content


class _Table:
    """A Parquet file with a column of images: bytes, structs of bytes and path, or paths."""

    def __init__(self, path: str) -> None:
        import pyarrow
        from pyarrow import parquet

        self.path = path
        try:
            self.file = parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable Parquet file ({error}); copy or download it again") from error
        schema = self.file.schema_arrow
        types = {name: schema.field(name).type for name in schema.names}
        is_bytes = {name: pyarrow.types.is_binary(t) or pyarrow.types.is_large_binary(t) for name, t in types.items()}
        structs = [n for n, t in types.items() if pyarrow.types.is_struct(t) and t.get_field_index("bytes") >= 0]
        named = {name.lower(): name for name in types}
        binary = [named[name] for name in _IMAGE_COLUMNS if name in named and is_bytes[named[name]]]
        paths = [named[name] for name in _PATH_COLUMNS if name in named and pyarrow.types.is_string(types[named[name]])]
        found = [*structs, *binary, *paths]
        if not found:
            raise ValueError(
                f"{path}: no column of images among {', '.join(types)}; call one 'image' (bytes, or a struct of bytes "
                "and path) or 'path'"
            )
        self.column, self.is_struct = found[0], bool(structs)
        groups = [self.file.metadata.row_group(index).num_rows for index in range(self.file.num_row_groups)]
        self.starts = [sum(groups[:index]) for index in range(len(groups))]

    def members(self, stem: str) -> list[tuple[Any, PurePosixPath]]:
        """All rows; those that know a path are called by it."""
        count = self.file.metadata.num_rows
        names: list[str | None] = [None] * count
        if self.is_struct and self.file.schema_arrow.field(self.column).type.get_field_index("path") >= 0:
            rows = self.file.read(columns=[f"{self.column}.path"]).column(0).to_pylist()
            names = [None if row is None else row["path"] for row in rows]
        found = []
        for row in range(count):
            parts = [part for part in PurePosixPath(names[row] or "").parts if part not in ("/", "..")]
            found.append((row, PurePosixPath(stem, *(parts or [f"row-{row:08}"]))))
        return found

    def read(self, row: int) -> Any:
        """The bytes of a row's image."""
        group = next(index for index in reversed(range(len(self.starts))) if self.starts[index] <= row)
        with _lock:
            values = _row_groups.pop((self.path, group), None)
            if values is None:
                values = self._read_group(group)
            _row_groups[self.path, group] = values
            while len(_row_groups) > _ROW_GROUPS:
                _row_groups.popitem(last=False)
        value = values[row - self.starts[group]].as_py()
        if self.is_struct:
            value = None if value is None else value["bytes"] or value["path"]
        if isinstance(value, str):
            value = str(Path(self.path).parent / value)
        if not value:
            raise ValueError(f"{self.path}, row {row}: there is no image in it")
        return value

    def _read_group(self, group: int) -> Any:
        import pyarrow

        metadata = self.file.metadata.row_group(group)
        columns = [metadata.column(index) for index in range(metadata.num_columns)]
        size = sum(each.total_uncompressed_size for each in columns if each.path_in_schema.split(".")[0] == self.column)
        if size > MAX_TEXT_BYTES:
            raise ValueError(f"{self.path}: a row group of {size:,} bytes; write it with fewer rows in a group")
        try:
            return self.file.read_row_group(group, columns=[self.column]).column(0)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{self.path}: damaged ({error}); copy or download it again") from error


_lock = threading.Lock()
_row_groups: "OrderedDict[tuple[str, int], Any]" = OrderedDict()
_tables: dict[str, _Table] = {}
_datasets: dict[str, tuple[Any, str]] = {}


def _table(path: str) -> _Table:
    if path not in _tables:
        _tables[path] = _Table(path)
    return _tables[path]


def _dataset(text: str) -> tuple[Any, str]:
    """The data set that `dataset:FOLDER_OR_ID[@SPLIT]` names, with images not decoded, and its column of images."""
    if text in _datasets:
        return _datasets[text]
    import datasets

    source, _, split = text.removeprefix(DATASET_PREFIX).partition("@")
    try:
        found = datasets.load_from_disk(source) if Path(source).is_dir() else datasets.load_dataset(source)
    except Exception as error:  # the Hub client and the loaders raise all kinds
        raise ValueError(f"{text}: cannot be loaded ({' '.join(str(error).split())[:200]})") from error
    if isinstance(found, dict):
        if split not in found:
            raise ValueError(f"{text}: name a split as {DATASET_PREFIX}{source}@SPLIT; there are {', '.join(found)}")
        found = found[split]
    columns = [name for name, feature in found.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise ValueError(f"{text}: no column of type Image among {', '.join(found.features)}")
    column = columns[0]
    _datasets[text] = found.select_columns([column]).cast_column(column, datasets.Image(decode=False)), column
    return _datasets[text]


def frames_of(path: Path, every: int = 1) -> Iterator[tuple[int, Any]]:
    """(index, Pillow image) of every n-th frame of a video, upright, in order.

    Raises:
        ValueError: PyAV is not installed, or the video is damaged or breaks off, after the frames before.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{path}: videos need PyAV: pip install 'hf-segvit[video]'") from error
    index, end = -1, 0.0
    try:
        with av.open(str(path)) as video:
            if not video.streams.video:
                raise ValueError(f"{path}: has no video stream")
            stream = video.streams.video[0]
            stream.thread_type = "AUTO"
            start = float((stream.start_time or 0) * (stream.time_base or 0))
            for index, frame in enumerate(video.decode(stream)):
                end = max(end, (frame.time or 0.0) - start)
                if index % every == 0:
                    image = frame.to_image()
                    turn = round(getattr(frame, "rotation", 0) or 0) % 360
                    yield index, image.rotate(turn, expand=True) if turn else image
            expected, seconds = stream.frames, _seconds_of(video, stream)
    except av.FFmpegError as error:
        after = f"after frame {index}" if index >= 0 else "before its first frame"
        raise ValueError(f"{path}: the video breaks off {after} ({error}); copy it again") from error
    if expected and index + 1 < expected:
        raise ValueError(f"{path}: the video breaks off after {index + 1} of {expected} frames; copy it again")
    # Many containers know how long they are, but not how many frames they have. The last frame is shown for a while.
    if not expected and seconds - end > _LONGEST_FRAME:
        raise ValueError(
            f"{path}: the video breaks off after frame {index}, at {end:.1f} of {seconds:.1f} s; copy it again"
        )


_LONGEST_FRAME = 0.75  # seconds


def _seconds_of(video: Any, stream: Any) -> float:
    """How long the stream of a video should be; 0 if the file does not say so."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    try:  # Matroska: hours, minutes, seconds
        hours, minutes, seconds = map(float, stream.metadata["DURATION"].split(":"))
    except (KeyError, ValueError):
        # Of the file, whose sound may be longer.
        return (video.duration or 0) / 1e6 if len(video.streams) == 1 else 0.0
    return 3600 * hours + 60 * minutes + seconds
