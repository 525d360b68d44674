"""The benchmark of anomalies: what is held out is not trained on, a small run of both models, and the report."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import anomaly_cost
import anomaly_scenes


@pytest.fixture(autouse=True)
def same_threads(monkeypatch):
    # Scores do not depend on the number of threads, but other tests may have wanted theirs.
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


@pytest.mark.parametrize("name", ["shape", "texture", "both"])
def test_what_is_held_out_is_not_trained_on(name):
    experiment = anomaly_scenes.scenes(name, 6, 3, 0)
    held_out = {experiment.id2label[label] for label in experiment.held_out}
    assert held_out == set(anomaly_scenes.HELD_OUT[name])
    names = [experiment.id2label[label] for label in experiment.known]
    assert not held_out & set(names)
    assert experiment.images.shape == (6, 3, 104, 104)
    assert set(np.unique(experiment.maps)) <= set(range(-1, len(names)))
    for entry in experiment.tests:
        assert any(row["label_id"] in experiment.held_out for row in entry["segments"])
    pixels, maps = next(anomaly_scenes.batches(experiment, 0))
    assert pixels.shape[2:] == maps.shape[1:] == (96, 96)


@pytest.mark.slow
def test_a_run_is_scored_told_once_and_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(anomaly_scenes, "BATCH_SIZE", 2)
    words = ["run", "shape", "--seeds", "0", "--minutes", "0.001", "--scenes", "4", "--tests", "2"]
    assert anomaly_scenes.main([*words, "--output", str(tmp_path)]) == 0
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert sorted(results) == ["shape-eomt-seed0", "shape-segformer-seed0"]
    scores = results["shape-eomt-seed0"]["scores"]
    assert set(scores) == set(anomaly_scenes.CONFIDENCES)
    assert "rejection" not in results["shape-segformer-seed0"]["scores"]
    assert scores["maxscore"] == scores["maxlogit"]  # of masks, the same
    assert all(0 < values["auprc"] < 1 for values in scores.values())
    assert (tmp_path / "shape-eomt-seed0.png").is_file()
    capsys.readouterr()
    assert anomaly_scenes.main([*words, "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("is there already") == 2
    assert anomaly_scenes.main(["table", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "**shape**: star held out" in printed
    assert f"| rba | {100 * scores['rba']['auprc']:.1f} | {100 * scores['rba']['fpr95']:.1f} |" in printed
    assert (tmp_path / "anomaly_scenes.png").is_file()
    assert (tmp_path / "anomaly_reliability.png").is_file()
    words[words.index("0.001")] = "5"
    assert anomaly_scenes.main([*words, "--output", str(tmp_path)]) == 2


def test_operations_are_counted(monkeypatch):
    labels, scores = anomaly_cost.score_operations(19)
    pixels = 1024 * 2048
    assert labels == pixels * (500 + 1900)
    assert scores == pixels * (8 * 19 + 6 + 200)
    small = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    monkeypatch.setitem(anomaly_cost.BACKBONES, "L", small)
    monkeypatch.setattr(anomaly_cost, "WINDOW", 64)
    one, two = (anomaly_cost.forward_operations(19, windows) for windows in (1, 2))
    tokens = 100 + 5 + 16
    assert 2 * one == two
    assert one > 4 * 16 * (4 * 32 * 32 + 2 * 32 * 64)  # at least the products of the patches with the weights
    assert one < 40 * tokens * (4 * 32 * 32 + 2 * 32 * 64 + 2 * tokens * 32)
