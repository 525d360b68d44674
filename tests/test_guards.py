"""Failures of training: not finite, out of memory, workers that raise or die, each with a message that helps."""

import itertools
import math
import os
import signal

import pytest
import torch
from accelerate import Accelerator

from hf_segvit.cli import main
from hf_segvit.inference.segmenter import NonFiniteOutputs
from hf_segvit.training import loop
from hf_segvit.training.checkpoints import Checkpoints
from hf_segvit.training.data_order import StepOrder, TrainingLoader
from hf_segvit.training.guards import (
    NonFiniteGuard,
    TrainingFailed,
    explained_non_finite_outputs,
    explained_out_of_memory,
    replay,
)
from hf_segvit.training.loop import train
from hf_segvit.training.tasks.eomt import EoMTTask
from hf_segvit.training.tracking import read_history

from .tiny_training import saved_tensors, tiny_recipe


class SpoiledTask(EoMTTask):
    """Some calls of the loss are not finite; the weights are remembered before each."""

    def __init__(self, recipe, bad, where="loss"):
        super().__init__(recipe)
        self.bad, self.where, self.calls, self.weights = bad, where, 0, []

    def loss(self, model, batch, normalizers):
        self.calls += 1
        self.weights.append(model.class_predictor.weight.detach().clone())
        loss, parts = super().loss(model, batch, normalizers)
        if self.calls not in self.bad:
            return loss, parts
        if self.where == "loss":
            return loss * float("nan"), parts
        return loss + model.class_predictor.bias.sum().mul(0).sqrt(), parts  # finite; its gradient is 0 * infinity


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_kept(tmp_path, where, capsys):
    recipe = tiny_recipe(tmp_path)
    task = SpoiledTask(recipe, {3}, where)
    outcome = train(recipe, task=task, cpu=True)
    assert outcome.step == 6
    assert outcome.results["skipped_steps"] == 1
    assert torch.equal(task.weights[2], task.weights[3]), "step 3 left the weights alone"
    assert not torch.equal(task.weights[3], task.weights[4])
    assert all(torch.isfinite(tensor).all() for tensor in saved_tensors(tmp_path).values())
    place = tmp_path / "failures" / "step-00000003"
    printed = capsys.readouterr().err
    assert "step 3: loss" in printed
    assert f"hf-segvit train --replay {place}" in printed
    text = replay(place)
    assert "gradients that are not finite: none" in text, "the task itself is fine; only the test spoils it"


def test_replay_names_what_is_not_finite(tmp_path, capsys):
    recipe = tiny_recipe(tmp_path)

    class Broken(EoMTTask):
        def build_model(self):
            model, processor = super().build_model()
            with torch.no_grad():
                model.eomt.layers[1].mlp.fc2.weight[0, 0] = float("inf")
            return model, processor

    with pytest.raises(TrainingFailed, match=r"3 times in a row, so training stops\. Lower learning_rate"):
        train(recipe, task=Broken(recipe), cpu=True)
    place = tmp_path / "failures" / "step-00000001"
    assert main(["train", "--replay", str(place)]) == 0
    printed = capsys.readouterr().out
    assert "the first output that is not finite is that of eomt.layers.1.mlp" in printed
    assert "weights that are not finite: eomt.layers.1.mlp.fc2.weight" in printed
    assert main(["train", "--replay", str(tmp_path)]) == 2
    assert "holds no batch-0.pt" in capsys.readouterr().err


class ScaledAccelerator(Accelerator):
    """Computes in fp16 on the CPU, which Accelerate does on a GPU alone; the scale of 8 is soon below 1."""

    init_scale = 8.0

    def __init__(self, **options):
        super().__init__(**options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=self.init_scale)
        self.native_amp = True


def test_fp16_stops_where_no_scale_helps(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Accelerator", ScaledAccelerator)
    recipe = tiny_recipe(tmp_path, precision="fp16", steps=12, annealing=False, save_every="end", save_every_steps=None)
    task = SpoiledTask(recipe, range(4, 100), "gradient")
    stopped = "step 7: loss .*gradient norm nan.* 4 times in a row, however low the scale of fp16.*no checkpoint yet"
    with pytest.raises(TrainingFailed, match=stopped):
        train(recipe, task=task, cpu=True)
    assert torch.equal(task.weights[3], task.weights[6])
    place = tmp_path / "failures" / "step-00000007"
    assert "micro-batch 0: loss" in replay(place), "the batch is kept"
    assert "NaN" not in (tmp_path / "history.jsonl").read_text(), "steps that were skipped are in no mean"


def test_fp16_finds_its_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Accelerator", type("HighScale", (ScaledAccelerator,), {"init_scale": 2.0**20}))
    recipe = tiny_recipe(tmp_path, precision="fp16", steps=12, annealing=False, warmup_steps=[0])
    task = SpoiledTask(recipe, ())
    outcome = train(recipe, task=task, cpu=True)
    same = [torch.equal(one, other) for one, other in itertools.pairwise(task.weights)]
    assert same[0], "the first step overflows"
    assert not any(same[-5:])
    assert outcome.results["skipped_steps"] == 0
    assert not (tmp_path / "failures").exists()
    rows = [row for row in read_history(tmp_path / "history.jsonl") if "loss" in row]
    assert rows[-1]["step"] == 12
    assert all(math.isfinite(row["gradient norm"]) for row in rows)


def test_overflows_are_counted_in_a_row():
    guard = NonFiniteGuard()
    assert not any(guard.overflowed(2.0) for _ in range(29))
    guard.passed()
    assert not any(guard.overflowed(1.0) for _ in range(29))
    assert guard.overflowed(1.0), "the thirtieth"
    guard.passed()
    assert guard.overflowed(0.5)
    with pytest.raises(TrainingFailed, match=r"1 times in a row.*newest checkpoint is of step 7"):
        guard.failed(8, 1.0, float("inf"), None, 7)


def test_no_checkpoint_is_saved_amid_steps_that_fail(tmp_path):
    recipe = tiny_recipe(tmp_path, steps=12)  # saves every second step
    stopped = r"step 8: .*3 times in a row, so training stops.*the newest checkpoint is of step 4"
    with pytest.raises(TrainingFailed, match=stopped):
        train(recipe, task=SpoiledTask(recipe, {2, 6, 7, 8}), cpu=True, progress=False)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [3, 4], "that of step 2 came a step later"


def test_a_stop_amid_steps_that_fail_is_remembered(tmp_path):
    recipe = tiny_recipe(tmp_path, steps=12)

    def stop(step, loss):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    outcome = train(recipe, task=SpoiledTask(recipe, {5, 6}), cpu=True, progress=False, on_step=stop)
    assert outcome.step == 6
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 6]
    with pytest.raises(TrainingFailed, match=r"step 7: .*3 times in a row.*newest checkpoint is of step 6"):
        train(recipe, task=SpoiledTask(recipe, {1}), cpu=True, progress=False)


def test_too_many_in_all_stop_too():
    guard = NonFiniteGuard(max_consecutive=3, max_skipped=4)
    for step in range(3):
        guard.failed(step, float("nan"), 1.0, None)
        guard.passed()
    with pytest.raises(TrainingFailed, match="4 times, so training stops"):
        guard.failed(9, 1.0, float("inf"), None)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_says_what_to_change(error):
    with (
        pytest.raises(TrainingFailed, match=r"^out of memory \(.*try: this first; then that$"),
        explained_out_of_memory(["this first", "then that"]),
    ):
        raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match=r"^other$"), explained_out_of_memory([]):
        raise RuntimeError("other")


def test_out_of_memory_in_training(tmp_path, capsys):
    recipe = tiny_recipe(tmp_path)

    class Greedy(EoMTTask):
        def loss(self, model, batch, normalizers):
            if self.recipe.device_batch_size is None:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().loss(model, batch, normalizers)

    with pytest.raises(TrainingFailed, match=r"out of memory.*device_batch_size=2"):
        train(recipe, task=Greedy(recipe), cpu=True)
    smaller = recipe.changed(device_batch_size=2)
    assert train(smaller, task=Greedy(smaller), cpu=True).step == 6


class Samples:
    """Samples of which one raises, or ends its worker."""

    def __init__(self, bad, action):
        self.bad, self.action = bad, action

    def __len__(self):
        return 8

    def __getitem__(self, key):
        _, index = key
        if index == self.bad and self.action == "raise":
            raise OSError("image file is truncated")
        if index == self.bad:
            os.kill(os.getpid(), signal.SIGKILL)
        return index

    def name(self, index):
        return f"sample {index}, image 'cat {index}.jpg'"


def batches(samples, num_workers):
    return TrainingLoader(samples, StepOrder(8, 2, 0), list, start_step=0, total_steps=4, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_image_that_cannot_be_read_is_named(num_workers):
    with pytest.raises(ValueError, match=r"image 'cat 5\.jpg' cannot be read for training.*truncated.*check-data"):
        list(batches(Samples(5, "raise"), num_workers))


def test_a_worker_that_is_killed_names_its_image():
    with pytest.raises(ValueError, match=r"was killed while it read sample 5, image 'cat 5\.jpg'.*lower num_workers"):
        list(batches(Samples(5, "kill"), 1))  # the others would be waited for


def test_images_are_named_as_their_data_set_does(tmp_path):
    samples = EoMTTask(tiny_recipe(tmp_path)).train_samples()
    assert samples.name(3) == "sample 3, image 3, generated:easy"


def test_outputs_that_are_not_finite_are_explained() -> None:
    expected = r"image 7: the model answers NaN.*lower learning_rate"
    with pytest.raises(TrainingFailed, match=expected), explained_non_finite_outputs():
        raise NonFiniteOutputs("image 7: the model answers NaN")
    with pytest.raises(ValueError, match=r"^another$"), explained_non_finite_outputs():
        raise ValueError("another")
