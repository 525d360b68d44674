"""Going on: an interrupted run equals an uninterrupted one to the bit, and what does not fit is refused."""

import json
import os
import signal

import pytest

from hf_segvit.training.loop import train
from hf_segvit.training.tracking import read_history

from .tiny_training import assert_equal, saved_tensors, tiny_recipe

AVERAGED = {"device_batch_size": 2, "ema_decay": 0.9}
VARIANTS = {
    "asked to stop; accumulation, average, evaluations": ("terminate", 3, {**AVERAGED, "evaluate_every": 1.5}),
    "asked to stop; workers": ("terminate", 3, {"num_workers": 2, **AVERAGED}),
    "killed; workers": ("crash", 5, {"num_workers": 2, **AVERAGED}),
    "killed; SGD, masked to the end": ("crash", 5, {"optimizer": "sgd", "schedule": "cosine", "annealing": False}),
}


class Crash(Exception):
    pass


@pytest.mark.parametrize(("action", "at", "changes"), VARIANTS.values(), ids=VARIANTS.keys())
def test_a_continued_run_equals_an_uninterrupted_one(tmp_path, action, at, changes, capsys):
    losses, others = {}, {}
    train(tiny_recipe(tmp_path / "one", **changes), cpu=True, on_step=losses.__setitem__)

    interrupted = tiny_recipe(tmp_path / "two", **changes)

    def note_and_stop(number, loss):
        others[number] = loss
        if number == at and action == "crash":
            raise Crash
        if number == at:
            os.kill(os.getpid(), signal.SIGTERM)

    if action == "terminate":
        outcome = train(interrupted, cpu=True, on_step=note_and_stop)
        assert (outcome.stopped, outcome.step, outcome.results) == ("SIGTERM", 3, {})
        assert not (tmp_path / "two" / "results.json").exists()
    else:
        with pytest.raises(Crash):
            train(interrupted, cpu=True, on_step=note_and_stop)
    resumed = []

    def note(number, loss):
        resumed.append(number)
        others[number] = loss

    outcome = train(interrupted, cpu=True, on_step=note)
    assert resumed == ([4, 5, 6] if action == "terminate" else [5, 6])
    assert outcome.step == 6
    assert outcome.stopped is None

    assert losses == others
    assert_equal(saved_tensors(tmp_path / "one"), saved_tensors(tmp_path / "two"))
    rows, other_rows = (read_history(tmp_path / run / "history.jsonl") for run in ("one", "two"))
    speeds = ("images per second", "seconds per step", "share of time waiting for data", "memory in MiB")
    for row in (*rows, *other_rows):
        for name in speeds:
            row.pop(name, None)
    assert rows == other_rows
    results, other_results = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("one", "two"))
    assert results["evaluations"] == other_results["evaluations"]
    assert "resuming from" in capsys.readouterr().err


def test_a_finished_run_is_not_trained_again(tmp_path):
    recipe = tiny_recipe(tmp_path)
    first = train(recipe, cpu=True)
    steps = []
    again = train(recipe, cpu=True, on_step=lambda step, loss: steps.append(step))
    assert steps == []
    assert again.results["metrics"] == first.results["metrics"]


def test_number_of_workers_and_micro_batches_do_not_change_the_batches(tmp_path):
    """Micro-batches change sums in the last bits and draw other points, but not what is looked at."""
    from hf_segvit.training.data_order import StepOrder

    order = StepOrder(num_samples=7, batch_size=4, seed=3)
    for step in range(5):
        whole = order.step_samples(step)
        for processes, micro in ((1, 1), (1, 4), (2, 2), (4, 1)):
            parts = [key for p in range(processes) for b in order.micro_batches(step, p, processes, micro) for key in b]
            assert parts == whole
    seen = [key for step in range(7) for key in order.step_samples(step)]
    for epoch in range(4):
        assert sorted(seen[7 * epoch : 7 * epoch + 7]) == [(epoch, index) for index in range(7)]
    assert StepOrder(7, 4, 4).step_samples(0) != order.step_samples(0)
    assert StepOrder(2, 5, 0).step_samples(1)[-1][0] == 4, "a batch larger than the data takes several rounds"

    train(tiny_recipe(tmp_path / "one", num_workers=0), cpu=True)
    train(tiny_recipe(tmp_path / "two", num_workers=2), cpu=True)
    assert_equal(saved_tensors(tmp_path / "one"), saved_tensors(tmp_path / "two"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "generated:easy?num_scenes=8&size=64"}, "number of images was 7 and is 8.*must be the same"),
        ({"layer_decay": 0.5}, "layer_decay was 0.8 and is 0.5"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"resume": False}, "holds checkpoints of an earlier run"),
    ],
)
def test_another_run_is_refused(tmp_path, change, message):
    train(tiny_recipe(tmp_path, steps=2), cpu=True)
    with pytest.raises(ValueError, match=message):
        train(tiny_recipe(tmp_path, steps=2, **change), cpu=True)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    train(tiny_recipe(tmp_path / "one"), cpu=True)
    train(tiny_recipe(tmp_path / "two"), cpu=True)
    with open(tmp_path / "two" / "checkpoints" / "step-00000006" / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    train(tiny_recipe(tmp_path / "two"), cpu=True)
    printed = capsys.readouterr().err
    assert "skipping a damaged checkpoint" in printed
    assert "SHA-256" in printed
    assert "resuming from " + str(tmp_path / "two" / "checkpoints" / "step-00000004") in printed
    assert_equal(saved_tensors(tmp_path / "one"), saved_tensors(tmp_path / "two"))
