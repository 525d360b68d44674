"""COCO readers against the JSON files, pycocotools and themselves in zip form."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

from hf_segvit.data.label_tables import label_table
from hf_segvit.data.reading import (
    available_splits,
    decoder_of,
    describe,
    load_segmentation_dataset,
    metadata,
)
from hf_segvit.evaluation.tasks import evaluation_task
from hf_segvit.metrics.mask_average_precision import MaskAveragePrecision
from hf_segvit.models.mask_encoding import decode_mask

from .coco_instances import STATISTICS, pycocotools_statistics
from .data_folders import SIZE, coco_folder, colored, panoptic_folder, write_image, write_json, write_mask


def test_panoptic_agrees_with_json_and_png(sample_data: Path) -> None:
    folder = sample_data / "coco_train100"
    dataset = load_segmentation_dataset(f"coco:{folder}")
    content = json.loads((folder / "annotations" / "panoptic_train2017.json").read_text())
    annotations = {entry["image_id"]: entry for entry in content["annotations"]}
    labels = {
        entry["id"]: place for place, entry in enumerate(sorted(content["categories"], key=lambda row: row["id"]))
    }
    assert [row["image_id"] for row in metadata(dataset)] == [image["id"] for image in content["images"]]
    number = crowds = 0
    for image, sample in zip(content["images"], dataset, strict=True):
        assert sample["image"].size == (image["width"], image["height"])
        assert sample["image"].mode == "RGB"
        assert sample["segment_map"].dtype == np.int32
        expected = annotations[image["id"]]["segments_info"]
        areas = dict(zip(*np.unique(sample["segment_map"], return_counts=True), strict=True))
        assert {info["id"]: info["area"] for info in expected} == {i: n for i, n in areas.items() if i != -1}
        assert sample["segments"] == [
            {"id": info["id"], "label_id": labels[info["category_id"]], "is_crowd": bool(info["iscrowd"])}
            for info in expected
        ]
        number, crowds = number + len(expected), crowds + sum(info["iscrowd"] for info in expected)
    assert (number, crowds) == (1111, 6)
    facts = describe(dataset)
    assert (facts.task, facts.split, facts.format) == ("panoptic", "train", "coco")
    assert facts.id2label == label_table("coco_panoptic").id2label
    assert facts.stuff_classes == list(range(80, 133))


def test_an_archive_may_wrap_all_in_one_folder(tmp_path: Path) -> None:
    spec = coco_folder(tmp_path / "data")
    for name, top in (("plain.zip", ""), ("wrapped.zip", "my data/")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for file in sorted((tmp_path / "data").rglob("*.*")):
                archive.write(file, top + str(file.relative_to(tmp_path / "data")))
        zipped = load_segmentation_dataset(f"coco_folder:{tmp_path / name}")
        assert metadata(zipped)[0]["image"]["member"] == f"{top}train/a.jpg"
        assert zipped[0]["segments"] == load_segmentation_dataset(spec)[0]["segments"]
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:  # two folders on top are no wrapping
        archive.writestr("my data/train.json", b"{}")
        archive.writestr("other/a.jpg", b"")
    with pytest.raises(ValueError, match="no split of a coco_folder data set is there"):
        available_splits(f"coco_folder:{tmp_path / 'two.zip'}")


def test_official_archives_give_the_same(sample_data: Path, tmp_path: Path) -> None:
    source = sample_data / "coco_train100"
    with zipfile.ZipFile(tmp_path / "train2017.zip", "w") as archive:
        for file in sorted((source / "train2017").iterdir()):
            archive.write(file, f"train2017/{file.name}")
    with zipfile.ZipFile(tmp_path / "inner.zip", "w") as archive:
        for file in sorted((source / "annotations" / "panoptic_train2017").iterdir()):
            archive.write(file, f"panoptic_train2017/{file.name}")
    with zipfile.ZipFile(tmp_path / "panoptic_annotations_trainval2017.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(source / "annotations" / "panoptic_train2017.json", "annotations/panoptic_train2017.json")
        archive.write(tmp_path / "inner.zip", "annotations/panoptic_train2017.zip")
    (tmp_path / "inner.zip").unlink()
    zipped = load_segmentation_dataset(f"coco:{tmp_path}", split="train2017")
    plain = load_segmentation_dataset(f"coco:{source}")
    assert metadata(zipped)[0]["image"]["archive"] == str(tmp_path / "train2017.zip")
    for place in (0, 42, 99):
        one, other = zipped[place], plain[place]
        assert np.array_equal(np.asarray(one["image"]), np.asarray(other["image"]))
        assert np.array_equal(one["segment_map"], other["segment_map"])
        assert one["segments"] == other["segments"]


def test_instances_equal_pycocotools(sample_data: Path, tmp_path: Path) -> None:
    source = sample_data / "coco_instances_sample" / "instances_val2014_100.json"
    (tmp_path / "annotations").mkdir()
    shutil.copy(source, tmp_path / "annotations" / "instances_val2014.json")
    content = json.loads(source.read_text())
    (tmp_path / "val2014").mkdir()
    for image in content["images"]:  # no pixels are needed for masks
        (tmp_path / "val2014" / image["file_name"]).touch()
    dataset = load_segmentation_dataset(f"coco:{tmp_path}", split="val", task="instance")
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    labels = label_table("coco_instance").source_id_to_label
    found = {}
    for sample in dataset.select_columns(["segment_map", "segments"]):
        found |= {row["id"]: row for row in sample["segments"]}
    assert len(found) == len(content["annotations"]) == 839
    for entry in content["annotations"]:
        height, width = sizes[entry["image_id"]]
        rle = coco_mask.frPyObjects(entry["segmentation"], height, width)
        rle = coco_mask.merge(rle) if isinstance(rle, list) else rle
        row = found[entry["id"]]
        assert row["rle"] == {"size": [height, width], "counts": rle["counts"].decode()}
        assert (row["label_id"], row["is_crowd"]) == (labels[entry["category_id"]], bool(entry["iscrowd"]))


def test_areas_of_annotations_decide_what_is_small_as_in_pycocotools(tmp_path: Path) -> None:
    size = (60, 80)
    squares = {  # (side of the square, area that the annotation states): COCO's borders are at 32 and 96 squared
        1: (31, 1100.0),  # small by its mask, medium by its annotation
        2: (34, 900.0),  # the other way round
        3: (20, None),  # an annotation without area
    }
    annotations, results = [], []
    for number, (side, area) in squares.items():
        outline = [[5, 5, 5 + side, 5, 5 + side, 5 + side, 5, 5 + side]]
        row = {"id": number, "image_id": number, "category_id": 3, "segmentation": outline, "iscrowd": 0}
        annotations.append(row if area is None else {**row, "area": area})
        (rle,) = coco_mask.frPyObjects(outline, *size)
        # Of the first the prediction is right, of the second half of it, of the third nothing.
        guess = np.zeros(size, dtype=np.uint8, order="F")
        guess[5 : 5 + (side, side * 2 // 3, 0)[number - 1], 5 : 5 + side] = 1
        counts = (rle if number == 1 else coco_mask.encode(guess))["counts"].decode()
        results.append(
            {"image_id": number, "category_id": 3, "segmentation": {"size": [*size], "counts": counts}, "score": 0.9}
        )
    images = [{"id": n, "file_name": f"{n}.jpg", "height": size[0], "width": size[1]} for n in squares]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "cat"}]}
    for number in squares:
        write_image(tmp_path / "train" / f"{number}.jpg", size)
    write_json(tmp_path / "annotations" / "instances_train.json", content)

    dataset = load_segmentation_dataset(f"coco_folder:{tmp_path}")
    assert [sample["segments"][0].get("area") for sample in dataset] == [1100.0, 900.0, None]
    task, by_mask = evaluation_task("instance", 1), MaskAveragePrecision(1)
    metric = task.new_metric()
    for sample, row in zip(dataset, results, strict=True):
        prediction = {"segmentation": [row["segmentation"]], "segments_info": [{"label_id": 0, "score": 0.9}]}
        metric.add_batch(predictions=[prediction], references=[task.reference(sample)])
        reference = task.reference(sample)
        rows = [{key: value for key, value in row.items() if key != "area"} for row in reference["segments_info"]]
        by_mask.add_batch(predictions=[prediction], references=[{**reference, "segments_info": rows}])
    # pycocotools cannot do without an area: a file without one is scored by the mask's.
    annotations[2]["area"] = float(coco_mask.area(coco_mask.frPyObjects(annotations[2]["segmentation"], *size))[0])
    content["annotations"] = [{**row, "bbox": [0, 0, 1, 1]} for row in annotations]
    expected = pycocotools_statistics({**content, "info": {}}, results)
    found = metric.compute()
    np.testing.assert_allclose([found[name] for name in STATISTICS], expected, rtol=0, atol=1e-14)
    assert found["ap_medium"] != pytest.approx(by_mask.compute()["ap_medium"], abs=0.1)


def test_own_instances(tmp_path: Path) -> None:
    dataset = load_segmentation_dataset(coco_folder(tmp_path))
    sample = dataset[0]
    assert sample["segment_map"] is None
    assert [row["label_id"] for row in sample["segments"]] == [0, 1, 0]
    assert [row["is_crowd"] for row in sample["segments"]] == [False, False, True]
    crowd = decode_mask(sample["segments"][2]["rle"])
    assert crowd[:, :2].all()
    assert not crowd[:, 2:].any()
    assert describe(dataset).id2label == {0: "cat", 1: "dog"}


def test_images_without_objects_stay(tmp_path: Path) -> None:
    dataset = load_segmentation_dataset(coco_folder(tmp_path, lambda content: content["annotations"].clear()))
    sample = dataset[0]
    assert sample["segments"] == []
    assert sample["segment_map"].shape == SIZE
    assert (sample["segment_map"] == -1).all()


def test_own_panoptic(tmp_path: Path) -> None:
    dataset = load_segmentation_dataset(panoptic_folder(tmp_path), task="panoptic")
    sample = dataset[0]
    assert (sample["segment_map"][0] == -1).all()
    assert (sample["segment_map"][1:, :15] == 7).all()
    assert (sample["segment_map"][1:, 15:] == 70000).all()
    assert describe(dataset).stuff_classes == [1]


def test_rows_are_mapped_and_filtered_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_segmentation_dataset(coco_folder(tmp_path))
    monkeypatch.setattr("hf_segvit.data.decoding.read_location", None)
    assert len(metadata(dataset).filter(lambda row: len(row["segments"]) == 3)) == 1
    assert len(metadata(dataset).filter(lambda row: row["image_id"] != 5)) == 0
    monkeypatch.undo()
    kept = metadata(dataset).filter(lambda row: True).with_transform(decoder_of(dataset))
    assert kept[0]["image"].size == SIZE[::-1]
    assert describe(kept) == describe(dataset)


def test_the_decoder_travels_to_workers(tmp_path: Path) -> None:
    dataset = load_segmentation_dataset(coco_folder(tmp_path))
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(decoder_of(dataset))) < 1000
    assert copy[0]["segments"] == dataset[0]["segments"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_workers_read_archives_like_the_main_process(tmp_path: Path) -> None:
    coco_folder(tmp_path / "data")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for file in (tmp_path / "data").rglob("*.*"):
            archive.write(file, file.relative_to(tmp_path / "data"))
    dataset = load_segmentation_dataset(f"coco_folder:{tmp_path / 'data.zip'}")
    expected = [np.asarray(dataset[0]["image"])] * 2  # the archive is open here before workers start
    loader = DataLoader(dataset.select([0, 0]), num_workers=2, collate_fn=_first_image, multiprocessing_context="fork")
    assert all(np.array_equal(one, other) for one, other in zip(loader, expected, strict=True))


def _first_image(samples: list[dict[str, Any]]) -> np.ndarray:
    return np.array(samples[0]["image"])


def test_coco_stuff_values_are_ids_less_one(tmp_path: Path) -> None:
    table = label_table("coco_stuff")
    assert len(table.classes) == 171
    write_image(tmp_path / "val2017" / "1.jpg")
    values = np.full(SIZE, 255, dtype=np.uint8)
    values[0], values[1], values[2] = 0, 181, 12  # person, wood, stop sign
    write_mask(tmp_path / "stuffthingmaps" / "val2017" / "1.png", values)
    dataset = load_segmentation_dataset(f"coco_stuff:{tmp_path}", split="val")
    names = [describe(dataset).id2label[row["label_id"]] for row in dataset[0]["segments"]]
    assert names == ["person", "stop sign", "wood"]
    write_mask(tmp_path / "stuffthingmaps" / "val2017" / "1.png", np.full(SIZE, 11, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"holds the values \[11\]"):
        dataset[0]


def test_coco_stuff_archive(tmp_path: Path) -> None:
    write_image(tmp_path / "train2017" / "1.jpg")
    write_mask(tmp_path / "m.png", np.zeros(SIZE, dtype=np.uint8))
    with zipfile.ZipFile(tmp_path / "stuffthingmaps_trainval2017.zip", "w") as archive:
        archive.write(tmp_path / "m.png", "train2017/1.png")
    assert available_splits(f"coco-stuff:{tmp_path}") == ["train"]
    assert load_segmentation_dataset(f"coco-stuff:{tmp_path}")[0]["segments"] == [
        {"id": 0, "label_id": 0, "is_crowd": False}
    ]


def test_other_categories_are_no_coco(tmp_path: Path) -> None:
    coco_folder(tmp_path)
    (tmp_path / "train").rename(tmp_path / "train2017")
    (tmp_path / "annotations" / "instances_train.json").rename(tmp_path / "annotations" / "instances_train2017.json")
    with pytest.raises(
        ValueError, match=r"category 3 is 'cat', but in COCO instance segmentation it is 'car'; .*coco_folder"
    ):
        load_segmentation_dataset(f"coco:{tmp_path}", task="instance")


def test_wrong_formats_paths_tasks_splits_and_options(tmp_path: Path) -> None:
    spec = coco_folder(tmp_path)
    for wrong, message in (
        ({"spec": "coco"}, "FORMAT:PATH"),
        ({"spec": "kitti:x"}, "no format 'kitti'; choose one of ade20k, "),
        ({"spec": "coco:"}, "no path"),
        ({"spec": f"coco:{tmp_path}/absent"}, "no such file or folder"),
        ({"task": "depth"}, "no task 'depth'; choose one of instance, panoptic"),
        ({"split": "test"}, "there is no split 'test'; choose one of train"),
        ({"colour": 1}, "format coco_folder has no option 'colour'; choose one of "),
    ):
        with pytest.raises(ValueError, match=message):
            load_segmentation_dataset(**{"spec": spec, "split": "train", **wrong})
    write_json(tmp_path / "x.json", {})
    with pytest.raises(ValueError, match="neither a folder nor a zip archive"):
        load_segmentation_dataset(f"coco:{tmp_path}/x.json")


def official_coco(root: Path, kind: str) -> str:
    """Two persons and a crowd of them, with a dog in front, in COCO's own layout."""
    write_image(root / "train2017" / "a.jpg")
    names = {1: "person", 18: "dog"}
    categories = [{"id": number, "name": name, "isthing": 1} for number, name in names.items()]
    images = [{"id": 5, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1]}]
    rows = [(1, 1, 0), (2, 18, 0), (3, 1, 1)]  # id, category, crowd
    if kind == "panoptic":
        ids = np.repeat([1, 2, 3], 10)[None].repeat(SIZE[0], 0)
        write_mask(root / "annotations" / "panoptic_train2017" / "a.png", colored(ids))
        infos = [{"id": number, "category_id": category, "iscrowd": crowd} for number, category, crowd in rows]
        annotations: list[Any] = [{"image_id": 5, "file_name": "a.png", "segments_info": infos}]
    else:
        boxes = {1: [0, 0, 10, 0, 10, 20, 0, 20], 2: [10, 0, 20, 0, 20, 20, 10, 20], 3: [20, 0, 30, 0, 30, 20, 20, 20]}
        annotations = [
            {"id": n, "image_id": 5, "category_id": category, "iscrowd": crowd, "segmentation": [boxes[n]]}
            for n, category, crowd in rows
        ]
    content = {"images": images, "categories": categories, "annotations": annotations}
    write_json(root / "annotations" / f"{kind}_train2017.json", content)
    return f"coco:{root}"


@pytest.mark.parametrize(("kind", "task"), [("panoptic", "panoptic"), ("instances", "instance")])
def test_options_of_cocos_own_layout(kind: str, task: str, tmp_path: Path) -> None:
    spec = official_coco(tmp_path, kind)
    plain = load_segmentation_dataset(spec, task=task)
    assert [(row["label_id"], row["is_crowd"]) for row in plain[0]["segments"]] == [(0, False), (16, False), (0, True)]
    objects = load_segmentation_dataset(f"{spec}?crowd=objects", task=task)
    assert [row["is_crowd"] for row in objects[0]["segments"]] == [False] * 3
    assert describe(objects).remarks == ["crowds are read as single objects (crowd=objects)"]
    void = load_segmentation_dataset(f"{spec}?void=person", task=task)
    names = describe(void).id2label
    assert (len(names), names[15]) == (len(describe(plain).id2label) - 1, "dog")
    assert [row["label_id"] for row in void[0]["segments"]] == [15]
    if task == "panoptic":
        assert describe(void).stuff_classes == [label - 1 for label in describe(plain).stuff_classes]
        assert (void[0]["segment_map"] == -1).sum() == 400
    with pytest.raises(ValueError, match=r"void=persons is no class; did you mean person"):
        load_segmentation_dataset(f"{spec}?void=persons", task=task)
    with pytest.raises(ValueError, match=r"crowd is 'yes'; give crowd=ignore or crowd=objects"):
        load_segmentation_dataset(f"{spec}?crowd=yes", task=task)
