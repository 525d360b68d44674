"""The script for GPUs: what it keeps when a step fails, when the time is up, and when it is called again."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module, with three steps that take no time."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmarks_gpu", module)  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    module.begun = []

    def step(name, fails=False):
        def run():
            module.begun.append(name)
            if fails:
                raise RuntimeError("CUDA error: an illegal memory access")
            return {"ms": 1.5, "ratio": 0.5}

        return run

    names = {"switch: a": False, "switch: b": True, "image c": False}
    monkeypatch.setattr(
        module, "steps", lambda machine, left: {name: step(name, fails) for name, fails in names.items()}
    )
    return module


def record(folder: Path) -> dict:
    return json.loads((folder / "gpu.json").read_text())


def test_an_error_is_recorded_and_the_next_step_runs(gpu, tmp_path):
    assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 1
    assert gpu.begun == ["switch: a", "switch: b", "image c"]
    done = record(tmp_path)["steps"]
    assert done["switch: b"]["error"] == "RuntimeError: CUDA error: an illegal memory access"
    assert done["switch: a"]["ms"] == done["image c"]["ms"] == 1.5
    page = (tmp_path / "gpu.md").read_text()
    assert "| switch: b | error: RuntimeError: CUDA error: an illegal memory access |" in page
    assert "A dry run" in page


def test_a_second_call_repeats_only_what_failed(gpu, tmp_path):
    gpu.main(["--dry-run", "--output", str(tmp_path)])
    gpu.begun.clear()
    gpu.main(["--dry-run", "--output", str(tmp_path)])
    assert gpu.begun == ["switch: b"]


def test_a_cut_keeps_what_is_there(gpu, tmp_path, monkeypatch):
    written = gpu.write

    def cut(folder, content, names):
        written(folder, content, names)
        if "switch: a" in content["steps"]:
            raise KeyboardInterrupt  # as if the machine were taken away after the first step

    monkeypatch.setattr(gpu, "write", cut)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--dry-run", "--output", str(tmp_path)])
    assert list(record(tmp_path)["steps"]) == ["switch: a"]
    assert "| image c | not reached |" in (tmp_path / "gpu.md").read_text()
    monkeypatch.setattr(gpu, "write", written)
    gpu.begun.clear()
    gpu.main(["--dry-run", "--output", str(tmp_path)])
    assert gpu.begun == ["switch: b", "image c"]


def test_no_step_begins_when_the_time_is_up(gpu, tmp_path):
    assert gpu.main(["--dry-run", "--output", str(tmp_path), "--seconds", "0"]) == 1
    assert gpu.begun == []
    assert record(tmp_path)["steps"] == {}


def test_a_step_is_not_begun_that_would_not_end_in_time(gpu, tmp_path, monkeypatch):
    # One read at the start, then before each step, when it starts and when it ends: `a` takes 60 of 100 seconds.
    readings = iter([0, 1, 1, 61, 62, 62, 63, 64])
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(readings))
    gpu.main(["--dry-run", "--output", str(tmp_path), "--seconds", "100"])
    assert gpu.begun == ["switch: a", "image c"]  # `b` is of the kind of `a`, and 38 seconds are left


def test_figures_of_another_machine_are_not_taken_over(gpu, tmp_path, monkeypatch):
    gpu.main(["--dry-run", "--output", str(tmp_path)])
    monkeypatch.setattr(gpu, "machine_facts", lambda: {**record(tmp_path)["machine"], "torch": "9.9"})
    gpu.begun.clear()
    gpu.main(["--dry-run", "--output", str(tmp_path)])
    assert gpu.begun == ["switch: a", "switch: b", "image c"]


def test_without_a_gpu_it_says_so(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--output", str(tmp_path)])
    assert "there is no CUDA device; --dry-run" in capsys.readouterr().err


def test_multiply_adds_are_the_paper_s(gpu):
    config = gpu.EoMTConfig.from_dict(gpu.translate_config(gpu.EomtConfig(**gpu.SIZES["L"], num_labels=133).to_dict()))
    config.masked_attention_probabilities = [0.0] * 4
    assert gpu.multiply_adds(config, 640) / 1e9 == pytest.approx(669, rel=0.01)


def test_what_did_not_compile_in_time_is_not_begun_with_less(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "compile_ahead", lambda *arguments: {"switch: a": 80.0, "image c": 10.0})
    facts = gpu.machine_facts()
    monkeypatch.setattr(gpu, "machine_facts", lambda: facts)
    monkeypatch.setattr(gpu, "fresh", lambda: None)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    readings = iter([0, 36, 37, 38, 39, 40, 41, 42, 43])  # at the start, then as above
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(readings))
    gpu.main(["--output", str(tmp_path), "--seconds", "100"])
    assert gpu.begun == ["switch: b", "image c"]  # 64 seconds are left


def test_steps_that_compile_are_tried_in_processes_of_their_own(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 2)
    record, names = {"steps": {}}, ["switch: fused q/k/v", "image in, segments out", "switch: there is none"]
    unfinished = gpu.compile_ahead(gpu.argparse.Namespace(dry_run=True), names, record, 120.0)
    assert unfinished == {}
    printed = capsys.readouterr().out
    assert "ahead: switch: fused q/k/v: ready" in printed
    assert "ahead: switch: there is none: the process ended early" in printed
    assert "image in" not in printed  # nothing of it is compiled
    assert gpu.compile_ahead(gpu.argparse.Namespace(dry_run=True), names, record, 0.0) == {names[0]: 0.0, names[2]: 0.0}
