"""Roboflow's "semantic segmentation masks", written here, and the classes and pixels that must be read."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_segvit.cli import main
from hf_segvit.data.checking import check_dataset
from hf_segvit.data.problems import ProblemList
from hf_segvit.data.readers.auto import recognise
from hf_segvit.data.reading import available_splits, describe, load_segmentation_dataset

from ..data_folders import write_mask
from .test_exports import CAR, CAT, box, delivered, image, text

NAME = "street_jpg.rf.0123abcd"
CSV = "Pixel Value, Class\n0, background\n1, car\n2, cat\n"
MAP = box(CAR) * 1 + box(CAT) * 2


def split_folder(root: Path, values: np.ndarray = MAP, csv: str = CSV) -> None:
    image(root / f"{NAME}.jpg")
    write_mask(root / f"{NAME}_mask.png", values.astype(np.uint8))
    text(root / "_classes.csv", csv)


def export(root: Path) -> None:
    for split in ("train", "valid"):
        split_folder(root / split)
    text(root / "README.roboflow.txt", "street - v1\n")


@pytest.mark.parametrize("form", ["folder", "zip", "wrapped", "zip in a folder"])
def test_an_export_as_delivered(form: str, tmp_path: Path) -> None:
    path = delivered(tmp_path, export, form)
    assert recognise(str(path))[0] == "roboflow_masks"
    spec = f"auto:{path}"
    assert available_splits(spec) == ["train", "valid"]
    for split in ("train", "valid", "Train"):
        dataset = load_segmentation_dataset(spec, split=split)
        assert describe(dataset).id2label == {0: "background", 1: "car", 2: "cat"}
        assert np.array_equal(dataset[0]["segment_map"], MAP)
        assert [row["image_id"] for row in dataset.with_format(None)] == [f"{dataset[0]['image_id']}"]


def test_a_single_folder_is_the_split_all(tmp_path: Path) -> None:
    split_folder(tmp_path)
    assert available_splits(f"auto:{tmp_path}") == ["all"]
    assert np.array_equal(load_segmentation_dataset(f"auto:{tmp_path}")[0]["segment_map"], MAP)


def test_void_by_name_value_or_number_255(tmp_path: Path) -> None:
    split_folder(tmp_path, np.where(box(CAT), 255, MAP))
    dataset = load_segmentation_dataset(f"roboflow_masks:{tmp_path}?void=background")
    assert describe(dataset).id2label == {0: "car", 1: "cat"}
    assert np.array_equal(dataset[0]["segment_map"], np.where(box(CAR), 0, -1))


def test_unlabeled_is_void(tmp_path: Path) -> None:
    split_folder(tmp_path, csv="Pixel Value, Class\n0, unlabeled\n1, car\n2, cat\n")
    dataset = load_segmentation_dataset(f"auto:{tmp_path}")
    assert describe(dataset).id2label == {0: "car", 1: "cat"}
    assert np.array_equal(dataset[0]["segment_map"], MAP - 1)


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        ("Pixel Value, Class\n0, background\nx, car\n", r"line 3: 'x,car' is not `value, name`"),
        ("Pixel Value, Class\n0, background\n1\n", r"line 3: '1' is not `value, name`"),
        ("Pixel Value, Class\n0, background\n0, car\n", r"line 3: the value 0 is listed twice"),
        ("Pixel Value, Class\n0, car\n1, car\n", r"two classes are called 'car'"),
        ("Pixel Value, Class\n", r"lists no class"),
    ],
)
def test_faults_of_the_class_file(csv: str, message: str, tmp_path: Path) -> None:
    split_folder(tmp_path / "train", csv=csv)
    with pytest.raises(ValueError, match=rf"_classes\.csv: .*{message}"):
        load_segmentation_dataset(f"roboflow_masks:{tmp_path}")


def test_splits_that_number_classes_differently_are_refused(tmp_path: Path) -> None:
    split_folder(tmp_path / "train")
    split_folder(tmp_path / "valid", csv="Pixel Value, Class\n0, background\n1, cat\n2, car\n")
    with pytest.raises(ValueError, match=r"valid/_classes\.csv: the value 1 is 'cat', but 'car' in another split"):
        load_segmentation_dataset(f"roboflow_masks:{tmp_path}")
    dataset = load_segmentation_dataset(f"roboflow_masks:{tmp_path}", classes=["ground", "car", "cat"])
    assert describe(dataset).id2label[0] == "ground"


def test_values_without_a_class_and_missing_masks_are_named(tmp_path: Path) -> None:
    split_folder(tmp_path, MAP * 3)
    problems = check_dataset(f"roboflow_masks:{tmp_path}").problems
    assert any("_mask.png" in str(problem) and "[0, 1, 2]" in problem.message for problem in problems.errors)
    image(tmp_path / "other.jpg")
    found = ProblemList()
    load_segmentation_dataset(f"roboflow_masks:{tmp_path}", problems=found)
    assert [problem.message[:39] for problem in found] == ["the image has no mask of the same name;"]


def test_the_command_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog) -> None:
    export(tmp_path)
    for seed, split in enumerate(("train", "valid")):
        Image.effect_noise((60, 40), 50 + seed).convert("RGB").save(tmp_path / split / f"{NAME}.jpg")
    assert main(["check-data", f"auto:{tmp_path}", "--samples", "0", "--output", str(tmp_path)]) == 0
    assert "is read as roboflow_masks: there are _classes.csv and masks NAME_mask.png" in caplog.text
    assert "split valid, semantic: 1 image, 3 segments" in capsys.readouterr().out
