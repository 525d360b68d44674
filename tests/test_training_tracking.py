"""The log of a run: throughput is that of its steps."""

import types

import pytest

from hf_segvit.training import loop, tracking
from hf_segvit.training.checkpoints import Checkpoints
from hf_segvit.training.tracking import read_history

from .test_training_loop import ScoredTask
from .tiny_training import tiny_recipe


def test_throughput_leaves_out_evaluations_and_saving(tmp_path, monkeypatch):
    """By a clock that goes on by a second in each step, and by much more in between."""
    clock = [0.0]
    time = types.SimpleNamespace(perf_counter=lambda: clock[0])
    monkeypatch.setattr(loop, "time", time)
    monkeypatch.setattr(tracking, "time", time)
    save = Checkpoints.save

    def slow_save(*arguments):
        clock[0] += 100
        return save(*arguments)

    monkeypatch.setattr(Checkpoints, "save", slow_save)

    class Timed(ScoredTask):
        def loss(self, model, batch, normalizers):
            clock[0] += 1
            return super().loss(model, batch, normalizers)

        def evaluate(self, model, processor, device, limit):
            clock[0] += 1000
            return super().evaluate(model, processor, device, limit)

    recipe = tiny_recipe(tmp_path, evaluate_every=1.5, save_every_steps=2, log_every=2)
    loop.train(recipe, task=Timed(recipe, [0.1, 0.2]), cpu=True, progress=False)
    rows = [row for row in read_history(tmp_path / "history.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert row["seconds per step"] == pytest.approx(1)
        assert row["images per second"] == pytest.approx(4)
        assert row["share of time waiting for data"] == 0
    assert clock[0] > 2000
