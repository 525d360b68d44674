"""`hf-segvit evaluate --task points`: the table and the files that it writes, and settings that do not go together."""

import json
import sys

import pytest
import torch

from hf_segvit.cli import main
from hf_segvit.inference.point_classifier import PointClassifier
from hf_segvit.models.configuration_vit_p import ViTPConfig
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor
from hf_segvit.models.modeling_vit_p import ViTPForPointClassification
from tests.tiny_models import randomize, tiny_eomt

LABELS = {0: "disc", 1: "sky", 2: "grass", 3: "square", 4: "water", 5: "triangle"}
DATA = ["--task", "points", "--data", "generated:easy?num_scenes=3&size=48", "--device", "cpu"]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = ViTPConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=56,
        id2label=LABELS,
        label2id={name: label for label, name in LABELS.items()},
    )
    randomize(ViTPForPointClassification(config)).save_pretrained(tmp_path / "model")
    ViTPImageProcessor(size=56).save_pretrained(tmp_path / "model")
    return tmp_path


def test_scores_are_printed_and_written(folder, capsys):
    arguments = ["evaluate", "--model", str(folder / "model"), *DATA, "--num-points", "7"]
    assert main([*arguments, "--output", str(folder / "out"), "--batch-size", "2"]) == 0
    result = json.loads((folder / "out" / "results.json").read_text())
    assert (result["task"], result["points"]) == ("points", "random")
    assert result["metrics"]["num_points"] == 21
    printed = capsys.readouterr().out
    assert f"{100 * result['metrics']['top_1']:.2f}" in printed
    assert "expected_calibration_error" in printed
    assert len(result["pictures"]) == 3


def test_the_generators_masks_are_asked_about(folder, capsys):
    tiny_eomt(id2label=LABELS).save_pretrained(folder / "generator")
    EoMTImageProcessor(size=64).save_pretrained(folder / "generator")
    arguments = ["evaluate", "--model", str(folder / "model"), *DATA, "--points", "maximum"]
    assert main([*arguments, "--generator", str(folder / "generator"), "--json", str(folder / "r.json")]) == 0
    assert "generator_top_1" in json.loads((folder / "r.json").read_text())["metrics"]
    assert main(arguments) == 2
    assert "go together" in capsys.readouterr().err


def test_an_interrupted_evaluation_goes_on(folder, monkeypatch, capsys):
    arguments = ["evaluate", "--model", str(folder / "model"), *DATA, "--num-points", "7", "--output"]
    assert main([*arguments, str(folder / "whole")]) == 0
    original, asked = PointClassifier.__call__, []

    def breaking(self, images, points):
        if len(asked) == 2:
            raise ValueError("a damaged image")
        asked.append(1)
        return original(self, images, points)

    monkeypatch.setattr(PointClassifier, "__call__", breaking)
    monkeypatch.setattr(sys.modules["hf_segvit.evaluation.evaluate"], "CHUNK_SIZE", 1)
    assert main([*arguments, str(folder / "parts")]) == 2
    assert len(list((folder / "parts" / "partial").iterdir())) == 2
    assert main([*arguments, str(folder / "parts"), "--seed", "1"]) == 2
    assert "another evaluation (seed 0 != 1)" in capsys.readouterr().err
    asked[:] = [1]
    assert main([*arguments, str(folder / "parts")]) == 0
    assert {path.name for path in (folder / "parts").iterdir()} == {"results.json", "results.txt"}
    results = [json.loads((folder / name / "results.json").read_text()) for name in ("whole", "parts")]
    assert results[1]["metrics"] == pytest.approx(results[0]["metrics"], rel=1e-12)  # summed in another order
    assert results[1]["pictures"] == results[0]["pictures"]


def test_wrong_settings_are_told_in_one_line(folder, capsys):
    model = ["--model", str(folder / "model")]
    assert main(["evaluate", *model, *DATA, "--num-points", "0"]) == 2
    assert "--num-points 0 must be at least 1" in capsys.readouterr().err
    tiny_eomt().save_pretrained(folder / "eomt")
    assert main(["evaluate", "--model", str(folder / "eomt"), *DATA]) == 2
    assert "segvit_eomt" in capsys.readouterr().err
