"""`hf-segvit train`: recipes and overrides, exit codes, what a run leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from PIL import Image

from hf_segvit import EoMTForUniversalSegmentation, EoMTImageProcessor
from hf_segvit.cli import main
from hf_segvit.hub.push import plan_push
from hf_segvit.training import loop
from hf_segvit.training.signals import STOPPED_EXIT_CODE

from .tiny_training import tiny_recipe


@pytest.fixture
def recipe_file(tmp_path):
    recipe = tiny_recipe(tmp_path / "run", trackers=["tensorboard"], draw=1, evaluate_every=1.5, keep_last=1)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({name: value for name, value in recipe.to_dict().items() if name != "name"}))
    return file


def test_a_run_leaves_everything(recipe_file, tmp_path, capsys):
    assert main(["train", str(recipe_file), "steps=4", "--cpu"]) == 0
    printed = capsys.readouterr()
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        *("model", "results.json", "curves.png", "checkpoints", "history.jsonl", "logs", "predictions")
    }
    assert printed.out.startswith("pq ")
    assert "step 4/4: loss" in printed.err
    results = json.loads((run / "results.json").read_text())
    assert results["plan"]["total_steps"] == 4
    # Annealing ends with step 3, so both evaluations count; neither finds anything, and the first one stays the best.
    assert [(row["step"], row["not_comparable"]) for row in results["evaluations"]] == [(3, None), (4, None)]
    assert results["step"] == 3
    assert results["selection"] == "best of 2 evaluations by pq"
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    trained = [row for row in history if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4]
    names = trained[0].keys()
    assert {"learning rate/backbone", "learning rate/rest", "annealing/query layer 1", "memory in MiB"} <= names
    assert {f"{kind} loss/prediction {layer}" for kind in ("mask", "dice", "class") for layer in (1, 2, 3)} <= names
    model = EoMTForUniversalSegmentation.from_pretrained(run / "model")
    assert model.config.masked_attention_probabilities == [0.0, 0.0]
    assert EoMTImageProcessor.from_pretrained(run / "model").stuff_classes == [1, 2, 4]
    card = plan_push(run / "model", "me/tiny").files["README.md"]
    assert "4 steps of 4 images" in card
    assert "| generated:easy?num_scenes=2&size=64 | val | panoptic | pq |" in card
    assert Image.open(run / "predictions" / "step-00000004.png").width > 3 * 64
    assert any((run / "logs").rglob("events.out.tfevents*"))
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000003", "step-00000004"}
    checkpoint = run / "checkpoints" / "step-00000004"
    assert EoMTForUniversalSegmentation.from_pretrained(checkpoint).config.num_queries == 7, "usable as it is"


def test_explain_trains_nothing(recipe_file, tmp_path, capsys):
    assert main(["train", str(recipe_file), "--explain", "learning_rate=0.25"]) == 0
    printed = capsys.readouterr().out
    assert "0.25" in printed
    assert "backbone" in printed
    assert not (tmp_path / "run").exists()


def test_explain_may_stand_anywhere_and_full_has_every_parameter(recipe_file, capsys):
    recipe, words = str(recipe_file), []
    for arguments in (
        [recipe, "steps=5", "--explain"],
        [recipe, "--explain", "steps=5"],
        ["--explain", recipe, "steps=5"],
        [recipe, "steps=5", "--explain", "full"],
        ["--explain=full", recipe, "steps=5"],
    ):
        assert main(["train", *arguments]) == 0
        words.append(capsys.readouterr().out)
    brief, full = words[0], words[-1]
    assert words == [brief, brief, brief, full, full]
    assert "5 steps" in brief
    assert "4 blocks, the last 2 with queries, width 32, 2 heads" in brief
    assert "class_predictor.weight:" in full
    assert "class_predictor.weight:" not in brief
    assert main(["train", recipe, "--explain", "fulll"]) == 2
    assert "--explain fulll is unknown" in capsys.readouterr().err


def test_fields_are_printed_with_and_without_a_recipe(recipe_file, capsys):
    assert main(["train", "--fields"]) == 0
    assert "\nbatch_size               16  " in capsys.readouterr().out
    assert main(["train", str(recipe_file), "--fields", "model_config.num_queries=9"]) == 0
    printed = capsys.readouterr().out
    assert "\nbatch_size               4 (16)  " in printed
    assert '"num_queries": 9' in printed


def test_a_packaged_recipe_is_explained_before_its_data_and_weights_are_there(tmp_path, capsys):
    small = ["data=coco:" + str(tmp_path / "coco"), "backbone=timm/vit_tiny_patch16_224.augreg_in21k", "image_size=64"]
    assert main(["train", "coco_panoptic_small_640", "--explain", *small]) == 0
    printed = capsys.readouterr()
    assert "118,287" in printed.err
    assert "12 epochs of 7,393 steps" in printed.out
    assert "12 blocks, the last 3 with queries, width 192, 3 heads" in printed.out
    assert main(["train", "coco_panoptic_small_640", "--explain", "full", *small]) == 0
    assert "class_predictor.weight: 134x192" in capsys.readouterr().out, "133 published classes and no object"

    assert main(["train", "vit_p_coco_base", "--explain", *small]) == 0
    assert "118,287 images" in capsys.readouterr().out
    (tmp_path / "coco").mkdir()
    assert main(["train", "coco_panoptic_small_640", "--explain", *small]) == 2, "data that is there is read"
    assert "118,287" not in capsys.readouterr().err


def test_the_packaged_recipes_are_listed(capsys):
    assert main(["train", "--list"]) == 0
    assert "coco_panoptic_large_640" in capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a recipe"),
        (["nothing"], "there is no such file"),
        (["RECIPE", "learning_rat=1"], "learning_rate"),
        (["RECIPE", "data=generated:none"], "choose generated:easy"),
        (["RECIPE", "keep_best=nonsense", "steps=1", "warmup_steps=[0]"], "'nonsense' is no score.*pq"),
        (["RECIPE", "batch_size=5", "device_batch_size=2"], "does not divide"),
    ],
)
def test_mistakes_end_in_one_line(recipe_file, arguments, message, capsys):
    import re

    assert main(["train", *(word.replace("RECIPE", str(recipe_file)) for word in arguments)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-segvit")]
    assert len(error) == 1
    assert re.search(message, error[0])


def test_the_exit_code_says_that_it_can_go_on(recipe_file, monkeypatch):
    original = loop.OptimizerStep.__call__

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(loop.OptimizerStep, "__call__", interrupted)
    assert main(["train", str(recipe_file), "--cpu"]) == STOPPED_EXIT_CODE == 75
    monkeypatch.undo()
    assert main(["train", str(recipe_file), "--no-resume"]) == 2, "it would lose the checkpoint"
    assert main(["train", str(recipe_file)]) == 0


def test_a_stop_during_the_evaluation_does_not_wait_for_it(recipe_file, tmp_path, monkeypatch):
    from hf_segvit.training.tasks import segmentation

    original, calls = segmentation.evaluate, []

    def slow(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the signal should have ended the evaluation")
        return original(*arguments, **options)

    monkeypatch.setattr(segmentation, "evaluate", slow)
    assert main(["train", str(recipe_file), "--cpu"]) == 75
    assert main(["train", str(recipe_file), "--cpu"]) == 0
    evaluations = json.loads((tmp_path / "run" / "results.json").read_text())["evaluations"]
    steps = [row["step"] for row in evaluations]
    assert len(steps) == len(calls) - 1 == len(set(steps)), "the one that was broken off is made up for"


@pytest.mark.slow
def test_a_real_process_stops_and_goes_on(recipe_file, tmp_path):
    """With workers, SIGTERM from outside, and the exit code of the process."""
    command = [sys.executable, "-m", "hf_segvit", "train", str(recipe_file), "steps=400", "num_workers=2", "--cpu"]
    history = tmp_path / "run" / "history.jsonl"
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (history.is_file() and history.stat().st_size):
        time.sleep(0.05)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert "SIGTERM: saved at step" in error
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
