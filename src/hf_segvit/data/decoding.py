"""From a row of a reader's table to an image and its segments.

`SampleDecoder` is what `datasets` calls when samples are asked for: it reads the mask by the reader's own rule (a
`MaskReader`) and the image in the frame in which it was annotated. `PolygonMasks` and `PaintedPolygons` are the mask
readers of all formats that store outlines. All can be pickled; open files live in archives.py. H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..models.image_decoding import IMAGE_FORMATS, open_image_file, to_rgb
from ..models.mask_encoding import decode_mask
from .archives import Location, location_name, read_location
from .class_lists import VOID
from .mask_files import draw_polygons, polygon_fault, present_values, rle_fault

_ORIENTATION_TAG = 0x0112  # EXIF
_SIDEWAYS = (5, 6, 7, 8)

Segments = list[dict[str, Any]]


class MaskReader(Protocol):
    """How a format's masks are read."""

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """Read the mask of one image.

        Args:
            maps: the files of the mask; none for formats of outlines.
            segments: rows of the table; `None` where they follow from the mask alone.
            name: of the image, for errors.

        Returns:
            (H, W) int32 segment ids with void -1, or `None` where rows have `rle`; and the rows.
        """


@dataclass(frozen=True)
class SampleDecoder:
    """Decodes the columns `image`, `segment_map` and `segments` of rows; others stay as they are.

    Attributes:
        read_masks: the format's rule.
        read_image: what makes an image of a file's content, its name and the size of its mask; `None`:
            `image_in_frame`.
    """

    read_masks: MaskReader
    read_image: Callable[[bytes, str, tuple[int, int] | None], Any] | None = None

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Decode the rows of a batch, whichever columns it has."""
        length = len(next(iter(batch.values()), []))
        rows = [self.decode({key: values[index] for key, values in batch.items()}) for index in range(length)]
        return {key: [row[key] for row in rows] for key in batch}

    def decode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Decode one row.

        Raises:
            ValueError: a file cannot be read, sizes differ, or ids and rows do not go together; the message names the
                file, the id and the remedy.
        """
        decoded, size = dict(row), None
        name = location_name(row["image"]) if "image" in row else f"image {row.get('image_id')!r}"
        if "segment_map" in row:
            segment_map, segments = self.read_masks(row["segment_map"], row.get("segments"), name)
            size = _mask_size(segment_map, segments)
            decoded["segment_map"] = segment_map
            if "segments" in row:
                decoded["segments"] = segments
        if "image" in row:
            image = (self.read_image or image_in_frame)(read_location(row["image"]), name, size)
            decoded["image"] = image
            if "segment_map" in row and decoded["segment_map"] is None and not decoded.get("segments"):
                shape = (image.height, image.width) if isinstance(image, Image.Image) else tuple(image.shape[-2:])
                decoded["segment_map"] = np.full(shape, VOID, dtype=np.int32)
        return decoded


def image_in_frame(content: bytes, name: str, size: tuple[int, int] | None = None) -> Image.Image:
    """The image as RGB, in the frame of its annotation.

    An image whose EXIF block turns it sideways is upright for viewers, but many tools annotate the stored pixels. The
    mask's size says which of the two was annotated, and that one is returned.

    Args:
        content: of the file.
        name: of the file, for errors.
        size: (H, W) of the mask; `None` where there is none: the image is turned upright.

    Raises:
        ValueError: it cannot be read, or neither way has the mask's size.
    """
    image = open_image_file(content, name)
    if size is None:
        return to_rgb(image, name)
    stored = (image.height, image.width)
    sideways = orientation(image) in _SIDEWAYS
    if stored == size and sideways and stored[0] != stored[1]:
        image.getexif()[_ORIENTATION_TAG] = 1
        # Copies, as between processes, read the file's block again; an image of the pixels alone has none.
        return Image.fromarray(np.asarray(to_rgb(image, name)))
    elif (stored[::-1] if sideways else stored) != size:
        raise ValueError(
            f"{name}: the image has {image.height} x {image.width} pixels but its mask {size[0]} x {size[1]} (height "
            "x width); one of them belongs to another image, or was scaled: restore it, or scale the mask without "
            "interpolation"
        )
    return to_rgb(image, name)


def upright_size(location: Location) -> tuple[int, int]:
    """(H, W) of an image as viewers show it, from its header alone.

    Raises:
        ValueError: it cannot be read.
    """
    name = location_name(location)
    try:
        with Image.open(BytesIO(read_location(location)), formats=IMAGE_FORMATS) as image:
            size = (image.height, image.width)
            return size[::-1] if orientation(image) in _SIDEWAYS else size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: cannot be read as an image ({error}); copy or download it again") from error


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 where there is none, or a malformed one."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # EXIF blocks in the wild are often malformed, in many ways; viewers ignore such a block
        return 1


@dataclass(frozen=True)
class PolygonMasks:
    """Segments as `rle`, which may overlap, from polygons or runs, with the stated `area`; `segment_map` is `None`."""

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`."""
        return None, [
            {
                "id": row["id"],
                "label_id": row["label_id"],
                "is_crowd": row["is_crowd"],
                "rle": _checked_rle(row, name),
                **({} if row.get("area") is None else {"area": row["area"]}),
            }
            for row in segments or []
        ]


@dataclass(frozen=True)
class PaintedPolygons:
    """Semantic maps painted from polygons or runs, later ones over earlier ones; crowds are painted like others."""

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`."""
        if not segments:
            return None, []
        segment_map = np.full(segments[0]["rle"]["size"], VOID, dtype=np.int32)
        for row in segments:
            segment_map[decode_mask(_checked_rle(row, name))] = row["label_id"]
        return segment_map, semantic_segments(segment_map)


def semantic_segments(label_map: np.ndarray) -> Segments:
    """Rows for a map (H, W) of label ids: one per label that occurs, whose id is the label id."""
    return [{"id": label, "label_id": label, "is_crowd": False} for label in present_values(label_map) if label != VOID]


def _checked_rle(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    height, width = row["rle"]["size"]
    polygons = row["polygons"]
    if polygons:
        faults = [fault for polygon in polygons if (fault := polygon_fault(polygon, (height, width)))]
    else:
        faults = [fault for fault in [rle_fault(row["rle"], (height, width))] if fault]
    if faults:
        raise ValueError(f"{name}: annotation {row['id']}: {faults[0]}; correct or remove the annotation")
    if polygons:
        return draw_polygons(polygons, (height, width))
    return {"size": [height, width], "counts": row["rle"]["counts"]}


def _mask_size(segment_map: Any, segments: Segments) -> tuple[int, int] | None:
    if segment_map is not None:
        return segment_map.shape
    return tuple(segments[0]["rle"]["size"]) if segments else None
