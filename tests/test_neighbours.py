"""docs/neighbours.md: each of its blocks runs as it stands, offline, and gives what this package itself says."""

import importlib.util
import json
import os
import re
import shlex
import sqlite3
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from hf_segvit import Segmenter
from hf_segvit.cli import main
from hf_segvit.training.tracking import read_history

from .test_exports import save_model
from .tiny_training import tiny_recipe

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "neighbours.md").read_text(encoding="utf-8")
NAMES = ["road", "wall", 'c"d', "e<f", "sky & sea"]


def section(name):
    return re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]


def blocks(name, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", section(name), re.DOTALL | re.MULTILINE)


def run(name):
    """The names that the Python blocks of a section leave behind."""
    names: dict = {"__name__": "page"}
    for code in blocks(name, "python"):
        exec(compile(code, f"docs/neighbours.md, {name}", "exec"), names)
    return names


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("neighbours")
    save_model(folder / "model", "panoptic", NAMES)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    (folder / "photos").mkdir()
    for path in (folder / "photo.jpg", folder / "photos" / "one.jpg", folder / "photos" / "two.jpg"):
        Image.fromarray(pixels).save(path, quality=95)
    (folder / "evaluate_modules").symlink_to(ROOT / "evaluate_modules")
    return folder


@pytest.fixture(autouse=True)
def _there(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def expected(workplace):
    """The answer of this package alone."""
    answer = Segmenter.from_pretrained(str(workplace / "model"), device="cpu")(workplace / "photo.jpg")
    assert len(answer) > 1
    return answer


def test_supervision(expected):
    pytest.importorskip("supervision")
    names = run("supervision")
    detections = names["detections"]
    assert detections.data["class_name"].tolist() == [segment.label for segment in expected.segments]
    assert np.array_equal(detections.mask, expected.masks)
    assert 0 < len(names["large"]) <= len(detections)
    with Image.open("annotated.png") as drawn, Image.open("photo.jpg") as photo:
        assert drawn.size == photo.size
        assert not np.array_equal(np.asarray(drawn.convert("RGB")), np.asarray(photo.convert("RGB")))


def test_supervision_reads_what_the_processor_returns(expected):
    supervision = pytest.importorskip("supervision")
    segmenter = Segmenter.from_pretrained("model", device="cpu")
    (answer,) = segmenter.answers([Image.open("photo.jpg")])
    detections = supervision.Detections.from_transformers(answer, id2label=segmenter.id2label)
    assert detections.class_id.tolist() == [segment.label_id for segment in expected.segments]
    assert detections.area.tolist() == [segment.area for segment in expected.segments]


def test_fiftyone(expected):
    pytest.importorskip("fiftyone", reason="FiftyOne is tested where it is installed")
    names = run("FiftyOne")
    segmenter = Segmenter.from_pretrained("model", device="cpu")
    image = Image.open("photo.jpg")
    with torch.inference_mode():
        outputs = segmenter.model(**segmenter.processor(image, return_tensors="pt"))
    # The thresholds that the wrapper passes.
    (answer,) = segmenter.processor.post_process_panoptic_segmentation(
        outputs, threshold=0.5, mask_threshold=0.5, overlap_mask_area_threshold=0.8, target_sizes=[image.size[::-1]]
    )
    found, rows = names["detections"].detections, answer["segments_info"]
    assert [each.label for each in found] == [segmenter.id2label[row["label_id"]] for row in rows]
    assert rows
    for each, row in zip(found, rows, strict=True):
        assert each.confidence == pytest.approx(row["score"], abs=1e-5)
        assert each.mask.sum() == (answer["segmentation"] == row["id"]).sum()
    model = names["foz"].load_zoo_model(
        "universal-segmentation-transformer-torch", name_or_path="model", task="semantic"
    )
    map_ = model.predict(np.asarray(Image.open("photo.jpg").convert("RGB"))).mask
    ours = Segmenter.from_pretrained("model", task="semantic", device="cpu")("photo.jpg").segment_map
    assert np.array_equal(map_, ours + 1)  # FiftyOne keeps 0 for pixels without a class


def test_datasets(expected):
    answers = run("datasets")["answers"]
    assert answers.column_names == ["segments"]
    assert answers[0]["segments"] == answers[1]["segments"]
    for row, segment in zip(answers[0]["segments"], expected.segments, strict=True):
        assert (row["category_id"], row["area"]) == (segment.label_id, segment.area)
        assert row["segmentation"] == expected.rle(segment)


def test_evaluate(tmp_path, monkeypatch):
    import evaluate

    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for module in [module for module in sys.modules if module.split(".")[0] == "evaluate_modules"]:
        monkeypatch.delitem(sys.modules, module)
    metric = run("evaluate")["panoptic_quality"]
    shifted = {"segmentation": [[1, 2], [2, 2]], "segments_info": [{"id": 1, "label_id": 0}, {"id": 2, "label_id": 1}]}
    whole = {"segmentation": [[1, 1], [2, 2]], "segments_info": shifted["segments_info"]}
    metric.add(prediction=shifted, reference=whole)
    assert metric.compute()["pq"] == pytest.approx((0 + 2 / 3) / 2)  # 1/2 is no match, 2/3 is one


def test_label_studio(expected):
    for line in "".join(blocks("Label Studio", "bash")).splitlines():
        if line.startswith("hf-segvit segment"):
            assert main([*shlex.split(line)[1:], "--device", "cpu"]) == 0
    tasks = run("Label Studio")["tasks"]
    assert [task["data"]["image"] for task in tasks] == [
        "/data/local-files/?d=photos/one.jpg",
        "/data/local-files/?d=photos/two.jpg",
    ]
    assert json.loads(Path("predicted/tasks.json").read_text()) == tasks
    for task in tasks:
        (prediction,) = task["predictions"]
        for region in prediction["result"]:
            assert (region["from_name"], region["to_name"], region["type"]) == ("label", "image", "polygonlabels")
            points = np.array(region["value"]["points"])
            assert points.shape[0] >= 3
            assert ((points >= 0) & (points <= 100)).all()
        found = Counter(name for region in prediction["result"] for name in region["value"]["polygonlabels"])
        assert set(found) == {segment.label for segment in expected.segments}
    if importlib.util.find_spec("label_studio_sdk") is None:
        return  # its requirements contradict ours, so that it is tested where it is installed beside
    from label_studio_sdk.label_interface import LabelInterface

    interface = LabelInterface(Path("predicted/config.xml").read_text())
    for task in tasks:
        for prediction in task["predictions"]:
            assert interface.validate_prediction(prediction, return_errors=True) == []
            prediction["result"][0]["value"]["polygonlabels"] = ["another"]
            assert interface.validate_prediction(prediction, return_errors=True)


def test_the_page_names_every_tracker_that_is_tested():
    named = re.findall(r"trackers=\[(\w*)\]", "".join(blocks("Trackers of training", "bash")))
    assert named == [*TRACKERS, ""]


def recorded_by_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    return [event.value for event in events.Scalars("loss")]


def wandb_records(content):
    """Records of an offline run: LevelDB's log format after a header of seven bytes, in blocks of 32 KiB."""
    start, record = 7, b""
    while start + 7 <= len(content):
        if start % 2**15 > 2**15 - 7:  # what is left of a block is too short for a header
            start += 2**15 - start % 2**15
        size, kind = struct.unpack("<HB", content[start + 4 : start + 7])
        record += content[start + 7 : start + 7 + size]
        start += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def recorded_by_wandb(folder):
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    records = [Record.FromString(content) for content in wandb_records(file.read_bytes())]
    assert {record.run.display_name for record in records if record.HasField("run")} == {folder.name}
    items = [item for record in records for item in record.history.item]
    return [json.loads(item.value_json) for item in items if (item.key or ".".join(item.nested_key)) == "loss"]


def recorded_by_trackio(folder):
    (file,) = (folder.parent / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT run_name, metrics FROM metrics ORDER BY step").fetchall()
    assert {name for name, _ in rows} == {folder.name}
    return [values["loss"] for values in (json.loads(metrics) for _, metrics in rows) if "loss" in values]


TRACKERS = {"tensorboard": recorded_by_tensorboard, "wandb": recorded_by_wandb, "trackio": recorded_by_trackio}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_of_training(name, tmp_path):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    folder = tmp_path / "a run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**tiny_recipe(folder, trackers=[name], steps=3).to_dict()}))
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio")}
    # A process of its own, as trackers read their settings when they are imported.
    command = [sys.executable, "-m", "hf_segvit", "train", str(recipe), "--cpu"]
    trained = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    assert trained.returncode == 0, trained.stderr
    losses = [row["loss"] for row in read_history(folder / "history.jsonl") if "loss" in row]
    assert TRACKERS[name](folder) == pytest.approx(losses, rel=1e-6)
    assert len(losses) == 3
