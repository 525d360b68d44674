"""The notebooks in examples/: valid, without outputs, and (slow) they run from top to bottom."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from hf_segvit.cli import main

FOLDER = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
STEPS = int(os.environ.get("NOTEBOOK_STEPS", "8"))


def code_cells(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_command(command: str) -> None:
    """What a line `!hf-segvit ...` stands for, in this process."""
    name, *arguments = shlex.split(command)
    assert name == "hf-segvit"
    assert main(arguments) == 0, command


def as_python(cell: str) -> str:
    """A cell with its `!` lines as calls, in which {name} is the variable, as in IPython."""
    return re.sub(r"^( *)!(.*)$", lambda line: f"{line[1]}run_command(f{line[2]!r})", cell, flags=re.MULTILINE)


def test_all_are_there():
    assert [path.stem for path in NOTEBOOKS] == [
        "export_without_pytorch",
        "fine_tune_own_folder",
        "relabel_masks",
        "score_and_report",
        "train_with_trainer",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_a_valid_notebook_without_outputs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        code = cell["cell_type"] == "code"
        keys = {"cell_type", "id", "metadata", "source"} | ({"execution_count", "outputs"} if code else set())
        assert set(cell) == keys
        assert all(isinstance(line, str) for line in cell["source"])
        assert not code or (cell["execution_count"], cell["outputs"]) == (None, [])
        assert all(len(line.rstrip("\n")) <= 125 for line in cell["source"])
    assert cells[0]["source"][0].startswith("# ")
    for cell in code_cells(path):
        compile(as_python(cell), path.name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NOTEBOOK_STEPS", str(STEPS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(FOLDER)  # a notebook runs in its folder, and finds the scripts beside it
    if path.stem == "export_without_pytorch":
        pytest.importorskip("onnxruntime")
    shown = []
    names = {"run_command": run_command, "display": shown.append}
    for cell in code_cells(path):
        exec(compile(as_python(cell), path.name, "exec"), names)
    CHECKS[path.stem](names, tmp_path)
    drawn = sorted(tmp_path.rglob("*.png"))
    assert drawn
    with Image.open(drawn[0]) as image:
        image.load()


def check_train_with_trainer(names, folder):
    assert names["model"].config.masked_attention_probabilities == [0.0, 0.0], "annealed, and loaded back"
    assert 0.0 <= names["scores"]["eval_pq"] <= 1.0
    assert (folder / "trainer_output" / "predictions.png").is_file()


def check_fine_tune_own_folder(names, folder):
    assert 0.0 <= json.loads((folder / "run" / "results.json").read_text())["metrics"]["mean_iou"] <= 1.0
    assert (folder / "scores" / "results.json").is_file()
    assert {"0000.overlay.png", "0001.overlay.png"} <= {path.name for path in folder.rglob("*.png")}


def check_relabel_masks(names, folder):
    assert [len(rows) for rows in names["after"]] == [len(rows) for rows in names["truth"]]
    differ = sum(
        a != b for old, new in zip(names["before"], names["after"], strict=True) for a, b in zip(old, new, strict=True)
    )
    assert len(names["changes"]) == differ
    assert 0.3 < names["scores"]["named by brightness"] < 0.6
    assert 0.0 <= names["scores"]["named by ViT-P"] <= 1.0


def check_export_without_pytorch(names, folder):
    assert names["equal"] == {"exported, in hf_segvit": 1.0, "exported, without PyTorch": 1.0}


def check_score_and_report(names, folder):
    metrics = names["metrics"]
    assert metrics["pq"] <= metrics["oracle_pq"]
    losses = [row["loss"] for row in names["report"]["classes"]]
    assert losses == sorted(losses, reverse=True)
    assert set(names["pq"]) == {0.3, 0.5, 0.8}
    assert (folder / "scores" / "worst.png").is_file()


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}
