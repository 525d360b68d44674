"""What check-data finds in data as people have it: the right suggestion, and no false alarm."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_segvit.cli import main
from hf_segvit.data.checking import check_dataset
from hf_segvit.data.data_report import DataReport, report_text
from hf_segvit.data.problems import some_of
from hf_segvit.lookup import printable

from ..data_folders import SIZE, coco_folder, halves, mask_folder, write_image, write_json, write_mask

SQUARE = "0.1 0.2 0.5 0.2 0.5 0.8 0.1 0.8"
OTHER = "0.6 0.2 0.9 0.2 0.9 0.8 0.6 0.8"


def yolo_folder(root: Path, splits: dict[str, list[str]], names: str) -> str:
    """An image for each text of labels."""
    settings = "".join(f"{split}: images/{split}\n" for split in splits)
    root.mkdir(parents=True, exist_ok=True)
    (root / "data.yaml").write_text(f"{settings}names: {names}\n", encoding="utf-8")
    seed = 0
    for split, texts in splits.items():
        for number, text in enumerate(texts):
            write_image(root / "images" / split / f"{split}{number}.jpg", seed=seed)
            path = root / "labels" / split / f"{split}{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            seed += 1
    return f"yolo:{root}"


def labelme_folder(root: Path, label: str) -> str:
    write_image(root / "a.jpg")
    shape = {"label": label, "points": [[3, 4], [15, 4], [15, 16], [3, 16]], "shape_type": "polygon"}
    content = {"imagePath": "a.jpg", "imageHeight": SIZE[0], "imageWidth": SIZE[1], "shapes": [shape]}
    write_json(root / "a.json", content)
    return f"labelme:{root}"


def messages(spec: str, **options: Any) -> list[str]:
    return [
        f"{problem.severity}: {problem.item}: {problem.message}" for problem in check_dataset(spec, **options).problems
    ]


def test_outlines_of_a_semantic_map_have_pixels(tmp_path: Path) -> None:
    spec = yolo_folder(tmp_path, {"train": [f"0 {SQUARE}\n1 {OTHER}\n0 {OTHER}\n"]}, "[dog, cat]")
    report = check_dataset(f"{spec}?background=true", task="semantic")
    assert list(report.problems) == []
    assert {row.name: (row.segments, row.pixels) for row in report.splits[0].classes} == {
        "background": (1, 600 - 252),
        "dog": (1, 252),
        "cat": (0, 0),  # covered completely: later outlines lie on top
    }


@pytest.mark.parametrize("task", ["instance", "semantic", "panoptic"])
def test_an_outline_without_a_pixel_is_told_in_every_task(tmp_path: Path, task: str) -> None:
    thin = "0 0.701 0.1 0.702 0.1 0.702 0.2"
    spec = yolo_folder(tmp_path, {"train": [f"0 {SQUARE}\n1 {OTHER}\n{thin}\n"]}, "[dog, cat]")
    found = [
        text for text in messages(spec, task=task) if "pixels are void" not in text and "of all pixels" not in text
    ]
    assert found == ["warning: line 3: an outline that covers no pixel of the image; it is left out"]


def test_decisions_and_options_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = yolo_folder(tmp_path, {"train": [f"0 {SQUARE}"], "val": [f"0 {OTHER}"]}, "[crack]")
    assert main(["check-data", spec, "--task", "semantic", "--samples", "0", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("labels: pixels that no annotation covers are the class 'background'") == 1
    assert "0.0% of all pixels void" in printed
    assert main(["check-data", spec, "--samples", "0", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "of all pixels in no object" in printed
    assert "void" not in printed, "background is not void in the instance task"
    assert main(["check-data", spec, "--task", "semantic", "--json", "--samples", "0", "--output", str(tmp_path)]) == 0
    splits = json.loads(capsys.readouterr().out)["splits"]
    assert all("'background'" in split["remarks"][0] for split in splits)


def test_much_void_between_outlines_suggests_a_background(tmp_path: Path) -> None:
    spec = yolo_folder(tmp_path, {"train": [f"0 {SQUARE}\n1 {OTHER}"]}, "[dog, cat]")
    (message,) = messages(spec, task="semantic")
    assert message.startswith("warning: split 'train': 58.0% of all pixels have no annotation and are void")
    assert message.endswith(f"if they are background, give '{spec}?background=background'")
    assert messages(f"{spec}?background=rest", task="semantic") == []
    (tmp_path / "labels" / "train" / "train0.txt").write_text(f"0 {SQUARE}")
    (message,) = messages(spec, task="semantic")
    assert message.startswith("error: split 'train': all pixels are 'dog' or void, so that nothing can be learnt")
    assert "?background=background" in message


def test_a_class_that_occurs_only_as_crowd(tmp_path: Path) -> None:
    def crowd(content: dict[str, Any]) -> None:
        content["annotations"][1]["iscrowd"] = 1
        content["annotations"][1]["segmentation"] = content["annotations"][2]["segmentation"]

    (message,) = messages(coco_folder(tmp_path, crowd))
    assert "class 'dog': it occurs only as crowd (iscrowd 1), and crowds train nothing; CVAT" in message
    report = check_dataset(coco_folder(tmp_path, crowd))
    assert [row.crowds for row in report.splits[0].classes] == [1, 1]


def test_classes_in_one_split_or_one_image_alone(tmp_path: Path) -> None:
    both, one = f"0 {SQUARE}\n1 {OTHER}", f"0 {SQUARE}"
    spec = yolo_folder(
        tmp_path, {"train": [f"{both}\n2 {OTHER}", one, one], "val": [f"{one}\n3 {OTHER}"]}, "[a, b, c, d]"
    )
    assert messages(spec) == [
        "warning: split 'train': classes that occur in this split alone: b, c; they cannot be scored",
        "warning: split 'val': classes that occur in this split alone: d; train has none, so they are not learnt",
    ]
    spec = yolo_folder(tmp_path / "one", {"train": [both, one, one]}, "[a, b]")
    assert messages(spec) == ["warning: : classes that occur in one image alone: b; add images of them"]


def test_misspelt_class_names(tmp_path: Path) -> None:
    names = {"0": "building", "1": "buliding", "2": "Car", "3": "car", "4": "traffic light", "5": "traffic_light"}
    extra = {"6": "towel", "7": "tower", "8": "lane 1", "9": "lane 2", "10": "cat"}
    found = messages(mask_folder(tmp_path, classes=names | extra))
    assert [text.split(" are spelt nearly alike")[0].split("the classes ")[1] for text in found] == [
        "'building' and 'buliding'",
        "'Car' and 'car'",
        "'traffic light' and 'traffic_light'",
    ]
    write_json(tmp_path / "classes.json", {"0": "car", "1": "car "})
    with pytest.raises(ValueError, match="two classes are called 'car'"):
        check_dataset(f"mask_folder:{tmp_path}")


@pytest.mark.parametrize(
    ("largest", "option"), [(4095, "range=0-4095"), (1000, "range=0-1023"), (2300, "range=0-4095")]
)
def test_few_of_16_bits(tmp_path: Path, largest: int, option: str) -> None:
    spec = mask_folder(tmp_path)
    (tmp_path / "images" / "train" / "one.jpg").unlink()
    values = np.linspace(0, largest, SIZE[0] * SIZE[1]).astype(np.uint16).reshape(SIZE)
    Image.fromarray(values).save(tmp_path / "images" / "train" / "one.png")
    (message,) = messages(spec)
    assert "fill less than a sixteenth of their range come out nearly black" in message
    assert f"?{option} for readers" in message
    Image.fromarray(values * (65535 // largest)).save(tmp_path / "images" / "train" / "one.png")
    assert messages(spec) == []


def test_a_nearly_black_image_of_8_bits(tmp_path: Path) -> None:
    spec = mask_folder(tmp_path)
    (tmp_path / "images" / "train" / "one.jpg").unlink()
    for largest, expected in ((15, 1), (200, 0)):
        Image.fromarray(halves(0, largest)).save(tmp_path / "images" / "train" / "one.png")
        assert len(messages(spec)) == expected


def test_images_that_nothing_names(tmp_path: Path) -> None:
    spec = labelme_folder(tmp_path, "cat")
    for number in range(5):
        write_image(tmp_path / f"photo{number}.jpg", seed=1 + number)
    write_image(tmp_path / "overlays" / "a.jpg", seed=9)  # in a folder of its own, which is none of the data set's
    (message,) = messages(spec)
    assert "5 images that no annotation names, not read: photo0.jpg, photo1.jpg, photo2.jpg and 2 more" in message
    content = json.loads((tmp_path / "a.json").read_text())
    write_json(tmp_path / "b.json", {**content, "imagePath": "b.jpg"})
    assert any("do the names differ?" in text for text in messages(spec))


def test_annotations_outside_of_the_splits(tmp_path: Path) -> None:
    labelme_folder(tmp_path / "train", "cat")
    write_image(tmp_path / "late.jpg", seed=1)
    write_json(tmp_path / "late.json", json.loads((tmp_path / "train" / "a.json").read_text()))
    assert messages(f"labelme:{tmp_path}") == [
        "warning: : 1 image with annotations, but in no split, not read: late.jpg",
    ]


def test_splits_with_different_classes_are_compared(tmp_path: Path) -> None:
    spec = yolo_folder(tmp_path, {"train": [f"0 {SQUARE}"], "val": [""]}, "[a, b]")
    report = check_dataset(spec)
    (error,) = report.problems.errors
    assert error.item == "split 'val'"
    assert "no image has a segment of any class" in error.message


class Terminal(io.TextIOWrapper):
    """A stream with an encoding that lacks most letters, as a redirected one on Windows."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="cp1252", errors="strict")

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode("cp1252")


@pytest.mark.parametrize("label", ["猫", "дом", "Straße 🚗"])
def test_names_that_stdout_cannot_encode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str) -> None:
    spec = labelme_folder(tmp_path / label, label)
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["check-data", spec, "--output", str(tmp_path)]) == 0
    assert label.encode("cp1252", "backslashreplace").decode("cp1252") in out.text()
    assert "1 image, 1 segment" in out.text()
    # Every command: the error names a file whose name cannot be shown either.
    assert main(["segment", str(tmp_path / label / "none.jpg"), "--model", "x", "--output", str(tmp_path)]) == 2
    assert "error: " in err.text()
    assert main(["check-data", f"labelme:{tmp_path / (label + '2')}", "--output", str(tmp_path)]) == 2


def test_control_characters_in_names_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = labelme_folder(tmp_path, "cat\x1b[2J\u202e\ndog")
    assert main(["check-data", spec, "--samples", "0", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "cat\\x1b[2J\\u202e\\ndog" in printed
    assert "\x1b" not in printed
    assert main(["check-data", f"{spec}\x1b]0;x", "--output", str(tmp_path)]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_texts() -> None:
    assert printable("a\tb\x07 猫") == "a\\tb\\x07 猫"
    assert some_of(["a", "b", "c"]) == "a, b, c"
    assert some_of(["a", "b", "c", "d"]) == "a, b, c and 1 more"
    report = DataReport("mask_folder:x")
    report.problems.warn("a\x1b.png", "", "of a kind")
    assert report_text(report).endswith("warning: a\\x1b.png: of a kind")


def test_masks_without_images_beside_images_without_masks(tmp_path: Path) -> None:
    spec = mask_folder(tmp_path, ("one", "two"))
    write_mask(tmp_path / "annotations" / "train" / "three.png", halves())
    (tmp_path / "annotations" / "train" / "two.png").unlink()
    assert sorted(messages(spec)) == [
        "error: two: the image has no mask of the same name; add it, or remove it",
        "warning: three: the mask has no image of the same name; it is not used",
    ]
