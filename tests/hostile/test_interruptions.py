"""Interrupted and resumed: nothing half-written, the same result, and never counts of another model or data set."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_segvit.atomic_files import only_writer
from hf_segvit.cli import main
from hf_segvit.evaluation import evaluate as evaluate_function
from hf_segvit.evaluation.counts import PartialResults
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.models.configuration_plain_vit import PlainViTConfig
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.modeling_plain_vit import PlainViTModel
from tests.data_folders import halves, mask_folder, write_mask
from tests.tiny_models import randomize, tiny_eomt

ROOT = Path(__file__).parents[2]
NAMES = ("a", "b", "c", "d", "e", "f")
evaluate_module = sys.modules[evaluate_function.__module__]


def write_model(folder: Path, seed: int = 0, **settings) -> None:
    model = randomize(tiny_eomt(id2label={0: "road", 1: "car"}), seed)
    model.save_pretrained(folder)
    EoMTImageProcessor(size=64, task="semantic", **settings).save_pretrained(folder)


def write_data(folder: Path) -> str:
    data = mask_folder(folder, NAMES, "val")
    for seed, name in enumerate(NAMES):
        values = np.random.default_rng(seed).integers(0, 2, (20, 30), dtype=np.uint8)
        write_mask(folder / "annotations" / "val" / f"{name}.png", values)
    return data


@pytest.fixture
def command(tmp_path, monkeypatch):
    """An evaluation that saves its counts after each image."""
    monkeypatch.setattr(evaluate_module, "CHUNK_SIZE", 1)
    write_model(tmp_path / "model")
    data = write_data(tmp_path / "data")
    options = ["--model", str(tmp_path / "model"), "--data", data, "--device", "cpu", "--worst", "0"]
    return ["evaluate", *options, "--output", str(tmp_path / "out")]


def interrupt(command, monkeypatch, after=3):
    """Run the command until `after` images are counted."""
    original, calls = Segmenter.answers, []

    def answers(self, images):
        calls.append(images)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Segmenter, "answers", answers)
        assert main(command) == 130


def asked(command, monkeypatch) -> int:
    """Images that the model is asked about when the command runs to its end."""
    original, calls = Segmenter.answers, []

    def answers(self, images):
        calls.extend(images)
        return original(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Segmenter, "answers", answers)
        assert main(command) == 0
    return len(calls)


def results(tmp_path) -> bytes:
    return (tmp_path / "out" / "results.json").read_bytes()


def test_an_evaluation_resumes_with_the_same_model_and_data_only(tmp_path, command, monkeypatch, capsys):
    assert asked(command, monkeypatch) == 6
    whole = results(tmp_path)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "results.txt"}
    shutil.rmtree(tmp_path / "out")
    interrupt(command, monkeypatch)
    annotations = tmp_path / "data" / "annotations" / "val"
    images = tmp_path / "data" / "images" / "val"

    def other_weights():
        write_model(tmp_path / "model", seed=1)

    def other_settings():
        write_model(tmp_path / "model", image_mean=[0.1, 0.1, 0.1])

    def other_mask():
        write_mask(annotations / "b.png", halves(1, 0))

    def other_image():
        Image.new("RGB", (30, 20)).save(images / "c.jpg")

    def other_names():
        (tmp_path / "data" / "classes.json").write_text('{"0": "car", "1": "road"}')

    for change, different in (
        (other_weights, "weights"),
        (other_settings, "configuration"),
        (other_mask, "annotations"),
        (other_image, "images"),
        (other_names, "annotations"),
    ):
        shutil.copytree(tmp_path / "model", tmp_path / "model-kept")
        shutil.copytree(tmp_path / "data", tmp_path / "data-kept")
        change()
        capsys.readouterr()
        assert main(command) == 2, change.__name__
        message = capsys.readouterr().err
        assert "holds parts of another evaluation (" in message
        assert f"{different} '" in message
        assert "choose another --output, or delete it" in message
        for name in ("model", "data"):
            shutil.rmtree(tmp_path / name)
            (tmp_path / f"{name}-kept").rename(tmp_path / name)
    assert main([*command, "--limit", "2"]) == 2
    assert "limit None != 2" in capsys.readouterr().err
    assert asked(command, monkeypatch) == 3
    assert results(tmp_path) == whole
    assert not (tmp_path / "out" / "partial").exists()


def test_a_second_evaluation_into_one_folder_is_refused(tmp_path, command, capsys):
    (tmp_path / "out").mkdir()
    with only_writer(tmp_path / "out"):
        assert main(command) == 2
    assert f"another process is writing into {tmp_path / 'out'}; wait" in capsys.readouterr().err
    assert not any((tmp_path / "out").iterdir())


def mutations(content: bytes, generator: random.Random):
    """Damaged forms of a file."""
    yield b""
    yield b"{}"
    yield b"PK\x05\x06" + bytes(18)  # an empty zip archive
    for _ in range(12):
        yield content[: generator.randrange(len(content))]
    for _ in range(25):
        changed = bytearray(content)
        for _ in range(generator.choice((1, 1, 4, 50))):
            changed[generator.randrange(len(content))] = generator.randrange(256)
        yield bytes(changed)


def test_damaged_counts_are_set_aside_and_counted_again(tmp_path, command, monkeypatch, caplog):
    interrupt(command, monkeypatch, after=5)
    partial = tmp_path / "out" / "partial"
    kept = {path: path.read_bytes() for path in partial.iterdir()}
    first, *_ = kept
    (partial / ".0123abcd.partial.npz").write_bytes(b"cut")  # what a kill leaves
    generator = random.Random(0)
    for content in mutations(kept[first], generator):
        if content == kept[first]:
            continue
        first.write_bytes(content)
        seen, reports = [], []
        results = PartialResults(partial, {})
        results._refuse_another = lambda stored: None
        results.read(seen.append, reports.append)
        assert (len(seen), len(reports)) == (4, 1)
        assert not first.exists()
    first.write_bytes(kept[first][:-9])
    (partial / "counts-foreign.npz").mkdir()
    (partial / "notes.txt").write_text("mine")
    assert asked(command, monkeypatch) == 2
    assert f"{first} is damaged (its content is not what was written)" in caplog.text
    assert {path.name for path in partial.iterdir()} == {"counts-foreign.npz.damaged", "notes.txt"}


# What another program might have put there under the right name: each is valid npz and JSON.
def foreign_states(state):
    yield []
    yield {}
    yield {**state, "variants": {}}
    yield {**state, "variants": {"main": None}}
    main_state = state["variants"]["main"]
    metric = main_state["metrics"]["main"]
    for pictures in (None, [], [[0]], [[True, "a", 0.5]], [[99, "a", 0.5]], [[0, "a", "x"]], [[0, "a", 0.5]] * 2):
        yield {**state, "variants": {"main": {**main_state, "pictures": pictures}}}
    for changes in (
        {"counts": {}},
        {"counts": {"confusion": np.zeros((2, 3))}},
        {"counts": {name: value.astype(str) for name, value in metric["counts"].items()}},
        {"image_ids": 5},
        {"image_ids": ["z"]},
        {"image_ids": [["nested"]]},
        {"num_images": "many"},
    ):
        changed = {**main_state, "metrics": {"main": {**metric, **changes}}}
        yield {**state, "variants": {"main": changed}}


def test_states_of_another_form_are_set_aside(tmp_path, command, monkeypatch):
    interrupt(command, monkeypatch, after=1)
    partial = tmp_path / "out" / "partial"
    (path,) = partial.iterdir()
    whole = path.read_bytes()
    # Its identity is read as the command stored it.
    with np.load(path) as arrays:
        about = json.loads(str(arrays["json"]))["about"]
    states = []
    PartialResults(partial, about).read(states.append, pytest.fail)
    forms = list(foreign_states(states[0]))
    path.unlink()
    for form in forms:
        PartialResults(partial, about).save(form)
    assert len(list(partial.iterdir())) == len(forms)
    path.write_bytes(whole)
    PartialResults(partial, about).save(states[0] | {"pictures": []})  # counted twice
    assert asked(command, monkeypatch) == 5
    assert json.loads(results(tmp_path))["num_images"] == 6


def killed(tmp_path, command, output, restore=None, tries=30) -> dict:
    """What `killed_processes.py` reports."""
    settings = {"command": command, "output": str(output), "tries": tries, "seed": 0, "restore": restore}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    process = subprocess.run(
        [sys.executable, "-m", "tests.hostile.killed_processes", json.dumps(settings)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert report["code"] == 0
    assert len(report["tries"]) == min(tries, report["operations"])
    assert all(row["killed"] == -9 for row in report["tries"])
    return report


@pytest.mark.slow
def test_an_evaluation_killed_at_any_moment_resumes_to_the_same_result(tmp_path):
    write_model(tmp_path / "model")
    data = write_data(tmp_path / "data")
    output = tmp_path / "work" / "out"
    output.parent.mkdir()
    command = ["evaluate", "--model", str(tmp_path / "model"), "--data", data, "--device", "cpu", "--worst", "1"]
    report = killed(tmp_path, [*command, "--output", str(output)], output)
    assert report["whole"].keys() == {"results.json", "results.txt", "worst.png"}
    for row in report["tries"]:
        for name, digest in (row["left"] or {}).items():
            if not name.startswith("partial"):
                assert digest == report["whole"][name], row
        assert (row["code"], row["after"]) == (0, report["whole"]), row


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_conversion_killed_at_any_moment_leaves_a_whole_folder_or_none(tmp_path, overwrite):
    config = PlainViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=64, patch_size=16
    )
    PlainViTModel(config).save_pretrained(tmp_path / "source")
    EoMTImageProcessor(size=64).save_pretrained(tmp_path / "source")
    old = {"config.json": "{}", "other.txt": "old"}
    for name, text in old.items():
        (tmp_path / "old").mkdir(exist_ok=True)
        (tmp_path / "old" / name).write_text(text)
    output = tmp_path / "work" / "out"
    output.parent.mkdir()
    command = ["convert", "backbone", str(tmp_path / "source"), str(output)]
    restore = str(tmp_path / "old") if overwrite else None
    report = killed(tmp_path, [*command, *(["--overwrite"] if overwrite else [])], output, restore)
    assert report["whole"].keys() >= {"config.json", "model.safetensors", "preprocessor_config.json"}
    for row in report["tries"]:
        complete = row["left"] == report["whole"]
        if overwrite:
            assert complete or row["left"].keys() == old.keys(), row
        else:
            assert complete or row["left"] is None, row
        # Without --overwrite, a folder that is complete already is not written again.
        assert (row["code"], row["after"]) == (2 if complete and not overwrite else 0, report["whole"]), row
    assert {path.name for path in output.parent.iterdir()} == {"out"}, "the next run deletes what a killed one left"


@pytest.mark.slow
def test_check_data_killed_at_any_moment_leaves_a_whole_sheet_or_none(tmp_path):
    data = write_data(tmp_path / "data")
    output = tmp_path / "work" / "out"
    output.parent.mkdir()
    report = killed(tmp_path, ["check-data", data, "--output", str(output), "--samples", "2"], output)
    assert report["whole"].keys() == {"contact_sheet.png"}
    for row in report["tries"]:
        assert row["left"] in (None, {}, report["whole"]), row
        assert (row["code"], row["after"]) == (0, report["whole"]), row
