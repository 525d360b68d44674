"""`evaluate --task anomaly`: scores against scikit-learn over pooled pixels, resuming, and what is refused."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from hf_segvit.cli import main
from hf_segvit.cli.evaluate_anomaly import DEFAULT_SCORES as OFFERED
from hf_segvit.cli.evaluate_anomaly import TRACKS as OFFERED_TRACKS
from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.data.reading import describe, load_segmentation_dataset
from hf_segvit.evaluation.anomaly import DEFAULT_SCORES, anomaly_text, evaluate_anomalies
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.metrics.anomaly_components import TRACKS, AnomalyComponents
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor

from .data_folders import write_image, write_mask
from .tiny_models import tiny_eomt

SCORES = ["rba", "msp@0.5", "maxscore", "rejection"]


def segmenter() -> Segmenter:
    model = tiny_eomt(num_queries=9)
    with torch.no_grad():
        model.class_predictor.weight *= 4
    return Segmenter(model, EoMTImageProcessor(task="semantic", size=64), device="cpu")


@pytest.fixture
def data(tmp_path):
    """A folder with masks of 0, 1 and 255, one of them without an anomaly."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for index in range(5):
        name = f"{index}"
        (root / "images").mkdir(parents=True, exist_ok=True)
        blocks = rng.integers(0, 256, (5, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(blocks).save(root / "images" / f"{name}.png")
        mask = rng.choice([0, 0, 1, 255], (5, 8)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        write_mask(root / "labels_masks" / f"{name}.png", np.where(mask == 1, 0, mask) if index == 3 else mask)
    return root


def save(folder, task="semantic"):
    ours = segmenter()
    ours.model.save_pretrained(folder)
    EoMTImageProcessor(task=task, size=64).save_pretrained(folder)
    return folder


def pooled(dataset, name) -> tuple[np.ndarray, np.ndarray]:
    """Anomaly scores and truth of all pixels that are not void."""
    scores, truth = [], []
    ours = segmenter()
    for entry in dataset:
        ids = np.asarray(entry["segment_map"])
        labels = np.full(ids.shape, 255)
        for row in entry["segments"]:
            labels[ids == row["id"]] = row["label_id"]
        ((_, maps),) = ours.confidences([entry["image"]], name)
        scores.append(-maps[name].numpy()[labels != 255])
        truth.append(labels[labels != 255])
    return np.concatenate(scores), np.concatenate(truth)


def test_the_command_has_the_defaults_of_the_library():
    assert tuple(OFFERED.split(",")) == DEFAULT_SCORES
    assert tuple(TRACKS) == OFFERED_TRACKS


def test_scores_are_those_of_scikit_learn(data):
    dataset = load_segmentation_dataset(f"anomaly:{data}", split="val", task="semantic")
    id2label = describe(dataset).id2label
    result = evaluate_anomalies(segmenter(), dataset, id2label, SCORES, batch_size=2)
    assert list(result.scores) == SCORES
    for name, values in result.scores.items():
        scores, truth = pooled(dataset, name)
        assert values["anomaly_pixels"] == (truth == 1).sum()
        assert values["auprc"] == pytest.approx(average_precision_score(truth, scores), abs=1e-9)
        assert values["auroc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-9)
        false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
        assert values["fpr95"] == pytest.approx(false[np.searchsorted(true, 0.95)], abs=1e-9)
        recall, precision = zip(*result.curves[name]["precision_recall"], strict=True)
        assert (recall[-1], precision[-1]) == (1, pytest.approx(truth.mean()))
        assert result.curves[name]["roc"][-1] == (1, 1)
    scored = [image.score for image in result.images]
    assert np.isnan(scored[-1])
    assert scored[:-1] == sorted(scored[:-1])
    by_id = {image.image_id: image.score for image in result.images}
    one = dataset.select([0])
    assert by_id[one[0]["image_id"]] == pytest.approx(average_precision_score(*pooled(one, "rba")[::-1]), abs=1e-9)


def test_classes_that_a_model_does_not_know_are_anomalies():
    scenes = GeneratedScenes(4, "val", size=(64, 64), seed=1)
    label = next(label for label, name in scenes.id2label.items() if name == "water")
    result = evaluate_anomalies(segmenter(), scenes, scenes.id2label, "msp", classes=[label])
    entries = [scenes[index] for index in range(4)]
    pixels = sum(
        (np.asarray(entry["segment_map"]) == row["id"]).sum()
        for entry in entries
        for row in entry["segments"]
        if row["label_id"] == label
    )
    assert result.scores["msp"]["anomaly_pixels"] == pixels
    assert result.notes[0] == "anomalies are the classes water"
    with pytest.raises(ValueError, match="say with classes which of them are anomalies"):
        evaluate_anomalies(segmenter(), scenes, scenes.id2label, "msp")


def test_without_anomalies_it_says_so(tmp_path):
    write_image(tmp_path / "images" / "a.png")
    write_mask(tmp_path / "labels_masks" / "a.png", np.zeros((20, 30), np.uint8))
    dataset = load_segmentation_dataset(f"anomaly:{tmp_path}", split="val", task="semantic")
    result = evaluate_anomalies(segmenter(), dataset, describe(dataset).id2label, "msp")
    assert result.scores["msp"]["auprc"] is None
    text = anomaly_text({"a": result})
    assert "note: no anomalous pixel in 1 images" in text
    assert text.splitlines()[-1].split() == ["msp", "-", "-", "-", "-"]


def test_the_command_resumes_and_asks_once_for_all_scores(data, tmp_path, monkeypatch, capsys):
    model = save(tmp_path / "model")
    words = ["evaluate", "--model", str(model), "--device", "cpu", "--task", "anomaly", "--scores", "rba,msp@0.5"]
    words += ["--data", f"anomaly:{data}", "--data", f"anomaly:{data}?anomaly=0&known=1"]
    words += ["--output", str(tmp_path / "out")]
    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules["hf_segvit.evaluation.evaluate"], "CHUNK_SIZE", 2)
    asked = []
    confidences = Segmenter.confidences

    def counted(self, images, names):
        if len(asked) == 7:
            raise KeyboardInterrupt
        asked.append(len(images))
        return confidences(self, images, names)

    monkeypatch.setattr(Segmenter, "confidences", counted)
    assert main(words) == 130
    asked.clear()
    assert main([*words, "--worst", "0"]) == 0
    assert sum(asked) == 3  # all images of the first data set and 2 of the second were counted before
    monkeypatch.setattr(Segmenter, "confidences", confidences)
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not list((tmp_path / "out").glob("partial*"))
    first, second = report["results"].values()
    dataset = load_segmentation_dataset(f"anomaly:{data}", split="val", task="semantic")
    scores, truth = pooled(dataset, "msp@0.5")
    assert first["scores"]["msp@0.5"]["auprc"] == pytest.approx(average_precision_score(truth, scores), abs=1e-9)
    assert second["scores"]["msp@0.5"]["auroc"] == pytest.approx(roc_auc_score(1 - truth, scores), abs=1e-9)
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert f"{100 * first['scores']['rba']['auprc']:.2f}" in printed
    assert not list((tmp_path / "out").glob("worst*"))
    assert main([*words[:-2], "--output", str(tmp_path / "drawn"), "--worst", "2"]) == 0
    assert Image.open(tmp_path / "drawn" / "worst-2.png").width > 1000


def test_components_are_those_at_the_best_threshold_of_all_pixels(data, tmp_path, monkeypatch, capsys):
    dataset = load_segmentation_dataset(f"anomaly:{data}", split="val", task="semantic")
    id2label = describe(dataset).id2label
    result = evaluate_anomalies(segmenter(), dataset, id2label, ["rba", "msp"], components="obstacle", batch_size=2)
    for name, values in result.components.items():
        threshold = result.scores[name]["best_f1_threshold"]
        scores, truth = pooled(dataset, name)
        found = (truth == 1) & (scores >= np.float32(threshold))
        precision, recall = found.sum() / (scores >= np.float32(threshold)).sum(), found.sum() / (truth == 1).sum()
        assert result.scores[name]["best_f1"] == pytest.approx(2 * precision * recall / (precision + recall))
        expected, ours = AnomalyComponents(threshold, "obstacle"), segmenter()
        for entry in dataset:
            ((_, maps),) = ours.confidences([entry["image"]], name)
            labels = np.select([entry["segment_map"] == 1, entry["segment_map"] == 0], [1, 0], 255)
            expected.update(-maps[name].numpy(), labels)
        assert values == {"threshold": threshold, **expected.compute()}
        assert values["true_components"] > 5
    # The command, interrupted in its second pass.
    words = ["evaluate", "--model", str(save(tmp_path / "model")), "--device", "cpu", "--task", "anomaly"]
    words += ["--scores", "rba,msp", "--components", "obstacle", "--data", f"anomaly:{data}", "--worst", "0"]
    words += ["--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys.modules["hf_segvit.evaluation.evaluate"], "CHUNK_SIZE", 2)
    asked, confidences = [], Segmenter.confidences

    def counted(self, images, names):
        if len(asked) == 8:
            raise KeyboardInterrupt
        asked.append(len(images))
        return confidences(self, images, names)

    monkeypatch.setattr(Segmenter, "confidences", counted)
    assert main(words) == 130
    asked.clear()
    assert main(words) == 0
    assert sum(asked) == 3  # 5 of the first pass and 2 of the second were counted before
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    (stored,) = report["results"].values()
    assert (stored["components"], stored["track"]) == (result.components, "obstacle")
    assert not list((tmp_path / "out").glob("partial*"))
    printed = capsys.readouterr().out
    assert f"{100 * result.components['msp']['mean_f1']:.2f}" in printed
    assert "mean_f1" in printed
    assert "note: components are those of the track obstacle: true ones of at least 10, predicted ones of at" in printed
    with pytest.raises(ValueError, match="there is no track 'obstacles' of components; did you mean obstacle"):
        evaluate_anomalies(segmenter(), dataset, id2label, ["rba"], components="obstacles")


def test_each_data_set_has_its_track_and_one_may_be_undefined(data, tmp_path, capsys):
    nothing = tmp_path / "nothing"
    write_image(nothing / "images" / "a.png")
    write_mask(nothing / "labels_masks" / "a.png", np.zeros((20, 30), np.uint8))
    words = ["evaluate", "--model", str(save(tmp_path / "model")), "--device", "cpu", "--task", "anomaly"]
    words += ["--scores", "rba,msp", "--output", str(tmp_path / "out"), "--worst", "0"]
    specs = [f"anomaly:{data}", f"anomaly:{nothing}", f"anomaly:{data}?anomaly=0&known=1"]
    for spec in specs:
        words += ["--data", spec]
    assert main([*words, "--components", "obstacle,anomaly, obstacle"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    first, undefined, last = report["results"].values()
    assert [each["track"] for each in (first, undefined, last)] == ["obstacle", "anomaly", "obstacle"]
    for each, spec in ((first, specs[0]), (last, specs[2])):
        dataset = load_segmentation_dataset(spec, split="val", task="semantic")
        alone = evaluate_anomalies(
            segmenter(), dataset, describe(dataset).id2label, ["rba", "msp"], components="obstacle"
        )
        assert each["components"] == alone.components
        assert each["components"]["rba"]["true_components"] > 5
    for name in ("rba", "msp"):
        values = undefined["components"][name]
        assert values["undefined"].startswith("no anomalous pixel in 1 images")
        assert [values[column] for column in ("threshold", "siou", "ppv", "mean_f1")] == [None] * 4
    assert printed.count("no anomalous pixel in 1 images") == 1
    rows = [line.split() for line in printed.splitlines()]
    assert ["rba", *["-"] * 7] in rows
    assert not list((tmp_path / "out").glob("partial*"))
    assert main([*words, "--components", "obstacle,anomaly"]) == 2
    assert "--components names 2 tracks for 3 data sets; give one for all, or one for each" in capsys.readouterr().err


def test_counts_of_components_do_not_outlive_a_run_without_them(data, tmp_path):
    words = ["evaluate", "--model", str(save(tmp_path / "model")), "--device", "cpu", "--task", "anomaly"]
    words += ["--scores", "rba", "--data", f"anomaly:{data}", "--worst", "0", "--output", str(tmp_path / "out")]
    left = tmp_path / "out" / "partial-1-components" / f"counts-{'0' * 64}.npz"
    left.parent.mkdir(parents=True)
    left.touch()
    assert main(words) == 0
    assert not list((tmp_path / "out").glob("partial*"))


SCRIPT = """
import json, sys
from accelerate import PartialState
sys.path.insert(0, sys.argv[1])
from hf_segvit.data.reading import describe, load_segmentation_dataset
from hf_segvit.evaluation.anomaly import evaluate_anomalies
from tests.test_evaluate_anomaly import segmenter
state = PartialState(cpu=True)
dataset = load_segmentation_dataset(sys.argv[2], split="val", task="semantic")
ours = segmenter()
result = evaluate_anomalies(ours, dataset, describe(dataset).id2label, ["rba", "msp"], components="obstacle")
print(json.dumps([result.num_images, result.scores, result.components]), flush=True)
"""


@pytest.mark.slow
def test_processes_share_both_passes(data, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(Path(__file__).parents[1]), f"anomaly:{data}"],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]
    dataset = load_segmentation_dataset(f"anomaly:{data}", split="val", task="semantic")
    alone = evaluate_anomalies(segmenter(), dataset, describe(dataset).id2label, ["rba", "msp"], components="obstacle")
    assert found[0] == found[1]
    assert found[0][:2] == [5, alone.scores]
    for name, values in alone.components.items():
        # Sums of sIoU in another order.
        assert found[0][2][name] == {
            **values,
            "siou": pytest.approx(values["siou"]),
            "ppv": pytest.approx(values["ppv"]),
        }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scores", "rbb"], "there is no confidence 'rbb'"),
        (["--scores", "rejection", "--tta-flip"], "--confidence 'rejection' is about queries"),
        (["--task", "semantic", "--components", "anomaly", "--scores", ""], "is for task anomaly, not for semantic"),
        (["--components", "obstacles"], "--components: there is no track 'obstacles'; did you mean obstacle"),
        (["--components", ""], "--components: there is no track ''"),
        (["--oracle"], "--oracle is about answers"),
        (["--calibration"], "--calibration is about answers"),
        (["--threshold", "0.5"], "--threshold 0.5 has no meaning for task anomaly"),
        (["--task", "semantic"], "--scores is for task anomaly, not for semantic"),
        (["--task", "semantic", "--data", "generated:easy", "--scores", ""], "--scores is for task anomaly"),
        (["--data", "generated:easy?num_scenes=2"], "say with --classes which of them are anomalies"),
    ],
)
def test_wrong_options_end_in_one_line(options, message, data, tmp_path, capsys):
    words = ["evaluate", "--model", str(save(tmp_path / "model")), "--device", "cpu", "--task", "anomaly"]
    words += ["--data", f"anomaly:{data}", *(["--scores", "msp"] if "--scores" not in options else [])]
    assert main([*words, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_semantic_task_is_refused(data, tmp_path, capsys):
    words = ["evaluate", "--model", str(save(tmp_path / "model", "instance")), "--device", "cpu", "--task", "anomaly"]
    assert main([*words, "--data", f"anomaly:{data}"]) == 2
    assert "cannot do task 'semantic'" in capsys.readouterr().err


def test_several_data_sets_are_for_anomalies_alone(tmp_path, capsys):
    words = ["evaluate", "--model", str(save(tmp_path / "model")), "--device", "cpu", "--task", "semantic"]
    assert main([*words, "--data", "generated:easy", "--data", "generated:hard"]) == 2
    assert "--data is given 2 times, which is for task anomaly" in capsys.readouterr().err
