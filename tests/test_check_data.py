"""The data check: counts against the files, and what the command prints, writes and returns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_segvit.cli import main
from hf_segvit.data.checking import check_dataset

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
