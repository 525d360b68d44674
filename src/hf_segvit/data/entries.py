"""Convert entries of a reader to tensors for training, and cache their id maps.

- `decode_entry` makes a `DecodedEntry`: the image, and its segments as one channel of small integers. `encode_entry`
  leaves the segments as runs, of which augmentation decodes what a crop keeps; it makes an `AugmentedSample`.
- `decode_for_training` makes a data set decode faster, to the same pixels and segments: plain JPEG files by
  torchvision, outlines painted as runs, and id maps, with `MapCache`, from a folder of run-length maps (run_maps.py).

H W pixels, h w of a crop, n segments or ids, r runs, N prompts.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from ..atomic_files import replacing
from ..models.image_claims import checked_claims, max_image_pixels
from ..models.image_decoding import to_pixels
from ..models.image_files import orientation
from ..models.image_values import AS_STORED, ImageSettings
from .archives import NESTED, Location
from .decoding import MaskReader, SampleDecoder, Segments, image_in_frame
from .run_maps import RunMap, RunMasks, run_lengths

CROWD = -2  # in a segment map: pixels of a crowd, which is no training target
_MOST_MASK_BYTES = 2**32  # of the masks of one image
MANY = 100  # from here on indices of segments are int16; int8 would leave no room for sums


@dataclass
class DecodedEntry:
    """One image and its segments."""

    pixels: Tensor  # (C, H, W) uint8, channels last in memory
    # (H, W) int8, or int16 from `MANY` segments on: index of each pixel's segment, -1 for void, `CROWD` for crowds
    segment_map: np.ndarray
    labels: np.ndarray  # (n,) int64 label ids of all segments except crowds
    masks: np.ndarray | None  # (n, H, W) bool if the segments are masks that may overlap


@dataclass
class EncodedEntry:
    """One image and its segments, which are not decoded yet."""

    pixels: Tensor  # (C, H, W) uint8, channels last in memory
    runs: RunMap  # (H, W)
    values: np.ndarray  # (i + 1,) int8 or int16 indices as in `DecodedEntry.segment_map`, for `runs.cut`
    labels: np.ndarray  # (n,) int64 label ids of all segments except crowds
    masks: RunMasks | None  # (n, H, W) if the segments are masks that may overlap

    def decoded(self) -> DecodedEntry:
        """The whole entry as arrays."""
        segment_map = np.ascontiguousarray(self.runs.unrolled(self.values))
        masks = None
        if self.masks is not None:
            height, width = self.runs.shape
            shown, present = self.masks.cut((np.arange(height), np.arange(width)))
            masks = np.zeros((len(present), height, width), dtype=bool)
            masks[present] = shown
        return DecodedEntry(self.pixels, segment_map, self.labels, masks)


class Placement(NamedTuple):
    """Where a crop goes: its height and width at the top left of the training image, and whether it is flipped."""

    height: int
    width: int
    flip: bool


@dataclass
class AugmentedSample:
    """One training image."""

    image_id: Any
    pixels: Tensor  # (C, H, W) uint8; with a `placement`, the unscaled crop (C, h, w)
    segment_map: Tensor  # (H, W) int8 or int16, index of each pixel's segment in `labels`; -1 if it has none
    labels: Tensor  # (n,) int64 label ids
    counted: Tensor | None = None  # (H, W) bool, False for void, crowds, padding; `None`: where the map is -1
    masks: Tensor | None = None  # (n, H, W) bool if masks may overlap, so that the map cannot hold them
    placement: Placement | None = None  # how `pixels` remain to be scaled; `None`: they are finished
    outliers: Tensor | None = None  # (H, W) bool, pixels of pasted objects that no class is for
    prompts: Tensor | None = None  # (N, 4) float32 centre x, centre y, width, height in [0, 1], for ViT-P
    prompt_labels: Tensor | None = None  # (N,) int64, -100 for prompts without a label


def decode_entry(entry: Mapping[str, Any]) -> DecodedEntry:
    """Convert an entry to arrays.

    Args:
        entry: `image` (Pillow, (H, W, C) uint8, or a tensor (C, H, W) uint8), `image_id`, `segment_map` ((H, W) or a
            `RunMap`; `None` if every segment has an `rle`) and `segments`.

    Raises:
        ValueError: sizes differ, or the map holds ids that `segments` has no row for.
    """
    encoded = encode_entry(entry)
    height, width = encoded.runs.shape
    if encoded.masks is not None and len(encoded.masks) * height * width > _MOST_MASK_BYTES:
        raise ValueError(
            f"image {entry.get('image_id')!r}: {len(encoded.masks)} masks of {height} x {width} pixels take more than "
            f"{_MOST_MASK_BYTES:,} bytes; cut the image into tiles, or scale it down"
        )
    return encoded.decoded()


def encode_entry(entry: Mapping[str, Any]) -> EncodedEntry:
    """Convert an entry to pixels and runs; arguments and errors as of `decode_entry`."""
    name = f"image {entry.get('image_id')!r}"
    image = entry["image"]
    if isinstance(image, Tensor):
        pixels = image
    else:
        # `np.array` copies: the pixels of a Pillow image may not be written to.
        pixels = torch.from_numpy(np.array(to_pixels(image, name, AS_STORED), dtype=np.uint8)).permute(2, 0, 1)
    size = (pixels.shape[1], pixels.shape[2])
    rows = [row for row in entry["segments"] if not row["is_crowd"]]
    crowds = [row for row in entry["segments"] if row["is_crowd"]]
    labels = np.array([row["label_id"] for row in rows], dtype=np.int64)
    if any(row.get("rle") is not None for row in entry["segments"]):
        masks = [_mask_runs(row, size, name) for row in rows]
        layers = [(_mask_runs(row, size, name), CROWD) for row in crowds]
        # After the crowds: a pixel that belongs to an object counts, even inside a crowd.
        runs = RunMap.painted([*layers, *((mask, 0) for mask in masks)], size)
        return EncodedEntry(pixels, runs, np.append(runs.ids, -1).astype(np.int16), labels, RunMasks(size, masks))
    id_map = entry["segment_map"] if isinstance(entry["segment_map"], RunMap) else np.asarray(entry["segment_map"])
    if id_map.shape != size:
        raise ValueError(f"{name} is {size[0]} x {size[1]} but its segment map {id_map.shape} (height x width)")
    # A reader's ids have gaps and go up to 2**24; as indices they need no search later, and fit into small integers.
    values = {row["id"]: index for index, row in enumerate(rows)} | {row["id"]: CROWD for row in crowds}
    # int8 is cut, renumbered and copied in two thirds of the time of int16.
    dtype = np.int8 if len(rows) < MANY else np.int16
    runs = id_map if isinstance(id_map, RunMap) else RunMap.of(id_map)
    return EncodedEntry(pixels, runs, _values_of_ids(runs, values, name, dtype), labels, None)


def replace_ids(
    id_map: np.ndarray | RunMap, values: Mapping[int, int], name: str = "the image", dtype: Any = np.int16
) -> np.ndarray:
    """Replace the ids of a map (H, W) by other numbers; -1 stays.

    Raises:
        ValueError: the map holds an id that `values` does not.
    """
    runs = id_map if isinstance(id_map, RunMap) else RunMap.of(id_map)
    return np.ascontiguousarray(runs.unrolled(_values_of_ids(runs, values, name, dtype)))


def _values_of_ids(runs: RunMap, values: Mapping[int, int], name: str, dtype: Any) -> np.ndarray:
    """The numbers that stand for a map's ids, and -1 for void."""
    # Segments are compact, so an image has far fewer runs of equal ids than pixels: ids are looked up once per run.
    table = {-1: -1, **values}
    ids = runs.ids.tolist()
    unknown = [value for value in ids if value not in table]
    if unknown:
        raise ValueError(f"{name}: its map holds ids {unknown[:5]} that segments has no row for; add the rows")
    return np.array([table[value] for value in [*ids, -1]], dtype=dtype)


def _mask_runs(row: Mapping[str, Any], size: tuple[int, int], name: str) -> np.ndarray:
    if row.get("rle") is None:
        raise ValueError(f"{name}: segment {row['id']} has no rle while others have one; give it to all or none")
    if tuple(int(length) for length in row["rle"]["size"]) != size:
        raise ValueError(f"{name} is {size[0]} x {size[1]} but the mask of segment {row['id']} is {row['rle']['size']}")
    return run_lengths(row["rle"])


_MAGIC = b"HFSEGVITRUNS2\n"
_HEADER = struct.Struct("<IIIII")  # height, width, 1 for runs along columns, number of runs, bytes of JSON


@dataclass(frozen=True)
class RunReader:
    """A mask reader that returns maps painted from outlines as `RunMap`, and all others as another one reads them."""

    read_masks: MaskReader

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`."""
        painter = getattr(self.read_masks, "runs", None)
        return self.read_masks(maps, segments, name) if painter is None else painter(segments or [], name)


class MapCache:
    """A mask reader that keeps on disk, as run-length maps, what another one has read or painted.

    Processes may share the folder, and it may be deleted at any time. It is created if it does not exist.

    Raises:
        ValueError: the folder cannot be written to.
    """

    def __init__(self, read_masks: MaskReader, folder: str | os.PathLike[str]) -> None:
        self.read_masks, self.folder = read_masks, Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make cache folder {folder}: {error.strerror or error}; name another") from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise ValueError(f"cannot write to the cache folder {folder}; name another, or change its permissions")
        # Readers are dataclasses whose fields are everything that decides how a file is read.
        self.reader = f"{type(read_masks).__qualname__} {read_masks!r}"
        self.paints = hasattr(read_masks, "runs")

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`; maps come as `RunMap`."""
        path = self._path_of_outlines(segments or []) if self.paints else self._path(maps)
        if path is None:
            return RunReader(self.read_masks)(maps, segments, name)
        cached = _read(path)
        if cached is not None:
            run_map, rows = cached
            if segments is None or self.paints:  # of outlines, the key holds all that the annotation says
                return run_map, rows
            # Label and crowd come from the annotation, which may have changed, not from the cache. Ids without a row
            # are an error, which the reader reports below.
            present = set(run_map.ids.tolist())
            rows = [row for row in segments if row["id"] in present]
            if len(rows) == len(present):
                return run_map, rows
        id_map, rows = RunReader(self.read_masks)(maps, segments, name)
        run_map = id_map if isinstance(id_map, RunMap) else RunMap.of(id_map)
        if len(run_map.ids) > np.iinfo(np.int16).max:
            return id_map, rows
        _write(path, run_map, rows)
        return run_map, rows

    def _path_of_outlines(self, segments: Segments) -> Path | None:
        """File of the cache for painted outlines; `None` if there are none."""
        if not segments:
            return None
        digest = hashlib.blake2b(self.reader.encode(), digest_size=16)
        for row in segments:
            polygons = [np.asarray(polygon, dtype=np.float64) for polygon in row["polygons"] or ()]
            counts = None if polygons else row["rle"]["counts"]
            # With all lengths, so that no two lists of outlines are the same bytes.
            head = [row["id"], row["label_id"], row["is_crowd"], *row["rle"]["size"], counts, *map(len, polygons)]
            digest.update(f"{head!r}\0".encode())
            for polygon in polygons:
                digest.update(polygon.tobytes())
        return self._file(digest.hexdigest())

    def _path(self, maps: Sequence[Location]) -> Path | None:
        """File of the cache for these maps; `None` if there are none, or one cannot be found."""
        keys = [self.reader]
        for location in maps:
            file = (location["archive"] or location["member"]).split(NESTED)[0]
            try:
                status = os.stat(file)
            except OSError:
                return None
            # Size and time, so that files that have changed are read anew.
            keys.append(f"{location['archive']}\0{location['member']}\0{status.st_size}\0{status.st_mtime_ns}")
        return self._file(hashlib.blake2b("\0\0".join(keys).encode(), digest_size=16).hexdigest()) if maps else None

    def _file(self, digest: str) -> Path:
        # Spread over 256 folders, so that none holds a file for every image.
        return self.folder / digest[:2] / f"{digest[2:]}.runs"


def _read(path: Path) -> tuple[RunMap, Segments] | None:
    """A cached map and its rows; `None` if the file is missing or damaged."""
    try:
        content = path.read_bytes()
        if not content.startswith(_MAGIC):
            return None
        raw = zlib.decompress(content[len(_MAGIC) :])
        height, width, by_columns, num_runs, length = _HEADER.unpack_from(raw)
        indices = np.frombuffer(raw, "<i2", num_runs, _HEADER.size)
        lengths = np.frombuffer(raw, "<u4", num_runs, _HEADER.size + 2 * num_runs)
        tail = json.loads(raw[-length:])
        ids = np.array(tail["ids"], dtype=np.int32)
        if lengths.sum(dtype=np.int64) != height * width or not (-1 <= indices.min() <= indices.max() < len(ids)):
            return None
        rows = [{"id": i, "label_id": label, "is_crowd": crowd} for i, label, crowd in tail["rows"]]
    except (OSError, ValueError, KeyError, TypeError, zlib.error, struct.error):
        return None
    return RunMap((height, width), ids, indices, lengths, bool(by_columns)), rows


def _write(path: Path, run_map: RunMap, rows: Segments) -> None:
    tail = {
        "ids": run_map.ids.tolist(),
        "rows": [[int(row["id"]), int(row["label_id"]), bool(row["is_crowd"])] for row in rows],
    }
    text = json.dumps(tail).encode()
    header = _HEADER.pack(*run_map.shape, run_map.by_columns, len(run_map.indices), len(text))
    runs = run_map.indices.astype("<i2").tobytes() + run_map.lengths.astype("<u4").tobytes()
    try:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(_MAGIC + zlib.compress(header + runs + text))
    except OSError:
        return  # a full disk costs time, but must not end the run


def decode_for_training(dataset: Any, cache: str | os.PathLike[str] | None = None) -> Any:
    """The same data set with images as tensors (C, H, W) uint8 and, given a `cache` folder, id maps as `RunMap`.

    A data set that does not hold files of one of our readers is returned unchanged.
    """
    if not isinstance(dataset, datasets.Dataset):
        return dataset
    decoder = dataset.format["format_kwargs"].get("transform")
    # Generated scenes and Hub columns have no files on disk, and decoders of their own.
    if type(decoder) is not SampleDecoder or not {"image", "segment_map", "segments"} <= set(dataset.column_names):
        return dataset
    # A PNG of ids takes as long to decode as its photograph; from the cache it takes a twentieth of that.
    reader = decoder.read_masks
    read_masks = RunReader(reader) if cache is None else MapCache(reader, cache)
    return dataset.with_transform(SampleDecoder(read_masks, image_pixels, decoder.image_settings))


@dataclass(frozen=True)
class EntryReader:
    """The entries of a data set by index; rows of one of our readers are decoded without detours of `datasets`."""

    rows: Any
    decoder: SampleDecoder | None

    @classmethod
    def of(cls, dataset: Any) -> EntryReader:
        """The entries of what `decode_for_training` returns."""
        decoder = dataset.format["format_kwargs"].get("transform") if isinstance(dataset, datasets.Dataset) else None
        # `datasets` makes a batch of one of every row, and a row of the batch: a twentieth of the time of an image.
        return cls(dataset.with_format(None), decoder) if type(decoder) is SampleDecoder else cls(dataset, None)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.rows[index] if self.decoder is None else self.decoder.decode(self.rows[index])


def image_pixels(
    content: bytes, name: str, size: tuple[int, int] | None = None, settings: ImageSettings | None = None
) -> Tensor:
    """The pixels of `image_in_frame`, (C, H, W) uint8, channels last in memory."""
    settings = settings or AS_STORED
    # JPEG files have 8 bits and three channels, which only a choice of bands or another model could change.
    is_plain = settings.bands is None and settings.channels in (None, 3)
    pixels = _plain_jpeg(content, size) if is_plain else None
    if pixels is None:
        pixels = torch.from_numpy(np.array(image_in_frame(content, name, size, settings))).permute(2, 0, 1)
    return pixels


def _plain_jpeg(content: bytes, size: tuple[int, int] | None) -> Tensor | None:
    """The pixels of an ordinary JPEG file; `None` if Pillow must decode it, or report what is wrong with it."""
    try:
        claims = checked_claims(content, "image")
        if claims is None:
            return None
        stored, is_plain = (claims.height, claims.width), _is_bare_jpeg(content)
        if not is_plain:
            with Image.open(BytesIO(content), formats=("JPEG",)) as image:
                stored = (image.height, image.width)
                is_upright = not {"exif", "xmp"} & image.info.keys() or orientation(image) == 1
                is_plain = image.format == "JPEG" and image.mode in ("RGB", "L") and is_upright
    except Exception:  # decoders raise many kinds; the usual way of reading says what is wrong
        return None
    if not is_plain or stored != (size or stored) or stored[0] * stored[1] > max_image_pixels():
        return None
    try:
        # Four fifths of Pillow's time for the same pixels: both are libjpeg-turbo with its defaults.
        return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError:
        return None


# Tables, restart interval, comment, and what applications add: all but 1, which may turn the image.
_BARE_SEGMENTS = {0xDB, 0xC4, 0xDD, 0xFE, *range(0xE0, 0xF0)} - {0xE1}


def _is_bare_jpeg(content: bytes) -> bool:
    """Whether the header of a JPEG holds one 8-bit grey or colour frame, and nothing that could turn or extend it."""
    # Pillow opens a file in a tenth of the time that decoding takes; most files have nothing for which it is needed.
    position, frames = 2, 0
    while position + 10 <= len(content) and content[position] == 0xFF:
        kind, length = content[position + 1], int.from_bytes(content[position + 2 : position + 4], "big")
        if kind == 0xDA:
            return frames == 1
        if kind in (0xC0, 0xC1, 0xC2) and content[position + 4] == 8 and content[position + 9] in (1, 3):
            frames += 1
        elif kind not in _BARE_SEGMENTS or (kind == 0xE2 and content.startswith(b"MPF\0", position + 4)):
            return False
        position += 2 + length
    return False
