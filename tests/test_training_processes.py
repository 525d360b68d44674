"""Two processes (gloo) against one with the same global batch, going on, stopping together, and failing together."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
        processes.append(subprocess.Popen(command, env=environment, cwd=root, **pipes))
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


def test_a_process_that_fails_does_not_leave_the_other_waiting(tmp_path):
    _, codes, errors = run(2, recipe(tmp_path), check=False, fail=1, timeout=20)
    assert codes[1] != 0
    assert codes[0] != 0
    assert "this process fails" in errors[1]
