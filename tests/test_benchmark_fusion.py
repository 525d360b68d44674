"""The fusion experiment on tiny models: what it stores, that a finished run is not repeated, its table and curves."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import fusion_experiment
from camvid_data import LABELS as CAMVID_LABELS
from PIL import Image

from hf_segvit import EoMTImageProcessor
from hf_segvit.data.generated_scenes import GeneratedScenes, scene_labels, scene_stuff_classes
from hf_segvit.evaluation import evaluate
from hf_segvit.inference.segmenter import Segmenter

from .tiny_generators import tiny_classifier
from .tiny_models import tiny_eomt


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    # Scores do not depend on the number of threads, but other tests may have wanted theirs.
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


def save_parts(folder, labels, task="panoptic", stuff_classes=()):
    tiny_eomt(id2label=labels).save_pretrained(folder / "eomt")
    processor = EoMTImageProcessor(
        size={"height": 64, "width": 64},
        task=task,
        do_split_image=False,
        stuff_classes=list(stuff_classes),
        threshold=0.1,
    )
    processor.save_pretrained(folder / "eomt")
    tiny_classifier(labels).save_pretrained(folder / "vit_p")  # without image processor
    return ["--generator", str(folder / "eomt"), "--classifier", str(folder / "vit_p"), "--output", str(folder / "out")]


def test_scenes(tmp_path, capsys):
    parts = save_parts(tmp_path, scene_labels("medium"), stuff_classes=scene_stuff_classes("medium"))
    for seed in ("0", "1"):
        fusion_experiment.main(["run", *parts, "--seed", seed, "--limit", "3"])
    path = tmp_path / "out" / "scenes-EoMT-seed0.json"
    result = json.loads(path.read_text())
    assert (result["pictures"], list(result["tasks"])) == (3, ["panoptic", "semantic"])
    assert result["tasks"]["semantic"]["alphas"] == pytest.approx([number / 10 for number in range(11)])
    # Alpha 0 is what the plain evaluation of the generator says.
    scenes = GeneratedScenes(3, "test", seed=0, size=(96, 96), difficulty="medium")
    predictor = Segmenter.from_pretrained(str(tmp_path / "eomt"), task="semantic")
    expected = evaluate(predictor, scenes, scenes.id2label, batch_size=8).metrics["mean_iou"]
    assert result["tasks"]["semantic"]["scores"][0] == pytest.approx(expected, rel=1e-3)
    model, processor = fusion_experiment.load_fused(str(tmp_path / "eomt"), str(tmp_path / "vit_p"))
    model.config.alpha = 0.4
    fused = evaluate(Segmenter(model, processor, task="semantic"), scenes, scenes.id2label, batch_size=8)
    assert result["tasks"]["semantic"]["scores"][4] == pytest.approx(fused.metrics["mean_iou"], rel=1e-3)

    path.write_text(json.dumps({**result, "seconds": -1}))
    capsys.readouterr()
    fusion_experiment.main(["run", *parts, "--seed", "0"])
    assert "is finished" in capsys.readouterr().out
    assert json.loads(path.read_text())["seconds"] == -1

    fusion_experiment.main(["table", "--output", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| scenes, EoMT")]
    assert [row.split("|")[1].strip() for row in rows] == ["scenes, EoMT, PQ", "scenes, EoMT, mIoU"]
    score = f"{100 * result['tasks']['semantic']['scores'][0]:.1f}"
    assert rows[1].split("|")[2:4] == [" 2 ", f" {score} ({score} - {score}) "]
    with Image.open(tmp_path / "out" / "alpha.png") as curves:
        assert curves.width > 2 * curves.height > 600  # two panels


def test_camvid(tmp_path, sample_data):
    parts = save_parts(tmp_path, CAMVID_LABELS, task="semantic")
    data = ["--data", f"camvid:{sample_data / 'camvid'}", "--split", "drive", "--limit", "2"]
    fusion_experiment.main(["run", *parts, *data])
    result = json.loads((tmp_path / "out" / "camvid-drive-EoMT-seed0.json").read_text())
    assert (result["pictures"], list(result["tasks"])) == (2, ["semantic"])
    assert 0 <= result["tasks"]["semantic"]["scores"][0] <= result["tasks"]["semantic"]["oracle"]


def test_what_cannot_be_run(tmp_path):
    parts = save_parts(tmp_path, scene_labels("medium"))
    with pytest.raises(SystemExit, match="it is scenes, or camvid:FOLDER"):
        fusion_experiment.main(["run", *parts, "--data", "voc"])
    with pytest.raises(SystemExit, match="there are no results"):
        fusion_experiment.main(["table", "--output", str(tmp_path)])
