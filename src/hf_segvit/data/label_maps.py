"""Pair images with label PNGs and read the maps.

`LabelMaps` is the mask reader of all semantic formats; `numbered_segments` splits label maps by a second map that
numbers objects; `pair_rows` finds the maps of each image by name. H W pixels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from .annotation_values import shown
from .archives import Location, location_name, read_json, read_text
from .class_lists import VOID, ClassList
from .decoding import Segments, semantic_segments
from .mask_files import present_values, read_colored_map, read_index_map, relabel
from .problems import ProblemList


@dataclass(frozen=True)
class ColorTable:
    """Colours that stand for values of a class list."""

    values: Mapping[int, int]  # by colour, 65536 * R + 256 * G + B
    by_palette: bool  # the file lists no values: palettes and greys count by their colours, too


@dataclass(frozen=True)
class LabelMaps:
    """Semantic maps: one file whose values, or colours, stand for classes."""

    labels: Mapping[int, int]  # label id by value in the file, -1 for void
    remedy: str  # against other values, for error messages
    colors: ColorTable | None = None

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`; a segment's id is its label id."""
        segment_map = self.label_map(maps[0])
        return segment_map, semantic_segments(segment_map)

    def label_map(self, location: Location) -> np.ndarray:
        """(H, W) int32 label ids, void -1, of one file."""
        if self.colors is None:
            values = read_index_map(location)
        else:
            values = read_colored_map(location, self.colors.values, self.colors.by_palette)
        return relabel(values, self.labels, location_name(location), self.remedy)


def classes_with_colors(location: Location) -> tuple[Any, ColorTable | None]:
    """The content of a class file as `read_classes` takes it, and its colours.

    `None` without colours. A JSON file has them as `color` of a class, [R, G, B] or "#rrggbb", or as {"name": colour};
    labelmap.txt has lines NAME:R,G,B:parts:actions. Classes without a value are numbered in the order of the file.

    Raises:
        ValueError: a colour cannot be read, is missing while others have one, or stands for two classes.
    """
    name = location_name(location)
    if location["member"].lower().endswith(".json"):
        content = read_json(location)
        rows = _color_rows(content)
        if not any("color" in row for row in rows):
            return None, None
        void = content.get("void", []) if isinstance(content, Mapping) else []
    else:
        lines = [line.strip() for line in read_text(location).splitlines() if line.strip() and not line.startswith("#")]
        if not location["member"].lower().endswith(LABEL_MAP):
            return None, None
        rows, void = [{"name": line.split(":")[0], "color": [*line.split(":"), ""][1]} for line in lines], []
    by_palette = not any("value" in row for row in rows)
    values, classes = dict[int, int](), []
    # Numbered from 1: a list that starts with `__ignore__` as 0 would be renumbered as labelme's own tools do.
    for index, row in enumerate(rows, 1):
        value, where = row.get("value", index), f"{name}: the class {shown(row.get('name'))}"
        if type(value) is not int:
            raise ValueError(f"{where} has the value {shown(value)}; give a whole number")
        # Several colours may stand for one class, and void for whatever is left.
        given = row.get("colors", [row["color"]] if "color" in row else [])
        if not given or not isinstance(given, list):
            raise ValueError(f"{where} has no colour, but others have; give each one")
        for color in given:
            packed = _packed_color(color, where)
            if packed in values:
                raise ValueError(f"{name}: the colour {color} stands for two classes; give each its own")
            values[packed] = value
        classes.append({"value": value, "name": row.get("name", ""), "is_thing": row.get("is_thing")})
    return {"classes": classes, "void": void}, ColorTable(values, by_palette)


LABEL_MAP = "labelmap.txt"  # of CVAT and Datumaro


def _color_rows(content: Any) -> list[dict[str, Any]]:
    """Rows of name, colour and perhaps value of a JSON file; none where it has no such form."""
    rows = content.get("classes") if isinstance(content, Mapping) and "classes" in content else content
    if isinstance(rows, Mapping):  # {"road": [128, 64, 128]}
        pairs = [(name, color) for name, color in rows.items() if isinstance(color, list) or _is_hex(color)]
        return [{"name": str(name), "color": color} for name, color in pairs] if len(pairs) == len(rows) else []
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        return []
    return [{("color" if key in ("colour", "rgb") else key): value for key, value in row.items()} for row in rows]


def _is_hex(color: Any) -> bool:
    return isinstance(color, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", color) is not None


def _packed_color(color: Any, where: str) -> int:
    if _is_hex(color):
        return int(color[1:], 16)
    parts = color.split(",") if isinstance(color, str) else color
    try:
        numbers = [int(part) for part in parts]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != 3 or not all(0 <= number <= 255 for number in numbers):
        raise ValueError(
            f'{where} has the colour {shown(color)}; give red, green and blue, such as [128, 64, 128] or "#804080"'
        )
    return numbers[0] << 16 | numbers[1] << 8 | numbers[2]


def numbered_segments(labels: np.ndarray, numbers: np.ndarray, classes: ClassList) -> tuple[np.ndarray, Segments]:
    """Segments from a label map and a map that numbers objects.

    Args:
        labels: (H, W) int32 label ids, -1 for void.
        numbers: (H, W) int32, from 1 in each thing class, 0 for a crowd; ignored outside of things.

    Returns:
        (H, W) int32 ids and the rows of segments.
    """
    # Objects get number * classes + label, so that label and crowd can be read off an id; stuff and crowds keep the
    # label alone.
    count = len(classes.names)
    ids = np.where(np.isin(labels, list(classes.things)), numbers * count + labels, labels)
    rows = [
        {"id": value, "label_id": value % count, "is_crowd": value < count and value in classes.things}
        for value in present_values(ids)
        if value != VOID
    ]
    return ids, rows


def pair_rows(
    images: Mapping[str, Location], maps: Sequence[Mapping[str, Location]], problems: ProblemList
) -> list[dict[str, Any]]:
    """Rows of the table for all images that have every map.

    Args:
        images: by the name that image and map share.
        maps: for each kind of map, its files by the same name.
        problems: collects images without a map and maps without an image.
    """
    hint = ""
    for files in maps:
        unused = sorted(set(files) - set(images))
        hint = hint or _name_hint(set(images) - set(files), unused)
        for name in unused:
            problems.warn(location_name(files[name]), name, "the mask has no image of the same name; it is not used")
    rows = []
    for name, image in images.items():
        if all(name in files for files in maps):
            locations = [files[name] for files in maps]
            rows.append({"image": image, "image_id": name, "segment_map": locations, "segments": None})
        else:
            problems.error(
                location_name(image),
                name,
                f"the image has no mask of the same name; {hint or 'add it, or remove it'}",
            )
    return rows


def _name_hint(images: Set[str], masks: Sequence[str]) -> str:
    """A remedy if most masks are named like an image plus one ending, as some tools save them; otherwise ""."""
    endings = Counter[str]()
    for mask in masks:
        # The longest prefix that is an image: "a_1_mask" belongs to "a_1" rather than to "a".
        cut = next((cut for cut in range(len(mask) - 1, 0, -1) if mask[:cut] in images), 0)
        endings[mask[cut:] if cut else ""] += 1
    ending, count = max(endings.items(), key=lambda item: item[1], default=("", 0))
    return (
        f"masks seem to end in {ending!r}: rename them like their images" if ending and 2 * count > len(masks) else ""
    )
