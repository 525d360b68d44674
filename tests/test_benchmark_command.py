"""`hf-segvit benchmark` and the script for GPUs, with models so small that only what is written counts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hf_segvit import EoMTImageProcessor
from hf_segvit.cli import main

from .tiny_models import tiny_eomt

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_eomt(masked_attention=False, intermediate_size=64).save_pretrained(folder)
    EoMTImageProcessor(size={"height": 64, "width": 64}, task="panoptic", num_labels=5).save_pretrained(folder)
    return folder


def test_a_report_of_every_variant_beside_its_peer(model, tmp_path, capsys):
    words = ["--device", "cpu", "--dtype", "float32,bfloat16", "--batch-sizes", "1,2", "--repeats", "1"]
    words += ["--peer", "transformers", "--optimize", "fuse-qkv", "--output", str(tmp_path)]
    assert main(["benchmark", str(model), *words]) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "benchmark.json").read_text())
    rows = report["rows"]
    # As it is, optimised, and the peer; in two types of weights; one image and two at a time.
    assert len(rows) == 3 * 2 * 2
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert {row["batch_size"] for row in rows} == {1, 2}
    exact = [row for row in rows if row["dtype"] == "float32" and row["difference"] is not None]
    assert len(exact) >= 4
    assert all(row["difference"] < 1e-4 for row in exact), "outputs are compared before anything is timed"
    assert "Transformers" in shown
    assert "| " in (tmp_path / "benchmark.md").read_text()
    assert Image.open(tmp_path / "benchmark.png").size[0] > 600


def test_a_config_is_measured_with_random_weights(model, tmp_path, capsys):
    words = ["--device", "cpu", "--dtype", "float32", "--repeats", "1", "--forward-only", "--no-optimize"]
    assert main(["benchmark", str(model / "config.json"), *words]) == 0
    assert "andom weights: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere"),
        (["MODEL", "--peer", "nobody"], "--peer nobody: neither a folder nor one of transformers"),
        (["MODEL", "--batch-sizes", "0"], "--batch-sizes"),
        (["MODEL", "--input-size", "64"], "--input-size 64: give height and width"),
        (["MODEL", "--quantization", "int4"], "there is no 'int4'"),
        (["MODEL", "--optimize", "--no-optimize"], "exclude each other"),
        (["MODEL", "--device", "cuda:99"], "cuda"),
        (["MODEL", "--dtype", "float8"], "dtype 'float8' is not one of"),
    ],
)
def test_what_cannot_be_measured(words, message, model, capsys):
    assert main(["benchmark", *(str(model) if word == "MODEL" else word for word in words)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_for_gpus_runs_every_step_without_one(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry-run", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert "forward L 640, batch 1" in json.dumps(record)
    assert "Traceback" not in json.dumps(record)
    assert (tmp_path / "gpu.md").read_text().startswith("#")
    # A second call finds everything done.
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert again.returncode == 0
    assert json.loads((tmp_path / "gpu.json").read_text()) == record
