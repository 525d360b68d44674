"""What is not lost: checkpoints where an evaluation fails, scores beside them, results where the best is damaged."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from hf_segvit.training.checkpoints import Checkpoints
from hf_segvit.training.guards import TrainingFailed
from hf_segvit.training.loop import train

from .test_training_loop import ScoredTask
from .tiny_training import assert_equal, saved_tensors, tiny_recipe


def failing_task(recipe, error):
    """A task whose evaluation raises; of the same class, as another task would be another run."""

    def evaluate(model, processor, device, limit):
        raise error

    task = ScoredTask(recipe, [])
    task.evaluate = evaluate
    return task


def run(recipe, task):
    return train(recipe, task=task, cpu=True, progress=False)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("image file is truncated"), "image file is truncated"),
        (torch.OutOfMemoryError("CUDA out of memory."), r"out of memory.*try: smaller images in val_data"),
    ],
)
def test_an_evaluation_that_fails_loses_nothing(tmp_path, monkeypatch, error, message):
    saved = []
    original = Checkpoints.save

    def save(self, state, *arguments):
        saved.append(state.step)
        return original(self, state, *arguments)

    monkeypatch.setattr(Checkpoints, "save", save)
    one, two = (
        tiny_recipe(
            tmp_path / name, evaluate_every=1.5, save_every="end", save_every_steps=None, annealing=False, ema_decay=0.5
        )
        for name in ("one", "two")
    )
    whole = run(one, ScoredTask(one, [0.1, 0.2]))
    assert saved == [3, 6], "each checkpoint is written once, though both evaluations are the best so far"
    saved.clear()
    with pytest.raises((OSError, TrainingFailed), match=message):
        run(two, failing_task(two, error))
    assert saved == [3]
    again = run(two, ScoredTask(two, [0.1, 0.2]))
    assert again.results["evaluations"] == whole.results["evaluations"]
    assert_equal(saved_tensors(tmp_path / "one"), saved_tensors(tmp_path / "two"))


def test_scores_stay_with_their_checkpoint(tmp_path):
    recipe = tiny_recipe(tmp_path, steps=4, evaluate_every=1.0, annealing=False)
    first = run(recipe, ScoredTask(recipe, [0.5, 0.4]))
    last = tmp_path / "checkpoints" / "step-00000004"
    assert json.loads((last / "evaluation.json").read_text()) == first.results["evaluations"][1]
    again = run(recipe, ScoredTask(recipe, []))  # which would fail if it were asked
    assert again.results["evaluations"] == first.results["evaluations"]
    (last / "evaluation.json").write_text("{")
    again = run(recipe, ScoredTask(recipe, [0.6]))
    assert [row["metrics"]["pq"] for row in again.results["evaluations"]] == [0.5, 0.6]
    assert again.results["step"] == 4


def test_a_checkpoint_that_is_the_best_no_more_is_deleted(tmp_path):
    recipe = tiny_recipe(tmp_path, evaluate_every=1.0, annealing=False, keep_last=1)
    run(recipe, ScoredTask(recipe, [0.4, 0.1, 0.5]))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]


@pytest.mark.parametrize(("damage", "changes"), [("changed", {}), ("deleted", {"ema_decay": 0.5})])
def test_the_best_is_not_published_where_it_is_damaged(tmp_path, damage, changes, capsys):
    recipe = tiny_recipe(tmp_path, evaluate_every=1.0, annealing=False, keep_last=1, **changes)
    outcome = run(recipe, ScoredTask(recipe, [0.5, 0.4, 0.3]))
    assert outcome.results["step"] == 2
    best = tmp_path / "checkpoints" / "step-00000002"
    if damage == "deleted":
        shutil.rmtree(best)
    else:
        with open(best / "model.safetensors", "r+b") as file:
            file.seek(-400, os.SEEK_END)
            file.write(bytes(400))
    results = train(recipe, task=ScoredTask(recipe, []), cpu=True).results
    assert "the best checkpoint is lost" in capsys.readouterr().err
    assert (results["step"], results["metrics"]) == (6, {"pq": 0.3})
    assert results["selection"] == (
        "best of 3 evaluations by pq was step 2, but its checkpoint is damaged: these are the weights at the end"
    )
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert "these are the weights at the end" in (tmp_path / "model" / "README.md").read_text()
    tensors = saved_tensors(tmp_path, 6)
    kind = "ema" if "ema_decay" in changes else "model"
    found = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("class_predictor.weight", "eomt.layers.0.norm1.weight"):
        assert torch.equal(found[name], tensors[f"{kind}/{name}"]), name
