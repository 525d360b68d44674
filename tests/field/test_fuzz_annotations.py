"""Random damage to valid COCO, labelme and YOLO annotations: the same truth, or an error that names file and entry.

A mutation replaces or drops a value anywhere in the file, duplicates or reorders the entries of a list, scales
coordinates out of the image, cuts the text off or writes it in another encoding. Whatever comes of it, the data set is
read with the masks that it had, or the problem is reported with the annotation file; every mask that is left out or
has no pixel is reported, too.
"""

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_segvit.data.checking import check_dataset
from hf_segvit.data.entries import decode_entry
from hf_segvit.data.problems import ProblemList
from hf_segvit.data.reading import describe, load_segmentation_dataset
from hf_segvit.models.mask_encoding import decode_mask

HEIGHT, WIDTH = 24, 32
SQUARES = {"cat": (2, 3, 12, 13), "dog": (14, 4, 28, 20)}  # left, top, right, bottom
TRUTH = [("cat", 100), ("dog", 224)]
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252", "utf-16-le")


def _corners(name: str) -> list[list[float]]:
    left, top, right, bottom = SQUARES[name]
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def coco() -> dict[str, Any]:
    flat = {name: [value for point in _corners(name) for value in point] for name in SQUARES}
    rows = [
        {"id": 1, "category_id": 3, "segmentation": [flat["cat"]], "area": 100, "bbox": [2, 3, 10, 10], "iscrowd": 0},
        {"id": 2, "category_id": 7, "segmentation": _rle("dog"), "area": 224, "bbox": [14, 4, 14, 16], "iscrowd": 0},
    ]
    return {
        "info": {"year": 2026},
        "images": [{"id": 5, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"image_id": 5, **row} for row in rows],
        "categories": [{"id": 3, "name": "cat", "supercategory": "pet"}, {"id": 7, "name": "dog"}],
    }


def _rle(name: str) -> dict[str, Any]:
    left, top, right, bottom = SQUARES[name]
    column = [bottom - top, HEIGHT - (bottom - top)]
    counts = [left * HEIGHT + top] + column * (right - left - 1) + [bottom - top]
    return {"size": [HEIGHT, WIDTH], "counts": [*counts, HEIGHT * WIDTH - sum(counts)]}


def labelme() -> dict[str, Any]:
    left, top, right, bottom = SQUARES["dog"]
    return {
        "version": "5.8.1",
        "shapes": [
            {"label": "cat", "points": _corners("cat"), "shape_type": "polygon", "group_id": None, "flags": {}},
            {"label": "dog", "points": [[left, top], [right, bottom]], "shape_type": "rectangle", "group_id": 1},
        ],
        "imagePath": "a.png",
        "imageData": None,
        "imageHeight": HEIGHT,
        "imageWidth": WIDTH,
    }


def yolo() -> list[list[Any]]:
    return [
        [
            number,
            *(value / (HEIGHT if index else WIDTH) for point in _corners(name) for index, value in enumerate(point)),
        ]
        for number, name in enumerate(SQUARES)
    ]


def _yolo_text(rows: Any) -> str:
    lines = rows if isinstance(rows, list) else [rows]
    return "\n".join(" ".join(map(str, line)) if isinstance(line, list) else str(line) for line in lines)


def _json_text(content: Any) -> str:
    return json.dumps(content)


def _write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8)).save(path)


def _coco_folder(root: Path, text: bytes) -> str:
    _write_image(root / "train" / "a.png")
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train.json").write_bytes(text)
    return f"coco_folder:{root}"


def _labelme_folder(root: Path, text: bytes) -> str:
    _write_image(root / "a.png")
    (root / "a.json").write_bytes(text)
    (root / "classes.txt").write_text("cat\ndog\n")
    return f"labelme:{root}"


def _yolo_folder(root: Path, text: bytes) -> str:
    _write_image(root / "images" / "train" / "a.png")
    (root / "labels" / "train").mkdir(parents=True)
    (root / "labels" / "train" / "a.txt").write_bytes(text)
    (root / "data.yaml").write_text("train: images/train\nnames: [cat, dog]\n")
    return f"yolo:{root}"


FORMATS: dict[str, tuple[Callable[[], Any], Callable[[Any], str], Callable[[Path, bytes], str], str]] = {
    "coco": (coco, _json_text, _coco_folder, "instances_train.json"),
    "labelme": (labelme, _json_text, _labelme_folder, "a.json"),
    "yolo": (yolo, _yolo_text, _yolo_folder, "a.txt"),
}

NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([10**400, -(10**400), 2**31, 2**63, 2**64, -(2**63) - 1, 1e308, 1e-320, 10**18, 0.5, -0.0]),
)
TEXTS = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        [
            "",
            " ",
            "\ud800",
            "a" * 1000,
            "\0",
            "../a.png",
            "/etc/passwd",
            "nan",
            "1e999",
            "9" * 400,
            "true",
            "[1, 2",
            "[",
        ]
    ),
    st.sampled_from(
        ["cat", "dog", "void", "_background_", "__ignore__", "a.png", "\x1b[31m", "\u202e", "polygon", "mask"]
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
KINDS = ("replace", "replace", "replace", "drop", "duplicate", "reorder", "text", "scale", "nest", "rename")


def _places(content: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values within a content, but for the whole."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path for key, value in items for path in ((*place, key), *_places(value, (*place, key)))]


@st.composite
def mutated(draw: st.DrawFn, name: str) -> tuple[bytes, bool]:
    """The text of a damaged file, and whether its meaning is what it was."""
    make, text_of, _, _ = FORMATS[name]
    content, is_same = make(), True
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.sampled_from(KINDS))
        places = _places(content)
        if not places:
            break
        place = draw(st.sampled_from(places))
        parent = content
        for key in place[:-1]:
            parent = parent[key]
        key, value = place[-1], parent[place[-1]]
        is_same = is_same and kind == "reorder" and isinstance(value, list) and name == "coco" and len(place) == 1
        if kind == "replace":
            parent[key] = draw(VALUES)
        elif kind == "drop":
            del parent[key]
        elif kind == "duplicate" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(value))
        elif kind == "reorder" and isinstance(value, list):
            parent[key] = draw(st.permutations(value))
        elif kind == "text" and isinstance(value, int | float):
            parent[key] = str(value)
        elif kind == "scale" and isinstance(value, list):
            factor = draw(st.sampled_from([1.5, -1, 3, 100, 1e6, 1e300]))
            parent[key] = [_scaled(item, factor) for item in value]
        elif kind == "nest":
            parent[key] = [value]
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(TEXTS)] = parent.pop(key)
    text = text_of(content)
    encoding = draw(st.sampled_from(ENCODINGS)) if draw(st.booleans()) else "utf-8"
    raw = text.encode(encoding, "replace")
    if draw(st.integers(0, 9)) == 0:
        raw, is_same = raw[: draw(st.integers(0, len(raw)))], False
    return raw, is_same and encoding in ("utf-8", "utf-8-sig")


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, list):
        return [_scaled(item, factor) for item in value]
    return value * factor if isinstance(value, int | float) and abs(value) < 1e6 else value


def _areas(dataset: Any) -> list[tuple[str, int]]:
    names = describe(dataset).id2label
    return sorted(
        (names[row["label_id"]], int(decode_mask(row["rle"]).sum()))
        for sample in dataset
        for row in sample["segments"]
        if row.get("rle")
    )


def check(name: str, raw: bytes, is_same: bool) -> None:
    """Read a damaged file as `train` and `check-data` do, and compare with the truth."""
    _, _, write, file = FORMATS[name]
    with tempfile.TemporaryDirectory() as folder:
        spec = write(Path(folder), raw)
        problems = ProblemList()
        areas, failure = _read(spec, problems)
        if failure is not None:
            # About the file, its folder where none of it can be used, or the image that has the wrong size.
            assert not is_same, failure
            assert type(failure) is ValueError, repr(failure)
            assert file in str(failure) or "a.png" in str(failure) or folder in str(failure)
            return
        if is_same:
            assert (areas, problems.errors) == (TRUTH, [])
        for problem in problems:
            assert folder in problem.file
            assert problem.message
        if len(areas) < len(TRUTH) or any(area == 0 for _, area in areas):
            # What is missing or has no pixel was told; a changed shape is the annotator's.
            reported = [*problems, *check_dataset(spec).problems]
            assert reported or _is_meant(name, raw)
            if any(area == 0 for _, area in areas):
                assert any("no pixel" in problem.message for problem in reported)
        failure = _read(spec, ProblemList(), "semantic")[1]
        assert failure is None or type(failure) is ValueError, repr(failure)


def _read(spec: str, problems: ProblemList, task: str | None = None) -> tuple[list[tuple[str, int]], ValueError | None]:
    """The areas of all masks, as training decodes them, or the error."""
    try:
        dataset = load_segmentation_dataset(spec, task=task, problems=problems)
        for sample in dataset:
            assert decode_entry(sample).segment_map.shape == (HEIGHT, WIDTH)
        return _areas(dataset), None
    except ValueError as error:
        return [], error


def _is_meant(name: str, raw: bytes) -> bool:
    """Whether a file with fewer masks is a sound one of fewer objects."""
    if name == "yolo":
        return sum(bool(line.strip()) for line in raw.splitlines()) < len(TRUTH)
    content = json.loads(raw)
    entries = content["annotations" if name == "coco" else "shapes"]
    grouped = name == "labelme" and len({str(shape.get("group_id")) for shape in entries}) < len(entries)
    dropped = len(entries) < len(TRUTH)
    return dropped or grouped


def _fuzz(name: str, count: int) -> None:
    @settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(mutated(name))
    def run(damage: tuple[bytes, bool]) -> None:
        check(name, *damage)

    run()


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_few_damaged_files(name: str) -> None:
    _fuzz(name, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FORMATS))
def test_many_damaged_files(name: str) -> None:
    _fuzz(name, 500)
