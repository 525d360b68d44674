"""Evaluation: perfect and real predictors against the metrics fed directly, going on after an interruption, several
processes, foreign models, reports."""

import json
import math
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from hf_segvit.atomic_files import write_json
from hf_segvit.cli import main
from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.evaluation import evaluate
from hf_segvit.evaluation.counts import PartialResults, delete_partial_results
from hf_segvit.evaluation.report import draw_worst, result_content, result_text
from hf_segvit.evaluation.tasks import evaluation_task
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.metrics.accumulation import ImageMetric
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from tests.tiny_models import tiny_eomt

TASKS = ("panoptic", "semantic", "instance")
HEADLINES = {"panoptic": "pq", "semantic": "mean_iou", "instance": "ap"}


class Things:
    """Scenes as an instance data set: things alone, as RLE or in the map."""

    def __init__(self, scenes):
        self.scenes = scenes

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, index):
        entry = self.scenes[index]
        things = [row for row in entry["segments"] if row["label_id"] not in self.scenes.stuff_classes]
        return {**entry, "segments": things}


class Oracle:
    """Answers with the truth; it knows the images by their pixels."""

    def __init__(self, scenes, task, spoil=()):
        self.task, self.id2label, self.calls = task, scenes.id2label, 0
        dataset = dataset_for(task, scenes)
        self.truths = {}
        for index in range(len(scenes)):
            entry = dataset[index]
            truth = evaluation_task(task, len(scenes.id2label)).reference(entry)
            if task != "semantic":
                rows = [{**row, "score": 0.9} for row in truth["segments_info"]]
                truth = {**truth, "segments_info": [] if index in spoil else rows}
                if index in spoil:
                    truth["segmentation"] = torch.full(entry["segment_map"].shape, -1.0)
            elif index in spoil:
                truth = np.full_like(truth, 1)
            self.truths[np.asarray(entry["image"]).tobytes()] = truth

    def answers(self, images):
        self.calls += len(images)
        return [self.truths[np.asarray(image).tobytes()] for image in images]


def dataset_for(task, scenes):
    return Things(scenes) if task == "instance" else scenes


@pytest.fixture(scope="module")
def scenes():
    return GeneratedScenes(7, size=(48, 64))


@pytest.mark.parametrize("task", TASKS)
def test_the_truth_scores_one_and_a_spoilt_image_is_the_worst(task, scenes):
    dataset = dataset_for(task, scenes)
    result = evaluate(Oracle(scenes, task), dataset, scenes.id2label, stuff_classes=scenes.stuff_classes, batch_size=3)
    assert result.metrics[HEADLINES[task]] == pytest.approx(1.0)
    assert result.num_images == 7
    assert [image.score for image in result.images] == pytest.approx([1.0] * 7)
    assert all(row["loss"] == pytest.approx(0) for row in result.classes)

    spoilt = evaluate(Oracle(scenes, task, spoil=[4]), dataset, scenes.id2label, stuff_classes=scenes.stuff_classes)
    assert spoilt.metrics[HEADLINES[task]] < 1
    assert spoilt.images[0].index == 4
    assert spoilt.images[0].score < 0.5
    losses = [row["loss"] for row in spoilt.classes]
    assert losses == sorted(losses, reverse=True)
    # The losses of all classes are what the mean lacks.
    assert sum(losses) == pytest.approx(1 - spoilt.metrics[HEADLINES[task]])


@pytest.mark.parametrize("task", TASKS)
def test_a_model_scores_what_the_metric_says_when_fed_directly(task, scenes):
    model = tiny_eomt(id2label=scenes.id2label, num_queries=20)
    processor = EoMTImageProcessor(
        size=64, task="panoptic", stuff_classes=scenes.stuff_classes, threshold=0.1, overlap_mask_area_threshold=0.1
    )
    predictor = Segmenter(model, processor, task=task)
    dataset = dataset_for(task, scenes)
    results = [evaluate(predictor, dataset, scenes.id2label, batch_size=size).metrics for size in (1, 4)]
    books = evaluation_task(task, 6)
    metric = books.new_metric()
    for index in range(7):
        entry = dataset[index]
        inputs = processor(images=[entry["image"]], return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        if task == "semantic":
            answers = processor.post_process_semantic_segmentation(outputs, target_sizes=[(48, 64)])
        elif task == "panoptic":
            answers = processor.post_process_panoptic_segmentation(outputs, target_sizes=[(48, 64)])
        else:
            answers = processor.post_process_instance_segmentation(
                outputs, threshold=0.0, target_sizes=[(48, 64)], return_binary_maps=True
            )
        metric.add_batch(predictions=answers, references=[books.reference(entry)])
    expected = metric.compute()[HEADLINES[task]]
    # Batches of other sizes differ in the last bits of the logits.
    assert [result[HEADLINES[task]] for result in results] == pytest.approx([expected] * 2, rel=1e-3, abs=1e-4)


def test_an_interrupted_evaluation_goes_on(tmp_path, scenes):
    whole = evaluate(Oracle(scenes, "panoptic", spoil=[1]), scenes, scenes.id2label)

    class Breaking(Oracle):
        def answers(self, images):
            if self.calls >= 5:
                raise RuntimeError("out of memory")
            return super().answers(images)

    settings = {"partial_folder": tmp_path / "partial", "about": {"model": "m"}, "chunk_size": 2}
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(Breaking(scenes, "panoptic", spoil=[1]), scenes, scenes.id2label, **settings)
    assert len(list((tmp_path / "partial").iterdir())) == 2
    oracle = Oracle(scenes, "panoptic", spoil=[1])
    result = evaluate(oracle, scenes, scenes.id2label, **settings)
    assert oracle.calls == 3  # four of the seven were counted
    np.testing.assert_equal(vars(result), vars(whole))
    again = Oracle(scenes, "panoptic")
    np.testing.assert_equal(vars(evaluate(again, scenes, scenes.id2label, **settings)), vars(whole))
    assert again.calls == 0
    with pytest.raises(ValueError, match=r"another evaluation \(model 'm' != 'other'\)"):
        evaluate(oracle, scenes, scenes.id2label, **(settings | {"about": {"model": "other"}}))
    delete_partial_results(tmp_path / "partial")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_counts_of_every_task_survive_on_disk(task, tmp_path, scenes):
    settings = {"partial_folder": tmp_path / "partial", "chunk_size": 3}
    dataset = dataset_for(task, scenes)
    first = evaluate(Oracle(scenes, task, spoil=[0]), dataset, scenes.id2label, **settings)
    second = evaluate(Oracle(scenes, task), dataset, scenes.id2label, **settings)
    np.testing.assert_equal(vars(second)["metrics"], vars(first)["metrics"])
    assert second.classes == first.classes


def test_counts_come_back_and_damaged_ones_are_set_aside(tmp_path):
    partial, states, reports = PartialResults(tmp_path, {}), [], []
    partial.save({"a": np.arange(3), "b": {"c": [1, "x", math.nan]}})
    partial.read(states.append, reports.append)
    (state,) = states
    assert state["a"].tolist() == [0, 1, 2]
    assert state["b"]["c"][:2] == [1, "x"]
    assert reports == []
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    partial.read(states.append, reports.append)
    assert len(states) == 1
    assert reports == [
        f"{path} is damaged (its content is not what was written); it is now {path.name}.damaged, and its images are "
        "evaluated again"
    ]
    assert [found.name for found in tmp_path.iterdir()] == [f"{path.name}.damaged"]
    delete_partial_results(tmp_path)
    assert not tmp_path.exists()


def test_a_image_is_counted_once(scenes):
    class Twice(Things):
        def __getitem__(self, index):
            return {**self.scenes[index], "image_id": 5}

    with pytest.raises(ValueError, match="image id 5 was counted already"):
        evaluate(Oracle(scenes, "panoptic"), Twice(scenes), scenes.id2label)


SCRIPT = """
import json, sys
from accelerate import PartialState
sys.path.insert(0, sys.argv[1])
from hf_segvit.cli import main
from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.evaluation import evaluate
from tests.test_evaluate import Oracle
state = PartialState(cpu=True)
scenes = GeneratedScenes(7, size=(48, 64))
oracle = Oracle(scenes, "semantic", spoil=[1, 2])
result = evaluate(oracle, scenes, scenes.id2label)
print(json.dumps([state.process_index, oracle.calls, result.num_images, result.metrics["mean_iou"],
                  [image.index for image in result.images]]), flush=True)
"""


@pytest.mark.slow
def test_processes_share_the_images_without_repeating_one(tmp_path, scenes):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), root],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    rows = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]
    alone = evaluate(Oracle(scenes, "semantic", spoil=[1, 2]), scenes, scenes.id2label)
    assert sorted(row[1] for row in rows) == [3, 4]  # seven images, none padded
    for row in rows:
        assert row[2:4] == [7, pytest.approx(alone.metrics["mean_iou"], rel=1e-15)]
        assert row[4] == [image.index for image in alone.images]


def swin():
    return SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip


def tiny_mask2former(id2label):
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=swin(), feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=8,
        id2label=id2label,
    )  # fmt: skip
    return Mask2FormerForUniversalSegmentation(config), Mask2FormerImageProcessor(
        size={"height": 64, "width": 64}, num_labels=len(id2label)
    )


@pytest.mark.parametrize("task", TASKS)
def test_models_of_transformers_are_evaluated(task, tmp_path, scenes):
    model, processor = tiny_mask2former(scenes.id2label)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    predictor = Segmenter.from_pretrained(str(tmp_path), task=task, stuff_classes=scenes.stuff_classes)
    predictor.threshold = 0.05  # of panoptic segments; instances are all counted
    if task == "panoptic":
        (answer,) = predictor.answers([Image.fromarray(scenes[0]["image"])])
        ids = [row["id"] for row in answer["segments_info"]]
        assert len(set(ids)) == len(ids)
    result = evaluate(
        predictor, dataset_for(task, scenes), scenes.id2label, stuff_classes=scenes.stuff_classes, batch_size=2
    )
    assert result.num_images == 7
    assert 0 <= result.metrics[HEADLINES[task]] < 0.5


def test_classes_are_matched_by_name(scenes):
    # A model that numbers the same classes the other way round gets the same score.
    last = max(scenes.id2label)
    for task in TASKS:
        oracle = Oracle(scenes, task)
        table = np.arange(last, -1, -1)
        flip = evaluation_task(task, last + 1).relabel
        answer = oracle.answers
        oracle.id2label = {last - index: name for index, name in scenes.id2label.items()}

        class Flipped:
            id2label, task_name = oracle.id2label, task

            def answers(self, images, flip=flip, answer=answer, table=table):
                return [flip(given, table) for given in answer(images)]

        flipped = Flipped()
        flipped.task = task
        result = evaluate(flipped, dataset_for(task, scenes), scenes.id2label)
        assert result.metrics[HEADLINES[task]] == pytest.approx(1.0)


def test_the_stuff_of_a_model_that_numbers_otherwise_is_merged(tmp_path, scenes):
    model, settings = tiny_eomt(id2label=scenes.id2label, num_queries=20), {"threshold": 0.1}
    order = [(index + 2) % 6 for index in range(6)]
    turned = tiny_eomt(id2label={index: scenes.id2label[other] for index, other in enumerate(order)}, num_queries=20)
    turned.load_state_dict(model.state_dict())
    for own, other in zip(turned.class_predictor.parameters(), model.class_predictor.parameters(), strict=True):
        own.data = other.detach()[[*order, 6]].clone()
    processor = EoMTImageProcessor(size=64, task="panoptic", overlap_mask_area_threshold=0.1, **settings)
    answers, scores = [], []
    for place, one in enumerate((model, turned)):
        folder = tmp_path / str(place)
        one.save_pretrained(folder)
        processor.save_pretrained(folder)
        predictor = Segmenter.from_pretrained(
            str(folder), task="panoptic", stuff_classes=scenes.stuff_classes, data_labels=scenes.id2label
        )
        names = {one.config.id2label[label] for label in predictor.stuff_classes}
        assert names == {scenes.id2label[label] for label in scenes.stuff_classes}
        images = [Image.fromarray(scenes[index]["image"]) for index in range(7)]
        segments = [answer["segments_info"] for answer in predictor.answers(images)]
        answers.append([sorted(one.config.id2label[row["label_id"]] for row in rows) for rows in segments])
        command = ["evaluate", "--model", str(folder), "--data", "generated:easy?num_scenes=7&size=48", "--task"]
        assert main([*command, "panoptic", "--device", "cpu", "--json", str(tmp_path / "result.json")]) == 0
        rows = json.loads((tmp_path / "result.json").read_text())["classes"]
        # Nothing is found, but the segments that are wrong are counted.
        scores.append({row["label"]: row["false"] for row in rows})
    assert answers[0] == answers[1]
    stuff = {"sky", "grass", "water"}
    assert any(stuff & set(names) for names in answers[0]), "there is something to merge"
    assert scores[0] == scores[1]
    # With the data set's ids taken for the model's, other segments are merged.
    wrong = Segmenter(turned, processor, task="panoptic", stuff_classes=scenes.stuff_classes)
    segments = [answer["segments_info"] for answer in wrong.answers(images)]
    assert [sorted(turned.config.id2label[row["label_id"]] for row in rows) for rows in segments] != answers[0]


def test_classes_that_only_their_order_matches_are_told(scenes):
    oracle = Oracle(scenes, "panoptic")
    oracle.id2label = {**scenes.id2label, 3: "rectangle"}
    result = evaluate(oracle, scenes, scenes.id2label)
    assert result.metrics["pq"] == pytest.approx(1.0)
    assert ["'rectangle' as 'square'" in note for note in result.notes] == [True]
    assert "'rectangle' as 'square'" in result_text(result)


class WrongLabels(Oracle):
    """The true masks, each called the class behind its own."""

    def answers(self, images):
        table = np.roll(np.arange(len(self.id2label)), -1)
        relabel = evaluation_task(self.task, len(table)).relabel
        return [relabel(answer, table) for answer in super().answers(images)]


@pytest.mark.parametrize("task", TASKS)
def test_the_oracle_is_what_perfect_labels_would_give(task, tmp_path, scenes):
    dataset, headline = dataset_for(task, scenes), HEADLINES[task]
    settings = {"stuff_classes": scenes.stuff_classes, "more_metrics": ["oracle"], "chunk_size": 3}
    result = evaluate(WrongLabels(scenes, task), dataset, scenes.id2label, **settings)
    plain = evaluate(WrongLabels(scenes, task), dataset, scenes.id2label, stuff_classes=scenes.stuff_classes)
    assert result.metrics[headline] == plain.metrics[headline] < 0.1
    assert result.metrics[f"oracle_{headline}"] == pytest.approx(1.0)
    truth = evaluate(Oracle(scenes, task), dataset, scenes.id2label, stuff_classes=scenes.stuff_classes)
    perfect = {row["label"]: row["loss"] == pytest.approx(0) for row in truth.classes}
    assert all(row["oracle"] == pytest.approx(1.0) for row in result.classes if perfect.get(row["label"]))
    text = result_text(result)
    assert "the same masks with perfect labels" in text
    assert "(100.00)" in text
    # Missing masks stay missing.
    spoilt = evaluate(WrongLabels(scenes, task, spoil=[1]), dataset, scenes.id2label, **settings)
    assert 0.3 < spoilt.metrics[f"oracle_{headline}"] < 1
    # What was counted on disk, the oracle's share too, is not counted again.
    folder = {"partial_folder": tmp_path / "partial"}
    first = evaluate(WrongLabels(scenes, task, spoil=[1]), dataset, scenes.id2label, **settings, **folder)
    again = WrongLabels(scenes, task)
    np.testing.assert_equal(vars(evaluate(again, dataset, scenes.id2label, **settings, **folder)), vars(first))
    assert again.calls == 0
    with pytest.raises(ValueError, match=r"another evaluation \(metrics"):
        evaluate(again, dataset, scenes.id2label, **folder)


class PixelAccuracy(ImageMetric):
    """Share of the pixels with a class that got the right one, of stuff and of all; a metric as a user writes it."""

    def __init__(self, id2label, stuff_classes):
        self.id2label, self.stuff_classes = id2label, stuff_classes
        super().__init__()

    def _no_counts(self):
        return {"pixels": np.zeros((len(self.id2label), 2), dtype=np.int64)}

    def _count(self, prediction, reference, name, image_id):
        counts = self._no_counts()
        for label in self.id2label:
            true = np.asarray(reference) == label
            counts["pixels"][label] = (true & (np.asarray(prediction) == label)).sum(), true.sum()
        return counts

    def compute(self):
        totals = {
            "every_pixel": self.counts["pixels"].sum(0),
            "stuff_pixels": self.counts["pixels"][self.stuff_classes].sum(0),
        }
        shares = {name: right / all_ if all_ else math.nan for name, (right, all_) in totals.items()}
        return {**shares, "labels_seen": int((self.counts["pixels"][:, 1] > 0).sum()), "per_class": {}}


class SameName(PixelAccuracy):
    """Calls its value as the task's metric does."""

    def compute(self):
        return {"mean_iou": 0.0}


def test_a_metric_of_ones_own_counts_beside_the_tasks(tmp_path, scenes):
    settings = {"stuff_classes": scenes.stuff_classes, "chunk_size": 2, "metrics": [PixelAccuracy]}
    plain = evaluate(Oracle(scenes, "semantic", spoil=[1, 4]), scenes, scenes.id2label)
    whole = evaluate(Oracle(scenes, "semantic", spoil=[1, 4]), scenes, scenes.id2label, batch_size=3, **settings)
    answers = Oracle(scenes, "semantic", spoil=[1, 4])
    right, true = np.zeros(2), np.zeros(2)  # of all classes, of stuff
    for index in range(7):
        truth = evaluation_task("semantic", 6).reference(scenes[index])
        (answer,) = answers.answers([scenes[index]["image"]])
        for kind, known in enumerate((truth >= 0, np.isin(truth, scenes.stuff_classes))):
            right[kind] += (answer == truth)[known].sum()
            true[kind] += known.sum()
    assert whole.metrics["every_pixel"] == right[0] / true[0] == plain.metrics["pixel_accuracy"] < 1
    assert whole.metrics["stuff_pixels"] == right[1] / true[1] != right[0] / true[0]
    assert whole.metrics["labels_seen"] == 6
    assert {name: whole.metrics[name] for name in plain.metrics} == plain.metrics
    assert whole.classes == plain.classes
    assert f"every_pixel             {100 * right[0] / true[0]:.2f}" in result_text(whole)
    assert json.loads(json.dumps(result_content(whole)))["metrics"]["labels_seen"] == 6

    class Breaking(Oracle):
        def answers(self, images):
            if self.calls >= 5:
                raise RuntimeError("out of memory")
            return super().answers(images)

    settings["partial_folder"] = tmp_path / "partial"
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(Breaking(scenes, "semantic", spoil=[1, 4]), scenes, scenes.id2label, **settings)
    again = Oracle(scenes, "semantic", spoil=[1, 4])
    np.testing.assert_equal(vars(evaluate(again, scenes, scenes.id2label, **settings)), vars(whole))
    assert again.calls == 3  # four of the seven were counted, by this metric too
    with pytest.raises(ValueError, match=r"another evaluation \(metrics .*PixelAccuracy"):
        evaluate(again, scenes, scenes.id2label, **{**settings, "metrics": []})


def test_metrics_that_cannot_stand_side_by_side_are_refused_before_anything_is_counted(scenes):
    oracle = Oracle(scenes, "semantic")
    with pytest.raises(ValueError, match=r"test_evaluate:SameName has a value 'mean_iou', and so has another metric"):
        evaluate(oracle, scenes, scenes.id2label, metrics=[SameName])
    with pytest.raises(ValueError, match=r"metric .*:PixelAccuracy is given twice"):
        evaluate(oracle, scenes, scenes.id2label, metrics=[PixelAccuracy, PixelAccuracy])
    assert oracle.calls == 0


@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_boundaries_are_scored_beside_areas(task, scenes):
    dataset = dataset_for(task, scenes)

    class Shifted(Oracle):
        """The truth, two pixels to the right."""

        def answers(self, images):
            shifted = []
            for answer in super().answers(images):
                if task == "semantic":
                    shifted.append(np.roll(answer, 2, axis=1))
                else:
                    shifted.append({**answer, "segmentation": np.roll(answer["segmentation"], 2, axis=1)})
            return shifted

    result = evaluate(Shifted(scenes, task), dataset, scenes.id2label, more_metrics=["boundary"])
    name = {"semantic": "boundary_iou", "instance": "boundary_ap"}[task]
    books = evaluation_task(task, len(scenes.id2label))
    metric, shifted = books.new_boundary_metric(), Shifted(scenes, task)
    for index in range(len(scenes)):
        entry = dataset[index]
        metric.add_batch(predictions=shifted.answers([entry["image"]]), references=[books.reference(entry)])
    expected = metric.compute()
    assert result.metrics[name] == expected[name.replace("boundary_ap", "ap")]
    assert result.metrics[name] < result.metrics[HEADLINES[task]] - 0.05
    column = {"semantic": "iou", "instance": "ap"}[task]
    rows = [(row["boundary"], expected["per_class"][row["label_id"]][column]) for row in result.classes]
    assert [found for found, _ in rows] == [value for _, value in rows]
    assert name in result_text(result)


@pytest.mark.parametrize("task", TASKS)
def test_reports(task, tmp_path, scenes):
    dataset = dataset_for(task, scenes)
    oracle = Oracle(scenes, task, spoil=[2])
    result = evaluate(oracle, dataset, scenes.id2label, stuff_classes=scenes.stuff_classes)
    text = result_text(result, max_rows=2)
    assert f"{task}, 7 images" in text
    assert f"{100 * result.metrics[HEADLINES[task]]:.2f}" in text
    assert result.classes[0]["label"] in text
    assert f"and {len(result.classes) - 2} more classes" in text
    if task == "semantic":
        assert "left out of the means" in text
        assert result.classes[0]["mostly taken for"] is None or isinstance(result.classes[0]["mostly taken for"], str)
    write_json(tmp_path / "results.json", {"model": "m", **result_content(result)})
    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert content["model"] == "m"
    assert content["pictures"][0]["image_id"] == 2
    assert content["metrics"][HEADLINES[task]] == result.metrics[HEADLINES[task]]
    draw_worst(tmp_path / "worst.png", oracle, dataset, scenes.id2label, result.images[:2])
    with Image.open(tmp_path / "worst.png") as sheet:
        assert sheet.width > 3 * 480
        assert sheet.height > 2 * 300


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    labels = GeneratedScenes(1).id2label
    tiny_eomt(id2label=labels).save_pretrained(folder)
    EoMTImageProcessor(size=64, task="panoptic", stuff_classes=[1, 2, 4], threshold=0.1).save_pretrained(folder)
    return str(folder)


def test_the_command_writes_its_results(checkpoint, tmp_path, capsys):
    numbers = tmp_path / "new" / "numbers.json"
    command = ["evaluate", "--model", checkpoint, "--data", "generated:easy", "--task", "semantic", "--limit", "5"]
    command += ["--batch-size", "2", "--device", "cpu", "--worst", "2", "--output", str(tmp_path / "out")]
    command += ["--oracle", "--boundary"]
    assert main([*command, "--json", str(numbers)]) == 0
    printed = capsys.readouterr().out
    assert "semantic, 5 images" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "results.txt", "worst.png"]
    content = json.loads(numbers.read_text())
    assert content == json.loads((tmp_path / "out" / "results.json").read_text())
    assert (content["split"], content["num_images"], len(content["pictures"])) == ("val", 5, 5)
    dataset = GeneratedScenes(5, "val")
    predictor = Segmenter.from_pretrained(checkpoint, task="semantic")
    expected = evaluate(predictor, dataset, dataset.id2label).metrics["mean_iou"]
    assert content["metrics"]["mean_iou"] == pytest.approx(expected, rel=1e-3)
    assert content["metrics"]["oracle_mean_iou"] > content["metrics"]["mean_iou"]
    assert 0 < content["metrics"]["boundary_iou"] < 1


def test_the_command_takes_metrics_by_their_import_path(checkpoint, tmp_path, capsys):
    command = ["evaluate", "--model", checkpoint, "--data", "generated:easy", "--task", "semantic", "--limit", "3"]
    command += ["--device", "cpu", "--json", str(tmp_path / "n.json")]
    assert main([*command, "--metrics", "tests.test_evaluate:PixelAccuracy"]) == 0
    metrics = json.loads((tmp_path / "n.json").read_text())["metrics"]
    assert metrics["every_pixel"] == metrics["pixel_accuracy"] > 0
    assert f"every_pixel             {100 * metrics['every_pixel']:.2f}" in capsys.readouterr().out
    assert main([*command, "--metrics", "tests.test_evaluate:Things"]) == 2
    assert "--metrics=tests.test_evaluate:Things has no method reset, add_batch, compute" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--threshold", "0.5"], "no meaning for task semantic"),
        (["--data", "generated:none"], "choose generated:easy"),
        (["--data", "pascal:/data"], "no format 'pascal'"),
        (["--split", "nowhere"], "nowhere"),
        (["--model", "/no/such/folder"], "no folder /no/such/folder"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--task", "panoptic", "--boundary"], "--boundary is for the tasks semantic and instance"),
    ],
)
def test_the_command_says_what_is_wrong(change, message, checkpoint, capsys):
    data = [] if "--data" in change else ["--data", "generated:easy"]
    command = ["evaluate", "--model", checkpoint, *data, "--task", "semantic", *change]
    assert main(command) == 2
    assert message in capsys.readouterr().err


def test_bad_settings_are_refused(scenes):
    oracle = Oracle(scenes, "panoptic")
    with pytest.raises(ValueError, match="no images"):
        evaluate(oracle, [], scenes.id2label)
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate(oracle, scenes, scenes.id2label, batch_size=0)
    with pytest.raises(ValueError, match="6 classes and the data set 5"):
        evaluate(oracle, scenes, {index: scenes.id2label[index] for index in range(5)})
    with pytest.raises(ValueError, match="there is no metric 'depth'; choose one of oracle, boundary"):
        evaluate(oracle, scenes, scenes.id2label, more_metrics=["depth"])
    with pytest.raises(ValueError, match="not for panoptic"):
        evaluate(oracle, scenes, scenes.id2label, more_metrics=["boundary"])
    with pytest.raises(ValueError, match="there is no task 'depth'"):
        evaluation_task("depth", 3)
