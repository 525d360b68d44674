"""The data check: counts against the files, and what the command prints, writes and returns."""

import inspect
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_segvit.cli import main
from hf_segvit.data.checking import check_dataset
from hf_segvit.data.data_report import DataReport, report_text
from hf_segvit.data.readers import FORMATS, NOT_OPTIONS
from hf_segvit.data.reading import load_segmentation_dataset

from .data_folders import SIZE, coco_folder, halves, mask_folder, panoptic_folder, write_mask


def test_counts_of_coco(sample_data: Path) -> None:
    folder = sample_data / "coco_train100"
    (split,) = check_dataset(f"coco:{folder}").splits
    content = json.loads((folder / "annotations" / "panoptic_train2017.json").read_text())
    infos = [info for entry in content["annotations"] for info in entry["segments_info"]]
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    pixels = sum(image["height"] * image["width"] for image in content["images"])
    assert (split.images, split.segments, split.crowds) == (100, 1111, 6)
    assert split.void_share == pytest.approx(1 - sum(info["area"] for info in infos) / pixels, abs=1e-12)
    for row in split.classes:
        mine = [info for info in infos if names[info["category_id"]] == row.name]
        assert row.pixels == sum(info["area"] for info in mine)
        assert row.segments == sum(not info["iscrowd"] for info in mine)


def test_overlapping_masks_count_once_as_labelled(tmp_path: Path) -> None:
    def overlap(content: dict[str, Any]) -> None:
        content["annotations"][1]["segmentation"] = content["annotations"][0]["segmentation"]

    (split,) = check_dataset(coco_folder(tmp_path, overlap)).splits
    assert (split.segments, split.crowds) == (3, 1)
    assert {row.name: row.segments for row in split.classes} == {"cat": 1, "dog": 1}
    cat, dog = split.classes
    assert cat.pixels == dog.pixels + 40  # the crowd's
    assert split.void_share == pytest.approx(1 - cat.pixels / (SIZE[0] * SIZE[1]))


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = mask_folder(tmp_path / "data", ("one", "two"))
    assert main(["check-data", spec, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "split train, semantic: 2 images, 4 segments, 0 crowds, 0 images without segments, 0.0%" in printed
    assert "road                                 2         2   50.00%" in printed
    assert "0 problems that would hurt training, 0 warnings" in printed
    sheet = Image.open(tmp_path / "out" / "contact_sheet.png")
    assert sheet.width > 2 * 480
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 100  # drawn, not blank


def test_the_command_as_json_with_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = mask_folder(tmp_path / "data", ("one", "two"))
    write_mask(tmp_path / "data" / "annotations" / "train" / "two.png", halves(0, 9))
    assert main(["check-data", spec, "--json", "--output", str(tmp_path)]) == 1
    report = json.loads(capsys.readouterr().out)
    (problem,) = report["problems"]
    assert problem["file"].endswith("two.jpg")
    assert problem["item"] == "image 'two'"
    assert "two.png: the mask holds the values [9]" in problem["message"]
    assert problem["severity"] == "error"
    assert report["splits"][0]["images"] == 1
    assert [row["segments"] for row in report["splits"][0]["classes"]] == [1, 1]


def test_problems_of_one_kind_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = tuple(f"image {number}" for number in range(12))
    spec = mask_folder(tmp_path, names, classes={"0": "road", "1": "car", "2": "sky"})
    for number, name in enumerate(names):
        values = halves(0, 9 + number)
        values[0, : number % 3] = range(60, 60 + number % 3)  # one to three strange values
        write_mask(tmp_path / "annotations" / "train" / f"{name}.png", values)
    (tmp_path / "annotations" / "train" / "image 11.png").unlink()
    assert main(["check-data", spec, "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "12 problems that would hurt training, 0 warnings" in printed
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2
    assert "image 11.jpg: image 11: the image has no mask" in lines[0]
    assert "image 0.png: the mask holds the values [9], which stand for no class" in lines[1]
    assert lines[1].endswith("(... and 10 more of this kind)")
    assert "does not occur" not in printed, "nothing was read that a class could occur in"
    assert printed.rstrip().endswith("--json lists all")
    main(["check-data", spec, "--output", str(tmp_path), "--json"])
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 12


def test_a_few_problems_are_all_listed_and_kinds_are_limited() -> None:
    report = DataReport("mask_folder:x")
    for number in range(3):
        report.problems.error(f"/x/{number}.png", f"image '{number}'", f"/y/{number}.png: the value {number}")
    for kind in "abcdefgh":
        report.problems.warn("/x/1.png", "", f"of kind {kind}")
    lines = report_text(report).splitlines()
    assert lines[2] == "3 problems that would hurt training, 8 warnings"
    assert len(lines) == 3 + 3 + 8
    lines = report_text(report, most_lines=5).splitlines()
    assert lines[-2:] == ["... and 6 more of other kinds", "--json lists all"]
    assert len(lines) == 3 + 5 + 2


def test_few_values_are_told_in_the_report_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr("hf_segvit.models.image_values.logger.warning_once", warned.append)
    spec = mask_folder(tmp_path)
    path = tmp_path / "images" / "train" / "one.jpg"
    path.unlink()
    Image.fromarray(np.full(SIZE, 1000, dtype=np.uint16)).save(path.with_suffix(".png"))
    assert main(["check-data", spec, "--output", str(tmp_path / "sheet.png")]) == 0
    assert "come out nearly black; most likely 1023 is white" in capsys.readouterr().out
    assert warned == []
    assert load_segmentation_dataset(spec)[0]["image"].size == SIZE[::-1]
    assert len(warned) == 1


def test_counts_of_one_have_no_plural(tmp_path: Path) -> None:
    spec = mask_folder(tmp_path, classes={"0": "road", "1": "car", "2": "sky"})
    text = report_text(check_dataset(spec))
    assert "1 class does not occur: sky" in text
    assert "1 image, 2 segments, 0 crowds, 0 images without" in text


def test_masks_named_with_an_ending_and_other_layouts_are_explained(tmp_path: Path) -> None:
    names = ("p1", "p10", "p2")
    spec = mask_folder(tmp_path / "ending", names)
    for name in names:
        mask = tmp_path / "ending" / "annotations" / "train" / f"{name}.png"
        mask.rename(mask.with_name(f"{name}_mask.png"))
    errors = check_dataset(spec).problems.errors
    assert {error.message for error in errors[:3]} == {
        "the image has no mask of the same name; masks seem to end in '_mask': rename them like their images"
    }
    assert "there are no images for semantic segmentation; expected images/train/NAME.jpg" in errors[3].message
    spec = mask_folder(tmp_path / "missing", names)
    for name in names:
        (tmp_path / "missing" / "annotations" / "train" / f"{name}.png").unlink()
    messages = {error.message for error in check_dataset(spec).problems.errors[:3]}
    assert messages == {"the image has no mask of the same name; add it, or remove it"}
    (tmp_path / "missing" / "classes.json").unlink()
    with pytest.raises(ValueError, match=r"no masks of split 'train'; expected images/train/NAME\.jpg"):
        load_segmentation_dataset(spec)


def test_broken_json_still_gives_a_clean_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = coco_folder(tmp_path)
    (tmp_path / "annotations" / "instances_train.json").write_text("{")
    assert main(["check-data", spec, "--output", str(tmp_path)]) == 2
    assert "instances_train.json: no valid JSON at line 1" in capsys.readouterr().err


@pytest.mark.parametrize(("data", "recipe"), [("panoptic", "eomt_coco_panoptic"), ("instance", "eomt_coco_instance")])
def test_augmented_samples_are_drawn(tmp_path: Path, data: str, recipe: str) -> None:
    spec = panoptic_folder(tmp_path) if data == "panoptic" else coco_folder(tmp_path)
    arguments = ["check-data", spec, "--task", data, "--augment", recipe, "--size", "64", "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert Image.open(tmp_path / "contact_sheet.png").width > 4 * 480
    assert main([*arguments[:5], "absent", *arguments[6:]]) == 2


def test_samples_are_spread_over_splits(tmp_path: Path) -> None:
    spec = mask_folder(tmp_path, tuple("abcdef"))
    report = check_dataset(spec, num_samples=3)
    assert [sample["image_id"] for sample, _ in report.samples] == ["a", "c", "f"]
    assert check_dataset(spec, num_samples=0).samples == []


def test_the_help_lists_formats_layouts_and_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["check-data", "--help"])
    assert stop.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    for name, about in FORMATS.items():
        module = import_module(about.module)
        assert f" {name}: {about.description} {module.LAYOUT} " in words
        parameters = [option for option in inspect.signature(module.read).parameters if option not in NOT_OPTIONS]
        assert list(about.options) == [option for option in parameters if option not in about.preset]
    assert "panoptic also instances/train/NAME.png; without splits, files lie directly in images" in words
    assert "options: num_scenes, size, seed" in words
    assert "'generated:hard?num_scenes=50&size=64'" in words
    # The list is made when it is asked for alone: readers take a second to import.
    monkeypatch.setitem(sys.modules, "hf_segvit.data.reading", None)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "check-data" in capsys.readouterr().out
