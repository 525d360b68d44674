"""Which split is read: those that a data set has, other names for them, and the one to score on where none is named."""

import json
from pathlib import Path

import datasets
import pytest

from hf_segvit import EoMTImageProcessor
from hf_segvit.cli import main
from hf_segvit.data.reading import available_splits, describe, load_segmentation_dataset, validation_split

from .data_folders import coco_content, coco_folder, halves, mask_folder, write_image, write_json, write_mask
from .tiny_models import tiny_eomt


def _yolo(root: Path) -> str:
    write_image(root / "images" / "train" / "a.jpg")
    (root / "data.yaml").write_text("train: images/train\nnames: [a]\n")
    return f"yolo:{root}"


def _cityscapes(root: Path) -> str:
    write_mask(root / "gtFine" / "train" / "city" / "a_gtFine_labelIds.png", halves(7, 8))
    return f"cityscapes:{root}"


def _ade20k(root: Path) -> str:
    write_image(root / "images" / "training" / "a.jpg")
    return f"ade20k:{root}"


def _labelme(root: Path) -> str:
    write_json(root / "train" / "a.json", {})
    return f"labelme:{root}"


def _saved(root: Path) -> str:
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"a": [1]})}).save_to_disk(str(root / "saved"))
    return f"hub:{root / 'saved'}"


@pytest.mark.parametrize("write", [mask_folder, coco_folder, _yolo, _cityscapes, _ade20k, _labelme, _saved])
def test_a_split_that_is_not_there_is_told_with_those_that_are(write, tmp_path: Path) -> None:
    spec = write(tmp_path)
    # "elsewhere" is no usual name, "val" is one in every format.
    for split in ("val", "elsewhere"):
        with pytest.raises(ValueError, match=rf"there is no split '{split}'; choose one of train$"):
            load_segmentation_dataset(spec, split=split)


def test_coco_points_to_the_format_for_other_classes(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path).partition(":")[2]
    with pytest.raises(ValueError, match=r"no panoptic annotations of split 'train'.* format coco_folder"):
        load_segmentation_dataset(f"coco:{folder}", task="panoptic")
    (tmp_path / "annotations" / "instances_train.json").unlink()
    with pytest.raises(ValueError, match=r"no split of a coco data set.* format coco_folder"):
        load_segmentation_dataset(f"coco:{folder}", split="val")


def test_splits_of_other_names(tmp_path: Path) -> None:
    spec = coco_folder(tmp_path / "coco")
    write_json(tmp_path / "coco" / "annotations" / "instances_mine.json", coco_content())
    write_image(tmp_path / "coco" / "mine" / "a.jpg")
    assert available_splits(spec) == ["train", "mine"]
    assert describe(load_segmentation_dataset(spec, split="mine")).split == "mine"
    spec = mask_folder(tmp_path / "masks", ("one",))
    mask_folder(tmp_path / "masks", ("two", "three"), split="valid")
    assert available_splits(spec) == ["train", "valid"]
    assert len(load_segmentation_dataset(spec, split="all")) == 3
    assert available_splits(_ade20k(tmp_path / "ade"), wanted=["training", "nowhere"]) == ["train", "training"]


def test_the_split_to_score_on(tmp_path: Path) -> None:
    spec = mask_folder(tmp_path)
    with pytest.raises(ValueError, match=r"no split to score on, only train; name one with --split"):
        validation_split(spec, "name one with --split")
    for name in ("test", "valid", "validation", "val"):  # from the last choice to the first
        mask_folder(tmp_path, split=name)
        assert validation_split(spec, "") == name


def test_evaluate_finds_the_split_that_training_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = mask_folder(tmp_path / "data", ("one", "two"))
    model = tmp_path / "model"
    tiny_eomt(id2label={0: "road", 1: "car"}).save_pretrained(model)
    EoMTImageProcessor(size=64, task="semantic").save_pretrained(model)
    command = ["evaluate", "--model", str(model), "--data", spec, "--task", "semantic", "--device", "cpu"]
    command += ["--json", str(tmp_path / "numbers.json")]
    assert main(command) == 2
    assert "no split to score on, only train; name one with --split" in capsys.readouterr().err
    mask_folder(tmp_path / "data", ("three",), split="valid")
    assert main(command) == 0
    content = json.loads((tmp_path / "numbers.json").read_text())
    assert (content["split"], content["num_images"]) == ("valid", 1)
