"""labelme and YOLO: shapes become the masks that pycocotools draws."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from hf_segvit.data.archives import read_json
from hf_segvit.data.problems import ProblemList
from hf_segvit.data.reading import available_splits, describe, load_segmentation_dataset
from hf_segvit.models.mask_encoding import decode_mask

from .data_folders import SIZE, write_image, write_json


def _drawn(*polygons: list[float]) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(list(polygons), *SIZE))).astype(bool)


def _labelme(root: Path, *shapes: dict[str, Any], **changes: Any) -> str:
    write_image(root / "one.jpg")
    content = {"imagePath": "one.jpg", "imageHeight": SIZE[0], "imageWidth": SIZE[1], "shapes": list(shapes), **changes}
    write_json(root / "one.json", content)
    return f"labelme:{root}"


TRIANGLE = [[2, 2], [12, 2], [2, 12]]
SQUARE = [[15, 5], [25, 5], [25, 15], [15, 15]]
FLAT_TRIANGLE, FLAT_SQUARE = [2, 2, 12, 2, 2, 12], [15, 5, 25, 5, 25, 15, 15, 15]


def test_labelme_shapes(tmp_path: Path) -> None:
    part = io.BytesIO()
    Image.fromarray(np.full((3, 4), 255, dtype=np.uint8)).save(part, "PNG")
    spec = _labelme(
        tmp_path,
        {"label": "dog", "points": TRIANGLE, "shape_type": "polygon", "group_id": 1},
        {"label": "dog", "points": SQUARE, "group_id": 1},
        {"label": "cat", "points": [[15, 5], [25, 15]], "shape_type": "rectangle"},
        {"label": "cat", "points": [[10, 10], [10, 15]], "shape_type": "circle"},
        {
            "label": "ant",
            "points": [[6, 7], [9, 9]],
            "shape_type": "mask",
            "mask": base64.b64encode(part.getvalue()).decode(),
        },
    )
    dataset = load_segmentation_dataset(spec)
    assert describe(dataset).id2label == {0: "ant", 1: "cat", 2: "dog"}
    rows = dataset[0]["segments"]
    masks = [decode_mask(row["rle"]) for row in rows]
    assert [row["label_id"] for row in rows] == [2, 1, 1, 0]
    assert np.array_equal(masks[0], _drawn(FLAT_TRIANGLE, FLAT_SQUARE))
    assert np.array_equal(masks[1], _drawn(FLAT_SQUARE))
    assert masks[2].sum() == pytest.approx(np.pi * 25, rel=0.1)  # rasterised
    assert masks[3][7:10, 6:10].all()
    assert masks[3].sum() == 12
    semantic = load_segmentation_dataset(spec, task="semantic")[0]["segment_map"]
    assert (semantic[7:10, 6:10] == 0).all()
    assert semantic[-1, -1] == -1
    assert semantic[3, 3] == 2


def test_labelme_reads_each_file_once_and_the_labels_of_all_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, label in (("train", "dog"), ("val", "ant")):
        _labelme(tmp_path / split, {"label": label, "points": TRIANGLE})
    (tmp_path / "val" / "broken.json").write_text("{")
    read: list[str] = []

    def counted(location: Any) -> Any:
        read.append(location["member"])
        return read_json(location)

    monkeypatch.setattr("hf_segvit.data.readers.labelme.read_json", counted)
    dataset = load_segmentation_dataset(f"labelme:{tmp_path}", split="train")
    assert describe(dataset).id2label == {0: "ant", 1: "dog"}
    assert [row["label_id"] for row in dataset[0]["segments"]] == [1]
    assert len(dataset) == 1
    assert len(read) == len(set(read)) == 3
    with pytest.raises(ValueError, match=r"broken\.json: no valid JSON"):
        load_segmentation_dataset(f"labelme:{tmp_path}", split="val")


def test_labelme_leaves_out_what_has_no_area(tmp_path: Path) -> None:
    spec = _labelme(
        tmp_path,
        {"label": "dog", "points": TRIANGLE},
        {"label": "nose", "points": [[1, 1]], "shape_type": "point"},
        {"label": "__ignore__", "points": SQUARE},
    )
    problems = ProblemList()
    dataset = load_segmentation_dataset(spec, problems=problems)
    assert len(dataset[0]["segments"]) == 1
    assert [problem.severity for problem in problems] == ["warning", "warning"]
    assert describe(dataset).id2label == {0: "dog"}, "a label of points alone is no class"
    write_json(tmp_path / "classes.json", ["dog"])  # which need not list it either
    assert len(load_segmentation_dataset(spec)[0]["segments"]) == 1


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ({"points": TRIANGLE}, {}, r"shapes\[0\]: the shape has no label"),
        ({"label": " ", "points": TRIANGLE}, {}, r"shapes\[0\]: the shape has no label"),
        ({"label": "a", "points": TRIANGLE[:2]}, {}, "at least 3 points"),
        ({"label": "a", "points": [[1, 2], [3]]}, {}, "list of pairs"),
        ({"label": "a", "points": [[1e9, 2], [3, 3], [4, 9]]}, {}, "far outside"),
        ({"label": "a", "points": [[1, 2], [3, 4]], "shape_type": "mask", "mask": "%%"}, {}, "no base64"),
        ({"label": "a", "points": TRIANGLE}, {"imageHeight": None}, "imageHeight and imageWidth"),
        ({"label": "a", "points": TRIANGLE}, {"shapes": None}, "no list `shapes`"),
    ],
)
def test_damaged_labelme(tmp_path: Path, shape: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    spec = _labelme(tmp_path, shape, **changes)
    with pytest.raises(ValueError, match=rf"one\.json.*{message}"):
        load_segmentation_dataset(spec, classes=["a"])


def _yolo(root: Path, lines: str, settings: str = "train: images/train\nnames: [cat, dog]\n") -> str:
    (root / "data.yaml").write_text(settings)
    write_image(root / "images" / "train" / "one.jpg")
    write_image(root / "images" / "train" / "two.jpg", seed=1)
    (root / "labels" / "train").mkdir(parents=True)
    (root / "labels" / "train" / "one.txt").write_text(lines)
    return f"yolo:{root}"


def test_yolo(tmp_path: Path) -> None:
    square = [0.5, 0.25, 0.75, 0.25, 0.75, 0.75, 0.5, 0.75]
    settings = "path: /home/someone/data\ntrain: ../images/train\nnames: {0: cat, 1: dog}\n"
    spec = _yolo(tmp_path, f"1 {' '.join(map(str, square))}\n\n", settings)
    assert available_splits(spec) == ["train"]
    dataset = load_segmentation_dataset(spec)
    assert describe(dataset).id2label == {0: "cat", 1: "dog"}
    (row,) = dataset[0]["segments"]
    pixels = [share * SIZE[1 - place % 2] for place, share in enumerate(square)]
    assert np.array_equal(decode_mask(row["rle"]), _drawn(pixels))
    assert row["label_id"] == 1
    assert dataset[1]["segments"] == []  # no file of labels: an image without objects
    semantic = load_segmentation_dataset(spec, task="semantic")[0]
    assert np.array_equal(semantic["segment_map"] == 1, _drawn(pixels))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2 0.2", "a box, not an outline"),
        ("2 0.1 0.1 0.5 0.1 0.5 0.5", "class 2 is not in data.yaml, whose last is 1"),
        ("-1 0.1 0.1 0.5 0.1 0.5 0.5", "class -1 is not"),
        ("0.5 0.1 0.1 0.5 0.1 0.5 0.5", "must be a whole number"),
        ("nan 0.1 0.1 0.5 0.1 0.5 0.5", "must be a whole number"),
        ("0 0.1 0.1 0.5 0.1 0.5 nan", "NaN or infinite"),
        ("0 10 10 50 10 50 50", "shares of width and height"),
        ("0 0.1 0.1 0.5 0.1 0.5", "at least 3 points"),
        ("cat 0.1 0.1 0.5 0.1 0.5 0.5", "is not a class and numbers"),
    ],
)
def test_damaged_yolo(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"one\.txt: line 1: .*{message}"):
        load_segmentation_dataset(_yolo(tmp_path, line))


@pytest.mark.parametrize(("count", "is_remarked"), [("3", True), ("2", False), ("two", True), ("null", False)])
def test_another_number_of_classes_than_yolo_names_is_remarked(tmp_path: Path, count: str, is_remarked: bool) -> None:
    spec = _yolo(tmp_path, "", f"train: images/train\nnc: {count}\nnames: [cat, dog]\n")
    remarks = [text for text in describe(load_segmentation_dataset(spec)).remarks if "nc is" in text]
    expected = f"nc is {count}, but names lists 2; the names are used, so check that none is missing"
    assert remarks == ([f"{tmp_path / 'data.yaml'}: {expected}"] if is_remarked else [])
    assert describe(load_segmentation_dataset(spec)).id2label == {0: "cat", 1: "dog"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("train: images/train\n", "names is None"),
        ("train: images/train\nnames: [a, a]\n", "list every class once"),
        ("train: /etc\nnames: [a]\n", "absolute or leaves its folder"),
        ("train: images/../../etc\nnames: [a]\n", "absolute or leaves its folder"),
        ("train: images/absent\nnames: [a]\n", "no images in"),
        ("train: [\n", "no valid YAML"),
        ("- 1\n", "holds no settings"),
        ("val: images/train\nnames: [a]\n", "no split 'train'; choose one of val"),
        ("train: !!python/object/apply:os.getcwd []\nnames: [a]\n", "no valid YAML"),
    ],
)
def test_damaged_yolo_settings(tmp_path: Path, settings: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_segmentation_dataset(_yolo(tmp_path, "", settings), split="train")
