"""Scores: more than 100 objects in an image, some classes only, and the task that nobody named."""

import argparse
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hf_segvit import EoMTImageProcessor
from hf_segvit.cli import main
from hf_segvit.cli.evaluation_setup import class_ids
from hf_segvit.conversion.checkpoint_files import read_checkpoint
from hf_segvit.evaluation import evaluate
from hf_segvit.metrics import mask_average_precision
from hf_segvit.metrics.boundary import BoundaryAveragePrecision, BoundaryIoU
from hf_segvit.metrics.mask_average_precision import MaskAveragePrecision
from hf_segvit.metrics.mean_iou import MeanIoU
from hf_segvit.metrics.panoptic_quality import PanopticQuality

from ..tiny_models import tiny_eomt

HEIGHT, WIDTH = 200, 200


def grid(count, labels=(0,)):
    """An image of `count` objects of 8 x 15 pixels in rows of ten, as id map and rows."""
    ids = np.full((HEIGHT, WIDTH), -1)
    corners = [(y, x) for y in range(0, HEIGHT, 10) for x in range(0, WIDTH, 20)][:count]
    for number, (y, x) in enumerate(corners):
        ids[y : y + 8, x : x + 15] = number
    return ids, [{"id": number, "label_id": labels[number % len(labels)]} for number in range(count)]


def sides(count, labels=(0,), shifted=()):
    """Prediction and reference; the objects numbered `shifted` are found six pixels too far right."""
    ids, rows = grid(count, labels)
    found = ids.copy()
    for number in shifted:
        found[found == number] = -1
        y, x = np.nonzero(ids == number)
        found[y, np.minimum(x + 6, WIDTH - 1)] = number
    scored = [{**row, "score": 1 - row["id"] / 1000} for row in rows]
    return {"segmentation": found, "segments_info": scored}, {"segmentation": ids, "segments_info": rows}


def score(metric, *images):
    metric.add_batch(predictions=[image[0] for image in images], references=[image[1] for image in images])
    return metric.compute()


def coco_result(images, max_detections):
    """AP, AP 50 and the recall with all that count, by pycocotools."""
    annotations, results = [], []
    for image_id, image in enumerate(images):
        for side, entries in ((image[1], annotations), (image[0], results)):
            for row in side["segments_info"]:
                mask = side["segmentation"] == row["id"]
                rle = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
                entry = {"image_id": image_id, "category_id": row["label_id"], "segmentation": rle, "iscrowd": 0}
                entry |= {"area": int(mask.sum()), "bbox": coco_masks.toBbox(rle).tolist(), "id": len(entries) + 1}
                entries.append(entry | ({"score": row["score"]} if "score" in row else {}))
    truth = COCO()
    categories = [{"id": label} for label in sorted({each["category_id"] for each in annotations})]
    sizes = [{"id": index, "height": HEIGHT, "width": WIDTH} for index in range(len(images))]
    truth.dataset = {"images": sizes, "annotations": annotations, "categories": categories}
    truth.createIndex()
    found = COCO()
    found.dataset = {**truth.dataset, "annotations": results}
    found.createIndex()
    evaluator = COCOeval(truth, found, "segm")
    evaluator.params.maxDets = [max_detections]
    evaluator.evaluate()
    evaluator.accumulate()
    precision, recall = evaluator.eval["precision"][..., 0, -1], evaluator.eval["recall"][..., 0, -1]
    return precision[precision > -1].mean(), precision[0][precision[0] > -1].mean(), recall[recall > -1].mean()


@pytest.mark.parametrize("limit", [1, 5, 100, 150, 300])
def test_every_limit_scores_as_pycocotools_does(limit):
    images = [sides(200, shifted=range(0, 200, 7)), sides(180, labels=(0, 1, 1)), sides(20, labels=(1,))]
    result = score(MaskAveragePrecision(2, max_detections=limit), *images)
    expected = coco_result(images, limit)
    assert (result["ap"], result["ap_50"], result[f"ar_{limit}"]) == pytest.approx(expected, abs=1e-9)
    assert [name for name in result if name.startswith("ar_") and name[3:].isdigit()] == [
        f"ar_{each}" for each in sorted({each for each in (1, 10) if each < limit} | {limit})
    ]
    assert set(result["per_class"][0]) == {"ap", "ap_50", "ap_75", f"ar_{limit}", "references", "predictions"}


def test_all_of_200_objects_count_with_the_option_and_a_note_says_where_they_do_not(caplog):
    mask_average_precision._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for metric_class in (MaskAveragePrecision, BoundaryAveragePrecision):
            assert score(metric_class(1), sides(200))["ap"] == pytest.approx(0.505, abs=1e-3)
            assert score(metric_class(1, max_detections=200), sides(200))["ap"] == 1.0
    assert len(caplog.records) == 1, "once, although several were computed"
    assert "more than 100 objects" in caplog.text
    assert "--max-detections" in caplog.text
    with pytest.raises(ValueError, match="max_detections is 0"):
        MaskAveragePrecision(1, max_detections=0)


def test_no_note_where_nothing_is_cut(caplog):
    mask_average_precision._warn_once.cache_clear()
    metric = MaskAveragePrecision(2)
    assert score(metric, sides(100), sides(200, labels=(0, 1)))["ap"] == 1.0
    assert not caplog.records
    assert mask_average_precision.cut_note(metric.counts, 100) == ""
    metric.merge(MaskAveragePrecision(2).state_dict() | {"counts": score_counts(sides(130))})
    assert "leaves out 30 predictions, and makes 30 true objects impossible" in mask_average_precision.cut_note(
        metric.counts, 100
    )


def score_counts(image):
    metric = MaskAveragePrecision(2)
    score(metric, image)
    return metric.counts


class Crowded:
    """A data set of one image with many objects, and a model that finds all of them."""

    task = "instance"
    id2label = {0: "cell", 1: "dust"}  # noqa: RUF012

    def __len__(self):
        return 1

    def __getitem__(self, index):
        ids, rows = grid(150)
        return {"image": Image.new("RGB", (WIDTH, HEIGHT)), "image_id": 5, "segment_map": ids, "segments": rows}

    def answers(self, images):
        return [sides(150)[0] for _ in images]


def test_evaluation_takes_the_limit_and_notes_the_cut():
    both = Crowded()
    default = evaluate(both, both, both.id2label)
    assert default.metrics["ar_100"] == pytest.approx(100 / 150)
    assert any("leaves out 50 predictions" in note for note in default.notes)
    more = evaluate(both, both, both.id2label, max_detections=150, more_metrics=["oracle", "boundary"])
    assert more.notes == []
    assert (more.metrics["ap"], more.metrics["ar_150"], more.metrics["oracle_ap"]) == (1.0, 1.0, 1.0)
    assert more.metrics["boundary_ap"] == 1.0
    assert more.classes[0]["ar_150"] == 1.0


def random_maps(num_labels, seed):
    rng = np.random.default_rng(seed)
    true = rng.integers(0, num_labels, (12, 16)).repeat(4, 0).repeat(4, 1)
    wrong = rng.random(true.shape) < 0.3
    return np.where(wrong, rng.integers(0, num_labels, true.shape), true), true


def test_some_classes_only():
    predicted, true = random_maps(5, 0)
    chosen = [1, 3]
    for make in (lambda: MeanIoU(5), lambda: BoundaryIoU(5)):
        whole, part = make(), make()
        part.classes = chosen
        results = [score(metric, (predicted, true)) for metric in (whole, part)]
        assert set(results[1]["per_class"]) == set(chosen)
        by_class = [results[0]["per_class"][label]["iou"] for label in chosen]
        assert [results[1]["per_class"][label]["iou"] for label in chosen] == by_class
        name = "mean_iou" if "mean_iou" in results[1] else "boundary_iou"
        assert results[1][name] == pytest.approx(np.mean(by_class))
        assert results[1]["num_classes"] == 2
    # Pixels of the other classes that are taken for a chosen one lower its score, as they should.
    assert by_class[0] < 1

    rows = [{"id": label, "label_id": label, "score": 0.9} for label in range(5)]
    image = ({"segmentation": predicted, "segments_info": rows}, {"segmentation": true, "segments_info": rows})
    for make, name in ((lambda: PanopticQuality(5, [1]), "pq"), (lambda: MaskAveragePrecision(5), "ap")):
        whole, part = make(), make()
        part.classes = chosen
        results = [score(metric, image) for metric in (whole, part)]
        by_class = [results[0]["per_class"][label][name] for label in chosen]
        assert list(results[1]["per_class"]) == chosen
        assert results[1][name] == pytest.approx(np.mean(by_class))
        assert results[1]["num_classes"] == 2


def test_class_names_on_the_command_line():
    names = {0: "person, individual", 1: "traffic light", 2: "person", 3: "Car"}
    assert class_ids("car,traffic_light", names) == [1, 3]
    assert class_ids("person, individual,person", names) == [0, 2]
    with pytest.raises(ValueError, match=r"no class 'cra'; .*Car"):
        class_ids("person,cra", names)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Models of the generated scenes' classes for two tasks."""
    folder = tmp_path_factory.mktemp("scores")
    from hf_segvit.data.reading import describe, load_segmentation_dataset

    data = "generated:easy?num_scenes=2&size=64"
    for task in ("instance", "panoptic", "semantic"):
        labels = describe(load_segmentation_dataset(data, task=task)).id2label
        tiny_eomt(id2label=labels).save_pretrained(folder / task)
        EoMTImageProcessor(task=task, size={"height": 64, "width": 64}).save_pretrained(folder / task)
    return folder, labels


def run_evaluate(folder, tmp_path, *more):
    data = "generated:easy?num_scenes=2&size=64"
    words = ["evaluate", "--model", str(folder), "--data", data, "--device", "cpu", "--json", str(tmp_path / "s.json")]
    code = main([*words, *more])
    return json.loads((tmp_path / "s.json").read_text()) if code == 0 else code


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_the_task_is_the_checkpoints(setting, tmp_path, capsys, task):
    folder, _ = setting
    report = run_evaluate(folder / task, tmp_path)
    assert report["task"] == task
    assert f"task {task}" in capsys.readouterr().err
    assert report["metrics"] == run_evaluate(folder / task, tmp_path, "--task", task)["metrics"]
    # Checks of options that depend on the task come all the same.
    assert run_evaluate(folder / task, tmp_path, "--max-detections", "5") == 2
    assert f"--max-detections 5 is for task instance, not for {task}" in capsys.readouterr().err


def test_classes_option(setting, tmp_path, capsys):
    folder, labels = setting
    whole = run_evaluate(folder / "semantic", tmp_path)
    names = [row["label"] for row in whole["classes"]][:2]
    part = run_evaluate(folder / "semantic", tmp_path, "--classes", ",".join(names))
    rows = {row["label"]: row for row in whole["classes"]}
    assert {row["label"] for row in part["classes"]} == set(names)
    assert part["metrics"]["mean_iou"] == pytest.approx(np.mean([rows[name]["iou"] for name in names]))
    assert any(f"only of the classes {labels[min(class_ids(','.join(names), labels))]}" in n for n in part["notes"])
    assert run_evaluate(folder / "semantic", tmp_path, "--classes", "no such class") == 2
    assert "--classes: the data set has no class 'no such class'" in capsys.readouterr().err


def test_max_detections_option_lets_the_model_answer_as_many(setting, tmp_path, monkeypatch):
    from hf_segvit.inference import segmenter

    limits = []
    create = segmenter.Segmenter.__init__

    def record(self, *args, **kwargs):
        limits.append(kwargs["max_segments"])
        create(self, *args, **kwargs)

    monkeypatch.setattr(segmenter.Segmenter, "__init__", record)
    folder, _ = setting
    for more, limit in ((("--max-detections", "300"), 300), (("--max-detections", "5"), None), ((), None)):
        report = run_evaluate(folder / "instance", tmp_path, *more)
        assert limits.pop() == limit
        assert f"ar_{more[1] if more else 100}" in report["metrics"]


@pytest.mark.parametrize("name", ["model_best.pth.tar", "weights", "last.model", "model.safetensors.download"])
def test_checkpoints_are_judged_by_their_content(tmp_path, name):
    from safetensors.torch import save_file

    weights = {"head.weight": torch.arange(6.0).reshape(2, 3)}
    path = tmp_path / name
    if "safetensors" in name:
        save_file(weights, path)
    else:
        arguments = argparse.Namespace(lr=0.1, betas=(0.9, 0.999), name="run")
        torch.save({"epoch": 3, "state_dict": weights, "args": arguments}, path)
    read = read_checkpoint(path)
    assert list(read) == ["head.weight"]
    assert torch.equal(read["head.weight"], weights["head.weight"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\x1f\x8b\x08\x00" + bytes(30), "unpack it"),
        (bytes(257) + b"ustar" + bytes(300), "unpack it"),
        (b"weights, honestly", "safetensors files and what torch.save writes"),
        (b"", "safetensors files and what torch.save writes"),
    ],
)
def test_what_is_no_checkpoint_is_called_by_its_name(tmp_path, content, message):
    path = tmp_path / "model_best.pth.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


class Settings:
    """Not plain values, so not opened."""


def test_other_classes_are_refused_with_a_command_that_helps(tmp_path):
    path = tmp_path / "model_best.pth.tar"
    torch.save({"state_dict": {"a": torch.ones(2)}, "args": Settings()}, path)
    with pytest.raises(ValueError, match=r"holds .*Settings.*not opened.*weights_only=False") as error:
        read_checkpoint(path)
    command = str(error.value).partition('python -c "')[2].rpartition('"')[0]
    compile(command, "command", "exec")
    assert str(path) in command
