"""Files as labelme and X-AnyLabeling write them: the masks, classes and messages that users must get."""

import base64
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_segvit.data.checking import check_dataset
from hf_segvit.data.problems import ProblemList
from hf_segvit.data.reading import available_splits, describe, load_segmentation_dataset
from hf_segvit.models.mask_encoding import decode_mask

from ..data_folders import write_image, write_json

HEIGHT, WIDTH = 48, 64


def _box(label: str, left: int, top: int, right: int, bottom: int, **more: Any) -> dict[str, Any]:
    points = [[left, top], [right, top], [right, bottom], [left, bottom]]
    return {"label": label, "points": points, "shape_type": "polygon", "group_id": None, "flags": {}, **more}


def _mask(label: str, left: int, top: int, size: int, **more: Any) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(np.full((size, size), 255, dtype=np.uint8)).save(file, "PNG")
    points = [[left, top], [left + size - 1, top + size - 1]]
    return {
        "label": label,
        "points": points,
        "shape_type": "mask",
        "mask": base64.b64encode(file.getvalue()).decode(),
        **more,
    }


def _write(root: Path, *shapes: dict[str, Any], name: str = "a", encoding: str = "utf-8", **changes: Any) -> str:
    root.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), 99, dtype=np.uint8)).save(root / f"{name}.jpg")
    content = {
        "version": "5.8.1",
        "flags": {},
        "shapes": shapes,
        "imagePath": f"{name}.jpg",
        "imageData": None,
        "imageHeight": HEIGHT,
        "imageWidth": WIDTH,
        **changes,
    }
    (root / f"{name}.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    return f"labelme:{root}"


def _areas(dataset: Any, index: int = 0) -> list[tuple[str, int]]:
    names = describe(dataset).id2label
    return [(names[row["label_id"]], int(decode_mask(row["rle"]).sum())) for row in dataset[index]["segments"]]


def _counts(dataset: Any, index: int = 0) -> dict[str, int]:
    names = {-1: "void", **describe(dataset).id2label}
    values, counts = np.unique(dataset[index]["segment_map"], return_counts=True)
    return {names[value]: count for value, count in zip(values.tolist(), counts.tolist(), strict=True)}


def test_one_class_has_a_background(tmp_path: Path) -> None:
    spec = _write(tmp_path, _box("crack", 10, 8, 40, 28))
    _write(tmp_path, name="b")  # an image without shapes
    dataset = load_segmentation_dataset(spec, task="semantic")
    assert _counts(dataset) == {"background": HEIGHT * WIDTH - 600, "crack": 600}
    assert _counts(dataset, 1) == {"background": HEIGHT * WIDTH}
    assert dataset[1]["segments"] == [{"id": 0, "label_id": 0, "is_crowd": False}]
    assert "are the class 'background'" in describe(dataset).remarks[0]
    assert describe(dataset.select([0])).remarks == describe(dataset).remarks
    assert _counts(load_segmentation_dataset(f"{spec}?background=wall", task="semantic"))["wall"] > 600
    with pytest.raises(ValueError, match="nothing can be learnt"):
        load_segmentation_dataset(f"{spec}?background=void", task="semantic")
    with pytest.raises(ValueError, match="is for the tasks semantic and panoptic"):
        load_segmentation_dataset(f"{spec}?background=wall")


def test_several_classes_and_void(tmp_path: Path) -> None:
    shapes = _box("b", 0, 0, 20, 10), _box("a", 10, 0, 30, 10), _box("__ignore__", 25, 0, 35, 10)
    spec = _write(tmp_path, *shapes)
    dataset = load_segmentation_dataset(spec, task="semantic")
    assert _counts(dataset) == {"void": HEIGHT * WIDTH - 250, "a": 150, "b": 100}
    assert "background=background" in describe(dataset).remarks[0]
    dataset = load_segmentation_dataset(spec, task="semantic", background=True)
    assert _counts(dataset) == {"void": 100, "background": HEIGHT * WIDTH - 350, "a": 150, "b": 100}
    dataset = load_segmentation_dataset(f"{spec}?void=b&background=rest", task="semantic")
    assert _counts(dataset) == {"void": 200, "rest": HEIGHT * WIDTH - 350, "a": 150}
    assert _areas(load_segmentation_dataset(f"{spec}?drop=b")) == [("a", 200)]
    with pytest.raises(ValueError, match="drop=c is no class"):
        load_segmentation_dataset(f"{spec}?drop=c")


def test_order_of_shapes_counts_in_semantic_maps_also_within_groups(tmp_path: Path) -> None:
    shapes = _box("a", 0, 0, 10, 10, group_id=1), _box("b", 0, 0, 20, 10), _box("a", 15, 0, 20, 10, group_id=1)
    spec = _write(tmp_path, *shapes)
    assert _counts(load_segmentation_dataset(spec, task="semantic")) == {"void": 3072 - 200, "a": 50, "b": 150}
    assert _areas(load_segmentation_dataset(spec)) == [("a", 150), ("b", 200)]


@pytest.mark.parametrize(
    "points",
    [
        [[10, 8], [40, 28]],
        [[40, 28], [10, 8]],
        [[10, 28], [40, 8]],
        [[10, 8], [40, 8], [40, 28], [10, 28]],
        [[40, 28], [40, 8], [10, 8], [10, 28]],
    ],
)
def test_rectangles_by_two_or_four_corners(tmp_path: Path, points: list[list[int]]) -> None:
    spec = _write(tmp_path, {"label": "cat", "points": points, "shape_type": "rectangle"})
    assert _areas(load_segmentation_dataset(spec)) == [("cat", 600)]


@pytest.mark.parametrize("kind", ["rotation", "quadrilateral", "oriented_rectangle", "Polygon", None])
def test_kinds_of_polygons(tmp_path: Path, kind: str | None) -> None:
    points = [[30, 5], [50, 20], [40, 35], [20, 20]]
    spec = _write(tmp_path, {"label": "cat", "points": points, "shape_type": kind, "direction": 0.6})
    ((name, area),) = _areas(load_segmentation_dataset(spec))
    assert name == "cat"
    assert area == pytest.approx(450, rel=0.02)  # by the shoelace formula


def test_round_shapes_and_those_without_area(tmp_path: Path) -> None:
    shapes = [
        {"label": "cat", "points": [[20, 20], [20, 30]], "shape_type": "circle"},
        {"label": "cat", "points": [[10, 10], [30, 40]], "shape_type": "ellipse"},
        {"label": "cat", "points": [[20, 10], [30, 25], [20, 40], [10, 25]], "shape_type": "ellipse"},
        {"label": "cat", "points": [[1, 1], [5, 5]], "shape_type": "line"},
        {"label": "cat", "points": [[1, 1], [5, 5], [9, 2]], "shape_type": "cuboid"},
        {"label": "cat", "points": [[5, 5], [5, 5]], "shape_type": "rectangle"},
        _box("cat", -20, -20, -5, -5),
    ]
    problems = ProblemList()
    dataset = load_segmentation_dataset(_write(tmp_path, *shapes), problems=problems)
    assert [area for _, area in _areas(dataset)] == pytest.approx([314, 471, 471], rel=0.04)
    assert [(problem.item, problem.severity) for problem in problems] == [
        (f"shapes[{index}]", "warning") for index in (3, 4, 5, 6)
    ]
    assert [problem.message for problem in problems] == [
        "a shape of type 'line' has no area and is left out",
        "a shape of type 'cuboid' is not read (save it as a polygon) and is left out",
        "a rectangle that covers no pixel of the image is left out",
        "a polygon that covers no pixel of the image is left out",
    ]


@pytest.mark.parametrize("group_id", [0, 1, "left"])
def test_masks_of_a_group_are_one_object(tmp_path: Path, group_id: Any) -> None:
    shapes = [
        _mask("cat", 0, 0, 10, group_id=group_id),
        _mask("cat", 30, 20, 10, group_id=group_id),
        _box("cat", 50, 30, 60, 40, group_id=group_id),
        _mask("dog", 20, 0, 10, group_id=group_id),
        _mask("cat", 5, 5, 10),
    ]
    for ordered in (shapes, [shapes[2], *shapes[:2], *shapes[3:]]):
        dataset = load_segmentation_dataset(_write(tmp_path, *ordered))
        assert _areas(dataset) == [("cat", 300), ("dog", 100), ("cat", 100)]


@pytest.mark.parametrize(
    ("encoding", "label", "said"),
    [("gbk", "猫咪", "GBK"), ("shift_jis", "自転車", "Shift JIS"), ("cp1252", "Bäume", "Windows-1252")],
)
def test_other_encodings_are_named(tmp_path: Path, encoding: str, label: str, said: str) -> None:
    spec = _write(tmp_path, _box(label, 10, 8, 40, 28), encoding=encoding)
    message = rf"a\.json: no valid UTF-8 text \(byte \d+\), perhaps .*{said}.*; save it as UTF-8"
    with pytest.raises(ValueError, match=message):  # also where no file can be read
        load_segmentation_dataset(spec)
    _write(tmp_path, _box("dog", 10, 8, 40, 28), name="b")
    with pytest.raises(ValueError, match=message):
        load_segmentation_dataset(spec)
    problems = ProblemList()
    assert len(load_segmentation_dataset(spec, problems=problems)) == 1
    assert len(problems.errors) == 1
    (tmp_path / "labels.txt").write_bytes(label.encode(encoding))
    with pytest.raises(ValueError, match=rf"labels\.txt: no valid UTF-8 text .*perhaps .*{said}"):
        load_segmentation_dataset(spec)


def test_utf_8_with_byte_order_mark_and_utf_16_are_read(tmp_path: Path) -> None:
    for name, encoding in (("a", "utf-8-sig"), ("b", "utf-16")):
        spec = _write(tmp_path, _box("猫", 10, 8, 40, 28), name=name, encoding=encoding)
    dataset = load_segmentation_dataset(spec)
    assert _areas(dataset, 0) == _areas(dataset, 1) == [("猫", 600)]


@pytest.mark.parametrize("background", ["_background_", "_Background_"])
def test_labels_txt_of_labelme(tmp_path: Path, background: str) -> None:
    spec = _write(tmp_path, _box("crack", 10, 8, 40, 28), _box("__ignore__", 0, 0, 10, 5))
    (tmp_path / "labels.txt").write_text(f"__ignore__\n{background}\ncrack\n")
    dataset = load_segmentation_dataset(spec)
    assert describe(dataset).id2label == {0: "crack"}
    assert _areas(dataset) == [("crack", 600)]
    dataset = load_segmentation_dataset(spec, task="semantic")
    assert describe(dataset).id2label == {0: background, 1: "crack"}
    assert _counts(dataset) == {"void": 50, background: HEIGHT * WIDTH - 650, "crack": 600}


def test_labels_with_blanks_are_one_class(tmp_path: Path) -> None:
    spec = _write(tmp_path, _box("car ", 0, 0, 10, 10), _box("car", 20, 0, 30, 10))
    assert _areas(load_segmentation_dataset(spec)) == [("car", 100), ("car", 100)]


@pytest.mark.parametrize("path", ["C:\\Users\\ann\\work\\a.jpg", "/home/ann/a.jpg", "../../images/a.jpg"])
def test_image_beside_a_file_with_another_computers_path(tmp_path: Path, path: str) -> None:
    spec = _write(tmp_path / "train", _box("cat", 10, 8, 40, 28), imagePath=path)
    problems = ProblemList()
    dataset = load_segmentation_dataset(f"labelme:{tmp_path}", problems=problems)
    assert _areas(dataset) == [("cat", 600)]
    (problem,) = problems
    assert (problem.severity, problem.file) == ("warning", str(tmp_path / "train" / "a.json"))
    assert "read train/a.jpg beside the file" in problem.message
    (tmp_path / "train" / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"a\.json: imagePath .* no image of that name is beside the file"):
        load_segmentation_dataset(spec)


def test_images_without_a_file_are_named(tmp_path: Path) -> None:
    spec = _write(tmp_path, _box("cat", 10, 8, 40, 28))
    _write(tmp_path, name="b")
    (tmp_path / "b.json").unlink()
    (message,) = (problem.message for problem in check_dataset(spec).problems)
    assert message.startswith("1 image that no annotation names, not read: b.jpg")


def test_panoptic_with_a_list_of_stuff(tmp_path: Path) -> None:
    shapes = (
        _box("car", 0, 0, 10, 10),
        _box("road", 0, 0, 64, 20),
        _box("road", 0, 30, 64, 40),
        _box("car", 20, 0, 30, 5),
    )
    spec = _write(tmp_path, *shapes, _mask("car", 40, 0, 10, group_id=1), _mask("car", 50, 0, 10, group_id=1))
    dataset = load_segmentation_dataset(f"{spec}?stuff=road", task="panoptic")
    assert describe(dataset).stuff_classes == [1]
    assert _counts_of_segments(dataset) == [("car", 50), ("car", 100), ("car", 200), ("road", 1570)]
    assert (dataset[0]["segment_map"] == -1).sum() == HEIGHT * WIDTH - 64 * 30
    dataset = load_segmentation_dataset(f"{spec}?stuff=road&background=rest", task="panoptic")
    assert describe(dataset).stuff_classes == [0, 2]
    assert ("rest", HEIGHT * WIDTH - 64 * 30) in _counts_of_segments(dataset)
    (tmp_path / "classes.json").write_text(
        json.dumps(
            {
                "classes": [
                    {"value": 0, "name": "road", "is_thing": False},
                    {"value": 1, "name": "car", "is_thing": True},
                ]
            }
        )
    )
    assert describe(load_segmentation_dataset(spec, task="panoptic")).stuff_classes == [0]
    with pytest.raises(ValueError, match="stuff=rode is no class; did you mean road"):
        load_segmentation_dataset(f"{spec}?stuff=rode", task="panoptic")


def _counts_of_segments(dataset: Any) -> list[tuple[str, int]]:
    names, sample = describe(dataset).id2label, dataset[0]
    areas = ((sample["segment_map"] == row["id"]).sum() for row in sample["segments"])
    return sorted((names[row["label_id"]], int(area)) for row, area in zip(sample["segments"], areas, strict=True))


@pytest.mark.parametrize("packing", ["zip", "zip of a folder", "folder in a folder"])
@pytest.mark.parametrize("splits", [(), ("train", "val")])
def test_an_export_with_a_folder_around_it(packing: str, splits: tuple[str, ...], tmp_path: Path) -> None:
    source = tmp_path / "source" / "my photos"
    for folder in [source / split for split in splits] or [source]:
        write_image(folder / "a.jpg", (40, 60))
        shape = {"label": "car", "points": [[5, 5], [25, 5], [25, 15], [5, 15]], "shape_type": "polygon"}
        content = {"imagePath": "a.jpg", "imageHeight": 40, "imageWidth": 60, "shapes": [shape]}
        write_json(folder / "a.json", content)
    (source / "labels.txt").write_text("__ignore__\n_background_\ncar\ncat\n")
    path = tmp_path / "source"
    if packing != "folder in a folder":
        path = tmp_path / "export.zip"
        base = source if packing == "zip" else source.parent
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(source.rglob("*.*")):
                archive.write(file, file.relative_to(base))
    spec = f"auto:{path}"
    assert available_splits(spec) == list(splits or ("all",))
    for split in splits or ("all",):
        dataset = load_segmentation_dataset(spec, split=split)
        assert describe(dataset).id2label == {0: "car", 1: "cat"}
        (entry,) = dataset
        assert entry["image_id"] == (f"{split}/a" if splits else "a")
        assert [int(decode_mask(row["rle"]).sum()) for row in entry["segments"]] == [200]
