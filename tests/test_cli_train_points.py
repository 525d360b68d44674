"""`hf-segvit train own_points`: a folder of images and masks to a usable point classifier, also from a mixture."""

import json

import pytest
import torch

from hf_segvit import ViTPForPointClassification, ViTPImageProcessor
from hf_segvit.cli import main

from .data_folders import mask_folder
from .test_training_vit_p import MODEL

SETTINGS = [
    *("backbone=null", f"model_config={json.dumps(MODEL)}", "image_size=24", "precision=no", "points.num_points=6"),
    *("steps=3", "batch_size=2", "device_batch_size=1", "warmup_steps=[1]", "num_workers=0", "trackers=[]", "--cpu"),
]


@pytest.fixture
def data(tmp_path):
    """Images whose left half is road and whose right half is car."""
    mask_folder(tmp_path / "own", ("one", "two", "three"))
    return mask_folder(tmp_path / "own", ("four", "five"), split="val")


def train(data, output, *more):
    return main(["train", "own_points", f"data={data}", f"output={output}", *SETTINGS, *more])


def test_a_folder_becomes_a_point_classifier(data, tmp_path, capsys):
    assert train(data, tmp_path / "run") == 0
    assert capsys.readouterr().out.startswith("top_1 ")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["plan"]["total_steps"] == 3
    assert results["metrics"]["num_points"] == 12
    model = ViTPForPointClassification.from_pretrained(tmp_path / "run" / "model").eval()
    assert model.config.id2label == {0: "road", 1: "car"}
    processor = ViTPImageProcessor.from_pretrained(tmp_path / "run" / "model")
    inputs = processor(torch.zeros(3, 20, 30, dtype=torch.uint8), input_points=[[[3, 3]]], return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits.shape == (1, 1, 2)
    command = ["evaluate", "--model", str(tmp_path / "run" / "model"), "--data", data, "--task", "points"]
    assert main([*command, "--num-points", "6", "--device", "cpu", "--json", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())["metrics"]
    # Batches of another size, whose logits differ in the last bits.
    assert again["mean_confidence"] == pytest.approx(results["metrics"]["mean_confidence"], rel=1e-5)
    assert again["top_1"] == results["metrics"]["top_1"]


def test_a_folder_is_mixed_with_another(data, tmp_path, capsys):
    coarse = mask_folder(tmp_path / "coarse", ("six", "seven"))
    mixture = f"points.mixture=[{{data: '{coarse}', source: coarse, share: 3}}]"
    assert train(data, tmp_path / "run", mixture) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["plan"]["pictures"] == 5
    other = mask_folder(tmp_path / "other", ("six",), classes={"0": "cat", "1": "dog"})
    assert train(data, tmp_path / "more", mixture.replace(coarse, other)) == 2
    assert "has 2 classes, among them ['cat', 'dog']" in capsys.readouterr().err
