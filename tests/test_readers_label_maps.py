"""Readers of label PNGs: ADE20K, Cityscapes, folders of masks, and data sets of `datasets`."""

import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_segvit.data.checking import check_dataset
from hf_segvit.data.class_lists import read_classes
from hf_segvit.data.label_tables import label_table
from hf_segvit.data.reading import available_splits, describe, load_segmentation_dataset, metadata

from .data_folders import SIZE, halves, mask_folder, write_image, write_json, write_mask

_NAMES = "Sky,Building,Pole,Road,Pavement,Tree,SignSymbol,Fence,Car,Pedestrian,Bicyclist,void"
CAMVID = dict(enumerate(_NAMES.split(",")))


def test_ade20k_shifts_labels_and_leaves_other_void(sample_data: Path) -> None:
    folder = sample_data / "ADEChallengeData2016"
    dataset = load_segmentation_dataset(f"ade20k:{folder}", split="val")
    assert len(dataset) == 3
    for sample in dataset:
        raw = np.asarray(Image.open(folder / "annotations" / "validation" / f"{sample['image_id']}.png"))
        assert np.array_equal(sample["segment_map"], raw.astype(np.int32) - 1)
        present = sorted(set(raw.reshape(-1).tolist()) - {0})
        assert sample["segments"] == [{"id": v - 1, "label_id": v - 1, "is_crowd": False} for v in present]
    assert describe(dataset).id2label[0] == "wall"


def _ade_objects(root: Path) -> str:
    """Wall (stuff 1) above; below two beds (thing 1), one of them over a floor; a bed without object."""
    place = root / "ADEChallengeData2016"
    write_image(place / "images" / "training" / "ADE_train_1.jpg")
    semantic = np.full(SIZE, 1, dtype=np.uint8)
    semantic[10:] = 8
    semantic[10:, 20:] = 4
    objects = np.zeros((*SIZE, 3), dtype=np.uint8)
    objects[10:, :5] = (1, 1, 0)
    objects[10:, 15:25] = (1, 2, 0)
    write_mask(place / "annotations" / "training" / "ADE_train_1.png", semantic)
    write_mask(place / "annotations_instance" / "training" / "ADE_train_1.png", objects)
    return f"ade20k:{root}"


def test_ade20k_panoptic_and_instance(tmp_path: Path) -> None:
    spec = _ade_objects(tmp_path)
    table = label_table("ade20k")
    dataset = load_segmentation_dataset(spec, task="panoptic")
    bed = next(label for label, name in table.id2label.items() if name == "bed")
    sample = dataset[0]
    expected = np.full(SIZE, 0, dtype=np.int32)
    expected[10:, :15] = -1  # a bed that is no object
    expected[10:, 25:] = 3
    expected[10:, :5] = 256 * (bed + 1) + 1
    expected[10:, 15:25] = 256 * (bed + 1) + 2
    assert np.array_equal(sample["segment_map"], expected)
    assert [row["label_id"] for row in sample["segments"]] == [0, 3, bed, bed]
    assert len(describe(dataset).stuff_classes) == 50
    instances = load_segmentation_dataset(spec, task="instance")
    assert [row["label_id"] for row in instances[0]["segments"]] == [0, 0]
    assert len(describe(instances).id2label) == 100
    assert describe(instances).id2label[0] == "bed"
    assert describe(instances).stuff_classes == []


@pytest.mark.parametrize("top", ["", "download/"], ids=["official", "one more folder on top"])
def test_ade20k_archives(tmp_path: Path, top: str) -> None:
    _ade_objects(tmp_path / "plain")
    place = tmp_path / "plain" / "ADEChallengeData2016"
    (tmp_path / "zipped").mkdir()
    for name, members in (
        ("ADEChallengeData2016.zip", ("images", "annotations")),
        ("annotations_instance.zip", ("annotations_instance",)),
    ):
        with zipfile.ZipFile(tmp_path / "zipped" / name, "w") as archive:
            for member in members:
                for file in (place / member).rglob("*.*"):
                    prefix = "ADEChallengeData2016/" if member != "annotations_instance" else ""
                    archive.write(file, top + prefix + str(file.relative_to(place)))
            archive.writestr("__MACOSX/._junk", b"")
    one = load_segmentation_dataset(f"ade20k:{tmp_path / 'plain'}", task="panoptic")[0]
    other = load_segmentation_dataset(f"ade20k:{tmp_path / 'zipped'}", task="panoptic")[0]
    assert np.array_equal(one["segment_map"], other["segment_map"])
    assert one["segments"] == other["segments"]


def test_cityscapes_semantic_equals_the_official_train_ids(sample_data: Path) -> None:
    folder = sample_data / "cityscapes_sample"
    dataset = load_segmentation_dataset(f"cityscapes:{folder}")
    official = np.asarray(Image.open(next(folder.rglob("*_labelTrainIds.png")))).astype(np.int32)
    found, official = dataset[0]["segment_map"], np.where(official == 255, -1, official)
    # The sample's two maps were scaled down apart from one another: 80 border pixels differ.
    assert (found != official).sum() < 0.003 * found.size
    for label in np.unique(found):
        values, counts = np.unique(official[found == label], return_counts=True)
        assert values[counts.argmax()] == label
    assert describe(dataset).split == "val"


def test_cityscapes_objects_and_regions(sample_data: Path, tmp_path: Path) -> None:
    source = next((sample_data / "cityscapes_sample").rglob("*_instanceIds.png"))
    raw = np.asarray(Image.open(source)).astype(np.uint16)
    raw[:4, :9] = 26  # a group of cars
    raw[5:8, :9] = 29  # a caravan, which is not evaluated
    stem = tmp_path / "{}" / "val" / "city" / "city_000000_000001"
    write_image(Path(f"{str(stem).format('leftImg8bit')}_leftImg8bit.png"), raw.shape)
    write_mask(Path(f"{str(stem).format('gtCoarse')}_gtCoarse_instanceIds.png"), raw)
    names = label_table("cityscapes").id2label
    sample = load_segmentation_dataset(f"cityscapes_coarse:{tmp_path}", task="panoptic")[0]
    rows = {row["id"]: row for row in sample["segments"]}
    assert names[rows[26]["label_id"]] == "car"
    assert rows[26]["is_crowd"]
    assert names[rows[26001]["label_id"]] == "car"
    assert [row["id"] for row in rows.values() if row["is_crowd"]] == [26]
    assert not rows[7]["is_crowd"]
    assert 29 not in rows
    assert (sample["segment_map"][5:8, :9] == -1).all()
    for value, row in rows.items():
        assert np.array_equal(sample["segment_map"] == value, raw == value)
        assert label_table("cityscapes").classes[row["label_id"]].source_id == (
            value if value < 1000 else value // 1000
        )
    instances = load_segmentation_dataset(f"cityscapes_coarse:{tmp_path}", task="instance")
    assert describe(instances).id2label == dict(enumerate(list(names.values())[11:]))
    kept = {row["id"]: row["is_crowd"] for row in instances[0]["segments"]}
    assert set(kept) == {value for value in rows if value == 26 or value >= 24000}
    assert kept[26]


def test_camvid(sample_data: Path) -> None:
    folder = sample_data / "camvid"
    assert available_splits(f"mask_folder:{folder}") == ["train", "val"]
    dataset = load_segmentation_dataset(f"mask_folder:{folder}", split="val", classes=CAMVID)
    assert len(dataset) == 101
    raw = np.asarray(Image.open(folder / "annotations" / "val" / f"{dataset[0]['image_id']}.png")).astype(np.int32)
    assert np.array_equal(dataset[0]["segment_map"], np.where(raw == 11, -1, raw))
    assert len(describe(dataset).id2label) == 11


def test_own_masks_with_objects(tmp_path: Path) -> None:
    classes = {
        "classes": [{"value": 9, "name": "car", "is_thing": True}, {"value": 2, "name": "road"}],
        "void": [0],
    }
    spec = mask_folder(tmp_path, classes=classes)
    semantic = halves(2, 9)
    semantic[0] = 0
    numbers = halves(5, 300, dtype=np.uint16)  # the road's number does not count
    numbers[-4:] = 0
    write_mask(tmp_path / "annotations" / "train" / "one.png", semantic)
    write_mask(tmp_path / "instances" / "train" / "one.png", numbers)
    dataset = load_segmentation_dataset(spec, task="panoptic")
    sample = dataset[0]
    assert describe(dataset).id2label == {0: "road", 1: "car"}
    assert describe(dataset).stuff_classes == [0]
    assert sample["segments"] == [
        {"id": 0, "label_id": 0, "is_crowd": False},
        {"id": 1, "label_id": 1, "is_crowd": True},
        {"id": 601, "label_id": 1, "is_crowd": False},
    ]
    assert (sample["segment_map"][0] == -1).all()
    assert (sample["segment_map"][1:-4, 15:] == 601).all()


@pytest.mark.parametrize("form", ["list", "text", "palette", "16 bits", "grey RGB"])
def test_forms_of_classes_and_masks(tmp_path: Path, form: str) -> None:
    spec = mask_folder(tmp_path, classes=["road", "car"])
    mask = Image.fromarray(halves())
    if form == "text":
        (tmp_path / "classes.json").unlink()
        (tmp_path / "classes.txt").write_bytes("﻿road\r\ncar\n\n".encode())
    elif form == "palette":
        mask = mask.convert("P")
        mask.putpalette([200, 10, 10, 200, 10, 10])  # equal colours: only the indices differ
    elif form == "16 bits":
        mask = Image.fromarray(halves(dtype=np.uint16))
    elif form == "grey RGB":
        mask = mask.convert("RGB")
    write_mask(tmp_path / "annotations" / "train" / "one.png", mask)
    dataset = load_segmentation_dataset(spec)
    assert np.array_equal(dataset[0]["segment_map"], halves())
    assert describe(dataset).id2label == {0: "road", 1: "car"}


def test_a_folder_without_splits(tmp_path: Path) -> None:
    spec = mask_folder(tmp_path)
    for kind in ("images", "annotations"):
        for file in (tmp_path / kind / "train").iterdir():
            file.rename(tmp_path / kind / file.name)
        (tmp_path / kind / "train").rmdir()
    assert available_splits(spec) == ["all"]
    assert len(load_segmentation_dataset(spec)) == 1


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "lists no class"),
        ({"0": "void"}, "lists no class"),
        (["a", "a"], "two classes are called 'a'"),
        ({"x": "a"}, "cannot be read as classes"),
        ({"classes": [{"name": "a"}]}, "cannot be read as classes"),
        ({"classes": [{"value": 1, "name": "a"}, {"value": 1, "name": "b"}]}, "value 1 is listed twice"),
        ({"0": " "}, "the class of value 0 has no name"),
        ({"id2label": {"0": "a"}, "stuff_classes": [1]}, "stuff_classes holds 1, which is no number of a class"),
    ],
)
def test_malformed_classes(tmp_path: Path, classes: object, message: str) -> None:
    spec = mask_folder(tmp_path)
    write_json(tmp_path / "classes.json", classes)
    with pytest.raises(ValueError, match=rf"classes\.json: .*{message}"):
        load_segmentation_dataset(spec)


def test_classes_of_models(tmp_path: Path) -> None:
    config = {"id2label": {"1": "void", "0": "road", "2": "car"}, "stuff_classes": [0, 1], "hidden_size": 8}
    path = write_json(tmp_path / "config.json", config)
    found = read_classes(path, of_model=True)
    assert (found.names, dict(found.labels)) == (("road", "void", "car"), {0: 0, 1: 1, 2: 2})
    assert (found.stuff_classes, found.states_things) == ([0, 1], True)
    # In masks the same list has two classes, as nobody labels void.
    of_masks = read_classes(path)
    assert (of_masks.names, dict(of_masks.labels)) == (("road", "car"), {0: 0, 1: -1, 2: 1, 255: -1})
    assert of_masks.stuff_classes == [0]
    (tmp_path / "names.txt").write_text("road\n\n unlabeled \n")
    found = read_classes(tmp_path / "names.txt", of_model=True)
    assert (found.names, found.states_things) == (("road", "unlabeled"), False)
    for wrong, message in (({"0": "a", "2": "b"}, r"numbered \[0, 2\], not 0 to 1 without"), ([], "lists no class")):
        with pytest.raises(ValueError, match=message):
            read_classes(wrong, of_model=True)


@pytest.mark.parametrize("saved", [True, False])
def test_data_sets_of_datasets(tmp_path: Path, saved: bool) -> None:
    colored = np.zeros((*SIZE, 3), dtype=np.uint8)
    colored[..., 0], colored[..., 1] = halves(0, 1), halves(0, 3)
    rows = {
        "image": [Image.fromarray(np.zeros((*SIZE, 3), dtype=np.uint8))],
        "annotation": [Image.fromarray(halves(0, 1))],
        "objects": [Image.fromarray(colored)],
    }
    features = datasets.Features(dict.fromkeys(rows, datasets.Image()))
    table = datasets.Dataset.from_dict(rows, features=features)
    if saved:
        table.save_to_disk(tmp_path / "data")
    else:
        (tmp_path / "data").mkdir()
        table.to_parquet(tmp_path / "data" / "train.parquet")
    spec, classes = (
        f"hub:{tmp_path / 'data'}",
        {"classes": [{"value": 0, "name": "a"}, {"value": 1, "name": "b", "is_thing": True}]},
    )
    dataset = load_segmentation_dataset(spec, classes=classes)
    sample = dataset[0]
    assert sample["image"].size == SIZE[::-1]
    assert np.array_equal(sample["segment_map"], halves())
    assert [row["label_id"] for row in sample["segments"]] == [0, 1]
    assert describe(dataset).id2label == {0: "a", 1: "b"}
    assert set(metadata(dataset).column_names) == {"image", "image_id", "segment_map", "segments"}
    panoptic = load_segmentation_dataset(spec, task="panoptic", classes=classes, annotation_column="objects")
    assert panoptic[0]["segments"][1] == {"id": 3 * 2 + 1, "label_id": 1, "is_crowd": False}
    with pytest.raises(ValueError, match="give classes="):
        load_segmentation_dataset(spec)
    with pytest.raises(ValueError, match="no column of images depth; the columns of images are image, annotation"):
        load_segmentation_dataset(spec, classes=classes, annotation_column="depth")


def test_generated_scenes() -> None:
    dataset = load_segmentation_dataset("generated:hard", num_scenes=3, size=(64, 80))
    assert len(dataset) == 3
    assert dataset[1]["image"].size == (80, 64)
    assert describe(dataset).id2label[0] == "disc"
    assert load_segmentation_dataset("generated:hard?num_scenes=2&size=32")[1]["image"].size == (32, 32)
    with pytest.raises(ValueError, match="'x' is no option"):
        load_segmentation_dataset("generated:hard?x")
    semantic = load_segmentation_dataset("generated:hard", num_scenes=3, size=(64, 80), task="semantic")
    labels = {row["id"]: row["label_id"] for row in dataset[2]["segments"]} | {-1: -1}
    expected = np.vectorize(labels.get)(dataset[2]["segment_map"])
    assert np.array_equal(semantic[2]["segment_map"], expected)
    with pytest.raises(ValueError, match="choose generated:easy or generated:"):
        load_segmentation_dataset("generated:nowhere")


def test_instances_of_generated_scenes_are_their_things() -> None:
    options = {"num_scenes": 4, "size": (64, 80), "seed": 3}
    panoptic = load_segmentation_dataset("generated:hard", **options)
    instance = load_segmentation_dataset("generated:hard", task="instance", **options)
    names, all_names, stuff = describe(instance).id2label, describe(panoptic).id2label, describe(panoptic).stuff_classes
    assert list(names.values()) == [name for label, name in all_names.items() if label not in stuff]
    assert describe(instance).stuff_classes == []
    for whole, things in zip(panoptic, instance, strict=True):
        expected = {row["id"]: all_names[row["label_id"]] for row in whole["segments"] if row["label_id"] not in stuff}
        assert {row["id"]: names[row["label_id"]] for row in things["segments"]} == expected
        is_thing = np.isin(whole["segment_map"], list(expected))
        assert np.array_equal(things["segment_map"], np.where(is_thing, whole["segment_map"], -1))
        assert np.array_equal(np.asarray(things["image"]), np.asarray(whole["image"]))
    assert check_dataset("generated:easy", task="instance", split="val", num_scenes=3).problems.errors == []
