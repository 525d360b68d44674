"""`training/train.py` under the launchers: one process by Accelerate's configuration for CPUs, two by torchrun.

`accelerate launch` starts several processes on CPUs through MPI alone; `torchrun` needs nothing for it. A stop is told
by files, as launchers hide the exit code.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation
from hf_segvit.training.checkpoints import Checkpoints
from hf_segvit.training.signals import STOPPED_EXIT_CODE

from .tiny_training import tiny_recipe

ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    1: ["accelerate.commands.launch", "--config_file", "training/accelerate/cpu.yaml"],
    2: ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


def command(tmp_path, num_processes, *overrides):
    """To train the tiny recipe, with no launcher for 0 processes; and the environment for it."""
    recipe = tiny_recipe(tmp_path / "run").to_dict()
    del recipe["name"]
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(recipe))
    launcher = ["-m", *LAUNCHERS[num_processes]] if num_processes else []
    words = [sys.executable, *launcher, "training/train.py", str(file), *overrides]
    if num_processes != 1:
        words.append("--cpu")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return words, environment


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", LAUNCHERS)
def test_a_launched_training_ends_with_a_model(tmp_path, num_processes):
    words, environment = command(tmp_path, num_processes, "steps=3")
    run = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("model: ") + run.stderr.count("model: ") == 1, "told once, not by every process"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["plan"]["processes"] == num_processes
    assert results["plan"]["device_batch_size"] == 4 // num_processes
    assert results["step"] == 3
    assert "pq" in results["metrics"]
    model = EoMTForUniversalSegmentation.from_pretrained(tmp_path / "run" / "model")
    assert model.config.masked_attention_probabilities == [0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "exit_code"), [(0, STOPPED_EXIT_CODE), (1, 1), (2, 1)])
def test_a_training_that_is_asked_to_stop_saves_whatever_its_launcher_reports(tmp_path, num_processes, exit_code):
    words, environment = command(tmp_path, num_processes, "steps=100000", "save_every_steps=null", "save_every=end")
    with subprocess.Popen(
        [*words, "evaluate_every=end"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as run:
        told = []
        for line in run.stderr:
            told.append(line)
            if line.startswith("step 5/"):
                # `accelerate launch` does not pass a signal on to its one process; torchrun does.
                (asked,) = psutil.Process(run.pid).children() if num_processes == 1 else [psutil.Process(run.pid)]
                asked.send_signal(signal.SIGTERM)
    assert run.returncode == exit_code, "".join(told)
    assert any(line.startswith("SIGTERM: saved at step") for line in told), "".join(told)
    assert not (tmp_path / "run" / "results.json").exists()
    assert Checkpoints(tmp_path / "run" / "checkpoints").newest_valid() is not None
