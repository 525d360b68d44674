"""Decode rows of a reader's table into images and segments.

`SampleDecoder` is the transform that `datasets` calls on access: it reads the mask with the reader's own `MaskReader`,
and the image in the frame in which it was annotated. `PolygonMasks`, `PaintedPolygons` and `PaintedPanoptic` are the
mask readers of all formats that store outlines. All can be pickled for workers: open files are kept in archives.py.
H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..models.image_bands import Bands
from ..models.image_decoding import image_size, to_pixels
from ..models.image_files import SIDEWAYS, forget_orientation, open_image_file, orientation, stored_frame
from ..models.image_values import AS_STORED, ImageSettings
from .archives import Location, location_name, read_location
from .class_lists import VOID
from .mask_files import (
    LONGEST_OUTLINES,
    draw_polygons,
    mask_area,
    merge_masks,
    outline_length,
    outlines_fault,
    polygon_fault,
    present_values,
    rle_fault,
)
from .run_maps import RunMap, run_lengths

Segments = list[dict[str, Any]]


class MaskReader(Protocol):
    """How a format's masks are read."""

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """Read the mask of one image.

        Args:
            maps: the files of the mask; none in formats that store outlines.
            segments: rows of the table; `None` if they follow from the mask alone.
            name: of the image, for error messages.

        Returns:
            (H, W) int32 segment ids with void -1, or `None` if the rows have `rle`; and the rows.
        """


@dataclass(frozen=True)
class SampleDecoder:
    """Decodes the columns `image`, `segment_map` and `segments` of rows; others are left alone."""

    read_masks: MaskReader
    read_image: Callable[..., Any] | None = None  # with the arguments of `image_in_frame`, which is used if `None`
    image_settings: ImageSettings = AS_STORED  # channels, bands and range of values

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Decode the rows of a batch, whichever columns it has."""
        length = len(next(iter(batch.values()), []))
        rows = [self.decode({key: values[index] for key, values in batch.items()}) for index in range(length)]
        return {key: [row[key] for row in rows] for key in batch}

    def decode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Decode one row.

        Raises:
            ValueError: a file cannot be read, sizes differ, or ids do not match the rows of segments.
        """
        decoded, size = dict(row), None
        name = location_name(row["image"]) if "image" in row else f"image {row.get('image_id')!r}"
        content = read_location(row["image"]) if "image" in row else None
        outlines = (
            [segment for segment in row.get("segments") or () if segment.get("rle")] if "segment_map" in row else []
        )
        if outlines:
            _check_outlines(outlines, content, name)
        # Masks first: their size decides in which frame the image is decoded.
        if "segment_map" in row:
            segment_map, segments = self.read_masks(row["segment_map"], row.get("segments"), name)
            if segment_map is not None:
                size = segment_map.shape
            elif segments:
                size = tuple(segments[0]["rle"]["size"])
            decoded["segment_map"] = segment_map
            if "segments" in row:
                decoded["segments"] = segments
        if content is not None:
            read_image = self.read_image or image_in_frame
            try:
                image = read_image(content, name, size, self.image_settings)
            except OtherSize as error:
                maps = ", ".join(map(location_name, row.get("segment_map") or ()))
                raise ValueError(f"{error}{f'; the mask is {maps}' if maps else ''}") from error
            decoded["image"] = image
            if "segment_map" in row and decoded["segment_map"] is None and not decoded.get("segments"):
                # Without outlines nothing else tells the size of the mask.
                label_map = np.full(image_size(image), getattr(self.read_masks, "background", VOID), dtype=np.int32)
                decoded["segment_map"] = label_map
                if "segments" in row:
                    decoded["segments"] = semantic_segments(label_map)
        return decoded


def image_in_frame(
    content: bytes, name: str, size: tuple[int, int] | None = None, settings: ImageSettings | None = None
) -> Any:
    """Decode an image, in the frame in which its mask of `size` (H, W) was annotated; upright without a size.

    RGB (Pillow), or (H, W, C) uint8 of an image with another number of channels.

    Raises:
        ValueError: it cannot be read, or has the mask's size neither upright nor as stored.
    """
    settings = settings or AS_STORED
    image = open_image_file(content, name)
    if size is None:
        return to_pixels(image, name, settings)
    # Viewers turn an image as its EXIF block says, but many tools annotate the stored pixels: the mask's size shows
    # which of the two was annotated.
    stored = (image.height, image.width)
    sideways = orientation(image) in SIDEWAYS
    if stored == size and sideways and stored[0] != stored[1]:
        if isinstance(image, Bands):
            return to_pixels(replace(image, orientation=1), name, settings)
        forget_orientation(image)
        # Rebuilt from its pixels: a copy, such as one sent between processes, would read the file's EXIF block again.
        pixels = np.asarray(to_pixels(image, name, settings))
        return Image.fromarray(pixels) if pixels.shape[2] == 3 else pixels
    elif (stored[::-1] if sideways else stored) != size:
        raise OtherSize(_other_size(name, stored, size))
    return to_pixels(image, name, settings)


class OtherSize(ValueError):
    """An image whose size is not that of its mask."""


def _other_size(name: str, stored: tuple[int, int], size: tuple[int, int]) -> str:
    return (
        f"{name}: the image has {stored[0]} x {stored[1]} pixels but its mask {size[0]} x {size[1]} (height x width); "
        "one of them belongs to another image, or was scaled: restore it, or scale the mask without interpolation"
    )


_MOST_MASK_PIXELS = 2**35  # of all masks of an image together; each is decoded in the image's size


def _check_outlines(segments: Segments, content: bytes | None, name: str) -> None:
    """Refuse outlines that would take gigabytes or minutes to draw, before any is drawn."""
    height, width = segments[0]["rle"]["size"]
    if content is not None:
        # An annotation may claim any size: it is compared with that of the image, from its header.
        stored = _header_size(content, name)
        if stored is not None and (height, width) not in (stored, stored[::-1]):
            raise ValueError(_other_size(name, stored, (height, width)))
    if len(segments) * height * width > _MOST_MASK_PIXELS:
        raise ValueError(
            f"{name}: {len(segments)} masks of {height} x {width} pixels are more than the {_MOST_MASK_PIXELS:,} "
            "pixels that the masks of an image may have; cut it into tiles"
        )
    # A cheap bound first, as most images have few and short outlines.
    polygons = [polygon for segment in segments for polygon in segment["polygons"] or ()]
    if sum(map(len, polygons)) * max(height, width) * 3 > LONGEST_OUTLINES:
        length = sum(outline_length(polygon) for polygon in polygons if not polygon_fault(polygon, (height, width)))
        if fault := outlines_fault(length):
            raise ValueError(f"{name}: {fault}")


def _header_size(content: bytes, name: str) -> tuple[int, int] | None:
    """(H, W) as an image's header says; `None` if it cannot be read, which decoding will report."""
    try:
        return stored_frame(content, name)[:2]
    except ValueError:
        return None


def upright_size(location: Location) -> tuple[int, int]:
    """(H, W) of an image as viewers show it, from its header alone."""
    height, width, turn = stored_frame(read_location(location), location_name(location))
    return (width, height) if turn in SIDEWAYS else (height, width)


@dataclass(frozen=True)
class PolygonMasks:
    """Segments as `rle`, which may overlap, from polygons or runs; `segment_map` is `None`."""

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`."""
        return None, [
            {
                "id": row["id"],
                "label_id": row["label_id"],
                "is_crowd": row["is_crowd"],
                "rle": _checked_rle(row, name),
                # COCO's evaluation tells small from large objects by the stated area, not by that of the mask.
                **({} if row.get("area") is None else {"area": row["area"]}),
            }
            for row in segments or []
        ]


@dataclass(frozen=True)
class PaintedPolygons:
    """Semantic maps painted from polygons or runs, later ones on top; crowds are painted too, and label -1 is void."""

    background: int = VOID  # label id of pixels that no segment covers

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`."""
        return _unrolled(*self.runs(segments or [], name))

    def runs(self, segments: Segments, name: str) -> tuple[RunMap | None, Segments]:
        """The same with the map as runs."""
        if not segments:
            return None, []
        layers = [(run_lengths(_checked_rle(row, name)), row["label_id"]) for row in segments]
        runs = RunMap.painted(layers, _size(segments), self.background)
        return runs, [{"id": label, "label_id": label, "is_crowd": False} for label in runs.ids.tolist()]


@dataclass(frozen=True)
class PaintedPanoptic:
    """Panoptic maps painted from polygons or runs: stuff first and merged, then objects, later ones on top."""

    stuff: frozenset[int]  # label ids
    background: int = VOID  # label id of pixels that no segment covers, one of `stuff`

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`; ids number the rows of the image, as those of annotations may exceed 32 bits."""
        return _unrolled(*self.runs(segments or [], name))

    def runs(self, segments: Segments, name: str) -> tuple[RunMap | None, Segments]:
        """The same with the map as runs."""
        if not segments:
            return None, []
        layers: list[tuple[np.ndarray, int]] = []
        rows: dict[int, dict[str, Any]] = {}
        id_of_stuff: dict[int, int] = {}
        ground = VOID
        if self.background != VOID:
            ground = id_of_stuff[self.background] = len(segments)
            rows[len(segments)] = {"id": len(segments), "label_id": self.background, "is_crowd": False}
        # Annotators outline the road after the cars on it, or before: objects are on top of stuff in both cases.
        for index in sorted(range(len(segments)), key=lambda index: segments[index]["label_id"] not in self.stuff):
            row = segments[index]
            label, is_stuff = row["label_id"], row["label_id"] in self.stuff
            segment_id = id_of_stuff.setdefault(label, index) if is_stuff else VOID if label == VOID else index
            layers.append((run_lengths(_checked_rle(row, name)), segment_id))
            is_crowd = row["is_crowd"] and not is_stuff
            rows.setdefault(segment_id, {"id": segment_id, "label_id": label, "is_crowd": is_crowd})
        runs = RunMap.painted(layers, _size(segments), ground)
        return runs, [rows[value] for value in runs.ids.tolist()]


def _size(segments: Segments) -> tuple[int, int]:
    height, width = segments[0]["rle"]["size"]
    return height, width


def _unrolled(runs: RunMap | None, rows: Segments) -> tuple[np.ndarray | None, Segments]:
    return None if runs is None else np.ascontiguousarray(runs), rows


def semantic_segments(label_map: np.ndarray) -> Segments:
    """Rows of segments for a map (H, W) of label ids: one per label that occurs, with the label id as its id."""
    return [{"id": label, "label_id": label, "is_crowd": False} for label in present_values(label_map) if label != VOID]


def segment_areas(entry: Mapping[str, Any]) -> tuple[dict[int, int], int]:
    """Pixels of each segment of a decoded entry by its id, and the number of pixels that have one."""
    if entry["segment_map"] is None:
        # From the runs: masks of a large image would fill the memory.
        masks = [row["rle"] for row in entry["segments"]]
        areas = {row["id"]: mask_area(mask) for row, mask in zip(entry["segments"], masks, strict=True)}
        return areas, mask_area(merge_masks(masks)) if masks else 0  # not the sum of areas, as masks may overlap
    values, pixels = np.unique(entry["segment_map"], return_counts=True)
    areas = {int(value): int(count) for value, count in zip(values, pixels, strict=True) if value != VOID}
    return areas, sum(areas.values())


def visible_labels(entry: Mapping[str, Any]) -> set[int]:
    """Label ids of the segments of a decoded entry that have a pixel and are no crowd."""
    areas, _ = segment_areas(entry)
    return {row["label_id"] for row in entry["segments"] or () if not row["is_crowd"] and areas.get(row["id"])}


def _checked_rle(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    height, width = row["rle"]["size"]
    size, polygons = (height, width), row["polygons"]
    faults = [polygon_fault(polygon, size) for polygon in polygons] if polygons else [rle_fault(row["rle"], size)]
    for fault in faults:
        if fault:
            raise ValueError(f"{name}: annotation {row['id']}: {fault}; correct or remove the annotation")
    if polygons:
        return draw_polygons(polygons, size)
    return {"size": [height, width], "counts": row["rle"]["counts"]}
