"""Exports of `hf-segvit segment`, read back by the readers of this package: the same segments, to the stated error."""

import json
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy import ndimage

from hf_segvit import EoMTImageProcessor, Segmenter
from hf_segvit.cli import main
from hf_segvit.data.label_tables import label_table
from hf_segvit.data.reading import describe, load_segmentation_dataset
from hf_segvit.inference.exports import FOLDER_EXPORTS, IMAGE_EXPORTS, TOLERANCE

from .test_bulk_segmentation import draw
from .tiny_models import tiny_eomt

THRESHOLDS = {"panoptic": {"threshold": 0.3}, "instance": {"instance_threshold": 0.02}, "semantic": {}}
GENERAL = sorted({*FOLDER_EXPORTS, *IMAGE_EXPORTS} - {"ade20k", "cityscapes", "bravo", "coco-panoptic"})


def save_model(folder: Path, task: str, names: list[str]) -> Path:
    model = tiny_eomt(num_queries=9, id2label=dict(enumerate(names)))
    with torch.no_grad():
        model.class_predictor.weight *= 4
    model.save_pretrained(folder)
    settings = {**THRESHOLDS[task], "overlap_mask_area_threshold": 0.05, "stuff_classes": [4]}
    EoMTImageProcessor(task=task, size={"height": 64, "width": 64}, **settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "images"
    folder.mkdir()
    for seed, name in enumerate(("000012.png", "000345.png", "000007.png")):
        draw(folder / name, seed, (96, 128))
    return folder


@pytest.fixture(scope="module", params=["instance", "panoptic"])
def exported(request, images, tmp_path_factory):
    """The output folder with every format that fits the task, and the answers."""
    task, folder = request.param, tmp_path_factory.mktemp(request.param)
    model = save_model(folder / "model", task, ["a road", 'c"d', "e<f", "gé", "sky & sea"])
    kinds = [*GENERAL, *(["coco-panoptic"] if task == "panoptic" else [])]
    words = ["segment", images, "--model", model, "--output", folder / "out", "--device", "cpu", "--outputs"]
    assert main([*map(str, words), ",".join(kinds)]) == 0
    segmenter = Segmenter.from_pretrained(str(model), device="cpu")
    answers = {path.stem: segmenter(path) for path in sorted(images.iterdir())}
    assert sum(map(len, answers.values())) > 8
    return task, folder / "out", answers


def read_masks(spec: str, task: str = "instance") -> dict[str, list[tuple[str, np.ndarray]]]:
    """(class, mask) of the segments of each image, by image."""
    dataset = load_segmentation_dataset(spec, task=task)
    names, found = describe(dataset).id2label, {}
    raw = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
    for index, sample in enumerate(dataset):
        key = Path(str(raw[index].get("image_id", index))).stem
        found[key] = []
        for row in sample["segments"]:
            whole = sample["segment_map"]
            mask = coco_mask.decode(row["rle"]).astype(bool) if whole is None else np.asarray(whole) == row["id"]
            found[key].append((names[row["label_id"]], mask))
    return found


def same_segments(found, answers, tolerance: float) -> None:
    """Every segment is there, once, and differs only near its outline."""
    assert len(found) == len(answers)
    for answer, others in zip(
        answers.values(), [found[key] for key in sorted(found, key=order_of(answers))], strict=True
    ):
        outlines = answer.outlines(tolerance)
        expected = [
            (segment.label, answer.mask(segment))
            for segment, parts in zip(answer.segments, outlines, strict=True)
            if parts
        ]
        assert sorted(label for label, _ in others) == sorted(label for label, _ in expected)
        left = list(others)
        for label, mask in expected:
            same = [number for number, (other, _) in enumerate(left) if other == label]
            best = max(same, key=lambda number: (left[number][1] & mask).sum() / (left[number][1] | mask).sum())
            difference = left.pop(best)[1] != mask
            if tolerance:
                reach = int(np.ceil(tolerance)) + 1  # drawing rounds by up to a pixel
                near = ndimage.binary_dilation(mask, iterations=reach) & ~ndimage.binary_erosion(mask, iterations=reach)
                difference &= ~near
            assert not difference.any(), label


def order_of(answers):
    names = list(answers)
    return lambda key: next((names.index(name) for name in names if name in key or int(name) == _number(key)), 99)


def _number(text: str) -> int:
    digits = "".join(filter(str.isdigit, text))
    return int(digits) if digits else -1


def test_coco(exported, images, tmp_path):
    _, output, answers = exported
    shutil.copytree(images, tmp_path / "images")
    shutil.copy(output / "coco_annotations.json", tmp_path / "result.json")
    same_segments(read_masks(f"coco_folder:{tmp_path}"), answers, 0)
    # As an evaluation script takes them.
    truth = COCO(str(output / "coco_annotations.json"))
    assert truth.dataset["info"] == {}  # `loadRes` of pycocotools 2.0.10 fails without
    results = truth.loadRes(str(output / "coco_results.json"))
    assert sorted(truth.getImgIds()) == [7, 12, 345]
    for name, answer in answers.items():
        rows = results.loadAnns(results.getAnnIds(imgIds=[int(name)]))
        assert sorted(row["score"] for row in rows) == sorted(segment.score for segment in answer.segments)
        assert sorted(int(row["area"]) for row in rows) == sorted(segment.area for segment in answer.segments)


def test_coco_panoptic(exported, images, tmp_path):
    task, output, answers = exported
    if task != "panoptic":
        pytest.skip("panoptic only")
    shutil.copytree(images, tmp_path / "images")
    shutil.copytree(output / "coco_panoptic", tmp_path, dirs_exist_ok=True)
    same_segments(read_masks(f"coco_folder:{tmp_path}", "panoptic"), answers, 0)
    content = json.loads((output / "coco_panoptic" / "panoptic.json").read_text())
    for row in content["annotations"]:
        ids = np.asarray(Image.open(output / "coco_panoptic" / "panoptic" / row["file_name"])).astype(int) @ [
            1,
            256,
            65536,
        ]
        answer = answers[f"{row['image_id']:06}"]
        assert [segment["id"] for segment in row["segments_info"]] == [segment.id for segment in answer.segments]
        assert np.array_equal(ids, np.maximum(answer.segment_map, 0))
    assert {row["name"]: row["isthing"] for row in content["categories"]} == {
        "a road": 1, 'c"d': 1, "e<f": 1, "gé": 1, "sky & sea": 0
    }  # fmt: skip


def test_labelme(exported, images, tmp_path):
    _, output, answers = exported
    for path in images.iterdir():
        shutil.copy(path, tmp_path / path.name)
    for path in (output / "labelme").iterdir():
        shutil.copy(path, tmp_path / path.name)
    same_segments(read_masks(f"labelme:{tmp_path}"), answers, TOLERANCE)


def test_yolo(exported, images):
    _, output, answers = exported
    shutil.copytree(images, output / "yolo" / "images", dirs_exist_ok=True)
    same_segments(read_masks(f"yolo:{output / 'yolo'}"), answers, TOLERANCE)


def test_cvat(exported, images, tmp_path):
    _, output, answers = exported
    shutil.copytree(images, tmp_path / "images")
    shutil.copy(output / "cvat_annotations.xml", tmp_path / "annotations.xml")
    same_segments(read_masks(f"cvat:{tmp_path}"), answers, TOLERANCE)


def test_label_studio(exported, images, tmp_path):
    """Each part is a region of its own there; predictions become annotations once they are accepted."""
    _, output, answers = exported
    tasks = json.loads((output / "label_studio.json").read_text())
    for task in tasks:
        task["annotations"] = task.pop("predictions")
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    found = read_masks(f"label_studio:{tmp_path}")
    for answer, regions in zip(
        answers.values(), [found[key] for key in sorted(found, key=order_of(answers))], strict=True
    ):
        parts = [(segment.label, len(each)) for segment, each in zip(answer.segments, answer.outlines(), strict=True)]
        for label in {label for label, _ in parts}:
            assert len([1 for name, _ in regions if name == label]) == sum(n for name, n in parts if name == label)
            whole = np.any([answer.mask(segment) for segment in answer.segments if segment.label == label], axis=0)
            drawn = np.any([mask for name, mask in regions if name == label], axis=0)
            assert (whole != drawn).mean() < 0.2


def test_json_lines_and_parquet(exported, images):
    task, output, answers = exported
    lines = [json.loads(line) for line in (output / "segments.jsonl").read_text().splitlines()]
    rows = parquet.read_table(output / "segments.parquet").to_pylist()
    assert [row["name"] for row in rows] == [line["name"] for line in lines] == sorted(answers)
    for row, line in zip(rows, lines, strict=True):
        answer = answers[row["name"]]
        assert row["path"] == line["picture"] == str(images / f"{row['name']}.png")
        assert row["segments"] == line["segments"]
        assert [(each["id"], each["label"], each["score"], each["area"]) for each in row["segments"]] == [
            (segment.id, segment.label, segment.score, segment.area) for segment in answer.segments
        ]
        for each, segment in zip(row["segments"], answer.segments, strict=True):
            assert np.array_equal(coco_mask.decode(each["segmentation"]), answer.mask(segment))
        ids = np.asarray(Image.open(BytesIO(row["panoptic_png"]))).astype(int) @ [1, 256, 65536]
        assert np.array_equal(ids, np.maximum(answer.segment_map, 0))
        assert row["task"] == task


def test_crops_and_masks(exported, images):
    _, output, answers = exported
    for name, answer in answers.items():
        assert len(list((output / "crops" / name).iterdir())) == len(answer)
        for segment in answer.segments:
            mask = np.asarray(Image.open(output / "masks" / name / f"{segment.id:04}.png"))
            assert np.array_equal(mask, np.where(answer.mask(segment), 255, 0))
            crop = Image.open(output / "crops" / name / f"{segment.id:04}.png")
            assert np.array_equal(np.asarray(crop), np.asarray(answer.crop(segment)))


@pytest.mark.parametrize("benchmark", ["ade20k", "cityscapes"])
def test_submissions(benchmark, images, tmp_path, capsys):
    classes = label_table(benchmark).classes
    model = save_model(tmp_path / "model", "semantic", [each.name for each in classes])
    words = ["segment", images, "--model", model, "--output", tmp_path / "out", "--device", "cpu", "--outputs"]
    assert main([*map(str, words), benchmark]) == 0
    segmenter = Segmenter.from_pretrained(str(model), device="cpu")
    for path in images.iterdir():
        written = np.asarray(Image.open(tmp_path / "out" / benchmark / path.name))
        expected = np.array([each.source_id for each in classes])[segmenter(path).segment_map]
        assert np.array_equal(written, expected)
    other = save_model(tmp_path / "other", "semantic", ["a", "b", "c", "d", "e"])
    assert main([*map(str, [*words[:3], other, "--output", tmp_path / "no", *words[6:]]), benchmark]) == 2
    assert f"--outputs {benchmark} needs a model of its classes" in capsys.readouterr().err


def test_exports_of_a_job_that_went_on_are_whole(images, tmp_path):
    model = save_model(tmp_path / "model", "instance", ["a", "b", "c", "d", "e"])
    options = ["--model", model, "--device", "cpu", "--outputs", "coco,jsonl"]
    one, many = tmp_path / "one", tmp_path / "many"
    assert main([*map(str, ["segment", images, "--output", one, *options])]) == 0
    for shard in ("1/2", "2/2"):
        assert main([*map(str, ["segment", images, "--output", many, *options, "--shard", shard])]) == 0
    for name in ("coco_results.json", "coco_annotations.json"):
        first, second = (json.loads((folder / name).read_text()) for folder in (one, many))
        rows, others = (each if isinstance(each, list) else each["annotations"] for each in (first, second))
        assert sorted(map(key_of, rows)) == sorted(map(key_of, others))
    first, second = ((folder / "segments.jsonl").read_text().splitlines() for folder in (one, many))
    assert sorted(first) == sorted(second)


def key_of(row) -> str:
    return json.dumps({name: value for name, value in row.items() if name != "id"})
