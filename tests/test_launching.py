"""`training/train.py` under the launchers: one process by Accelerate's configuration for CPUs, two by torchrun.

`accelerate launch` starts several processes on CPUs through MPI alone; `torchrun` needs nothing for it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation

from .tiny_training import tiny_recipe

ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    1: ["accelerate.commands.launch", "--config_file", "training/accelerate/cpu.yaml"],
    2: ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", LAUNCHERS)
def test_a_launched_training_ends_with_a_model(tmp_path, num_processes):
    recipe = tiny_recipe(tmp_path / "run").to_dict()
    del recipe["name"]
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", *LAUNCHERS[num_processes], "training/train.py", str(file), "steps=3"]
    if num_processes > 1:
        command.append("--cpu")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("model: ") + run.stderr.count("model: ") == 1, "told once, not by every process"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["plan"]["processes"] == num_processes
    assert results["plan"]["device_batch_size"] == 4 // num_processes
    assert results["step"] == 3
    assert "pq" in results["metrics"]
    model = EoMTForUniversalSegmentation.from_pretrained(tmp_path / "run" / "model")
    assert model.config.masked_attention_probabilities == [0.0, 0.0]
