"""`python -O` and `python -W error`: no check vanishes, and nothing of ours warns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .test_interruptions import write_data, write_model
from .test_races import tiny_backbone

ROOT = Path(__file__).parents[2]
# Warnings of other packages are theirs; those about our own lines, and deprecations that we cause, have our module.
SCRIPT = """
import json, sys, warnings
from hf_segvit.cli import main
warnings.filterwarnings("error", module=r"hf_segvit(\\.|$)")
print(json.dumps([main(command) for command in json.loads(sys.argv[1])]))
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def commands(tmp_path):
    """Commands with their exit codes: what succeeds, and what must be refused."""
    write_model(tmp_path / "model")
    data = write_data(tmp_path / "data")
    tiny_backbone(tmp_path / "backbone")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("[]")
    model = ["--model", str(tmp_path / "model"), "--device", "cpu"]
    image = str(tmp_path / "data" / "images" / "val" / "a.jpg")
    return [
        (0, ["segment", image, *model, "--output", str(tmp_path / "segments")]),
        (0, ["evaluate", *model, "--data", data, "--output", str(tmp_path / "scores")]),
        (0, ["check-data", data, "--output", str(tmp_path / "sheet")]),
        (0, ["convert", "backbone", str(tmp_path / "backbone"), str(tmp_path / "converted")]),
        (2, ["convert", "backbone", str(tmp_path / "backbone"), str(tmp_path / "converted")]),
        (2, ["convert", "official-eomt", str(tmp_path / "broken"), str(tmp_path / "other")]),
        (2, ["evaluate", *model, "--data", data, "--limit", "0"]),
        (2, ["segment", image, "--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "segments")]),
        (2, ["train", "--replay", str(tmp_path / "nowhere")]),
    ]


@pytest.mark.parametrize("option", ["-O", "-Wdefault"])
def test_commands_do_the_same(option, commands):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = json.dumps([command for _, command in commands])
    process = subprocess.run(
        [sys.executable, option, "-c", SCRIPT, arguments], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) == [code for code, _ in commands], process.stderr
