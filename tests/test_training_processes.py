"""Two processes (gloo) against one with the same global batch, going on, stopping together, and failing together."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .test_training_vit_p import recipe as point_recipe
from .tiny_training import assert_equal, saved_tensors, tiny_recipe

pytestmark = pytest.mark.slow
COUNTS = [2, 0, 20, 1, 0, 3, 0, 0]


def run(num_processes, recipe, check=True, **settings):
    """Start processes and wait; the report of the first, the exit codes and what went to stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = json.dumps({"recipe": recipe.to_dict(), "counts": COUNTS, **settings})
    shared = {
        **os.environ,
        **{"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1"},
        **{"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"},
    }
    processes = []
    for rank in range(num_processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_processes > 1 else {}
        environment = {**shared, **place}
        if num_processes == 1:
            environment.pop("WORLD_SIZE")
        command = [sys.executable, "-m", "tests.training_process", text]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        root = Path(__file__).parents[1]
        # Each in a group of its own, so that signals to the group of one reach its workers and not us.
        processes.append(subprocess.Popen(command, env=environment, cwd=root, start_new_session=True, **pipes))
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    if check:
        assert codes == [0] * num_processes, outputs
    report = json.loads(outputs[0][0].splitlines()[-1]) if outputs[0][0] else None
    return report, codes, [error for _, error in outputs]


def recipe(folder, **changes):
    """Masked attention throughout, as what is drawn for annealing would differ; no clipping, which hides factors."""
    return tiny_recipe(folder, annealing=False, max_grad_norm=None, steps=4, warmup_steps=[0], **changes)


def test_two_processes_equal_one(tmp_path):
    one, _, _ = run(1, recipe(tmp_path / "one"), repeatable=True)
    two, _, _ = run(2, recipe(tmp_path / "two"), repeatable=True)
    parts, _, _ = run(2, recipe(tmp_path / "parts", device_batch_size=1), repeatable=True)
    # float32 sums in another order; wrong normalisers would differ by tens of percent
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert parts["losses"] == pytest.approx(one["losses"], rel=1e-4)
    expected = saved_tensors(tmp_path / "one")
    for other in ("two", "parts"):
        found = saved_tensors(tmp_path / other)
        moments = [name for name in expected if "exp_avg" in name and not name.endswith("exp_avg_sq")]
        assert moments
        for name in moments:  # weighted sums of gradients
            scale = expected[name].abs().max()
            assert torch.allclose(found[name], expected[name], atol=1e-4 * scale.item() + 1e-6, rtol=1e-3), name


def test_two_processes_train_a_point_classifier_as_one_does(tmp_path):
    """SGD without clipping, as both would hide a factor; images have 1 to 12 labelled prompts."""
    changes = {"data": "generated:easy?num_scenes=8&size=48", "max_grad_norm": None, "save_every_steps": 4}
    runs, reports = {"one": (1, None), "two": (2, None), "parts": (2, 1)}, {}
    for name, (count, size) in runs.items():
        made = point_recipe(tmp_path / name, device_batch_size=size, **changes)
        reports[name], _, _ = run(count, made, counts=[12, 1, 3, 12, 1, 1, 8, 2])
    expected = saved_tensors(tmp_path / "one")
    results = [json.loads((tmp_path / name / "results.json").read_text())["metrics"] for name in runs]
    for name, metrics in zip(runs, results, strict=True):
        # float32 sums in another order; means of the processes' own means differ by percents
        assert reports[name]["losses"] == pytest.approx(reports["one"]["losses"], rel=1e-4)
        found = saved_tensors(tmp_path / name)
        for key, tensor in expected.items():
            if key.startswith("model/"):
                assert torch.allclose(found[key], tensor, rtol=1e-4, atol=1e-5), (name, key)
        assert metrics["num_points"] == results[0]["num_points"] == 36
        assert metrics["mean_confidence"] == pytest.approx(results[0]["mean_confidence"], rel=1e-4)


def test_a_resumed_run_of_two_equals_an_uninterrupted_one(tmp_path):
    changes = {"ema_decay": 0.9, "device_batch_size": 1, "num_workers": 1}
    run(2, recipe(tmp_path / "one", **changes))
    stopped, _, errors = run(2, recipe(tmp_path / "two", **changes), stop=1)
    assert stopped["step"] == 3, "all finish the step after the signal, and save"
    assert stopped["stopped"] == "a signal to another process"
    run(2, recipe(tmp_path / "two", **changes))
    assert_equal(saved_tensors(tmp_path / "one"), saved_tensors(tmp_path / "two"))

    # One process may go on with what two have begun.
    report, _, errors = run(1, recipe(tmp_path / "two", **changes))
    assert report["step"] == 4
    assert "there were 2 processes and are 1 now" in errors[0]


def test_a_signal_to_everyone_is_agreed_on(tmp_path):
    """As a scheduler sends it: workers get it too, and go on until all processes have finished the same step."""
    stopped, _, _ = run(2, recipe(tmp_path, num_workers=1), stop_all=True)
    assert stopped["stopped"] == "SIGTERM"
    assert 1 <= stopped["step"] < 4
    whole, _, _ = run(2, recipe(tmp_path, num_workers=1))
    assert whole["step"] == 4


def test_a_callback_of_one_process_ends_training_for_all(tmp_path):
    report, _, _ = run(2, recipe(tmp_path), end=1)
    assert (report["step"], report["stopped"]) == (2, None)
    assert json.loads((tmp_path / "results.json").read_text())["step"] == 2


def test_sharded_weights_train_as_whole_ones(tmp_path):
    changes = {"ema_decay": 0.9, "evaluate_every": 1.0}
    one, _, _ = run(1, recipe(tmp_path / "one", **changes), repeatable=True)
    two, _, _ = run(2, recipe(tmp_path / "two", **changes), repeatable=True, sharded=True)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)  # float32 sums in another order
    evaluations = [json.loads((tmp_path / name / "results.json").read_text())["evaluations"] for name in ("one", "two")]
    scores = [[row["metrics"]["pq"] for row in rows] for rows in evaluations]
    assert len(scores[0]) == 2
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)
    published = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    assert published[0].keys() == published[1].keys()
    for name, tensor in published[0].items():
        # Adam's first steps are as long as the learning rate, whatever the gradient: near zero their sign may differ.
        assert torch.allclose(published[1][name], tensor, atol=5e-3), name
        assert (published[1][name] - tensor).abs().mean() <= 1e-4, name


def test_a_resumed_run_of_sharded_weights_equals_an_uninterrupted_one(tmp_path):
    changes = {"ema_decay": 0.9, "device_batch_size": 1}
    whole, _, _ = run(2, recipe(tmp_path / "one", **changes), repeatable=True, sharded=True)
    stopped, _, _ = run(2, recipe(tmp_path / "two", **changes), repeatable=True, sharded=True, stop=1)
    assert stopped["step"] == 3
    for name in ("alone", "ddp"):
        shutil.copytree(tmp_path / "two", tmp_path / name)
    run(2, recipe(tmp_path / "two", **changes), repeatable=True, sharded=True)
    assert_equal(saved_tensors(tmp_path / "one"), saved_tensors(tmp_path / "two"))

    # Others may go on with what sharded processes have begun, and the other way round.
    for name, count in (("alone", 1), ("ddp", 2)):
        report, _, _ = run(count, recipe(tmp_path / name, **changes), repeatable=True)
        assert report["losses"] == pytest.approx(whole["losses"][3:], rel=1e-4), name
    run(1, recipe(tmp_path / "back", **changes), repeatable=True, stop=0)  # alone, it stops a step earlier
    report, _, _ = run(2, recipe(tmp_path / "back", **changes), repeatable=True, sharded=True)
    assert report["losses"] == pytest.approx(whole["losses"][2:], rel=1e-4)


def test_a_process_that_fails_does_not_leave_the_other_waiting(tmp_path):
    _, codes, errors = run(2, recipe(tmp_path), check=False, fail=1, timeout=20)
    assert codes[1] != 0
    assert codes[0] != 0
    assert "this process fails" in errors[1]
