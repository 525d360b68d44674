"""Damaged checkpoints: whatever is wrong in any file, the run goes back to an earlier one, without a traceback."""

import copy
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_segvit.training import checkpoints as module
from hf_segvit.training.checkpoints import EMA, MANIFEST, MODEL, OPTIMIZER, RANDOM, STATE
from hf_segvit.training.loop import train
from hf_segvit.training.saving import EVALUATION, RunSaver
from hf_segvit.training.tracking import curves, read_history
from tests.tiny_training import tiny_recipe

VALUES = (None, True, 0, -1, 7, 1.5, 1e308, 10**400, "", "x", "step", [], [[]], [{}], {}, {"a": 1}, [[[[[]]]]])
OTHER_RUN = ("is of another run", "was saved under DeepSpeed")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The saver of a finished run with checkpoints of steps 2 and 4, and a copy of its checkpoints."""
    output = tmp_path_factory.mktemp("run")
    recipe = tiny_recipe(output / "run", steps=4, ema_decay=0.5, evaluate_every="end")
    savers, original = [], RunSaver.resume

    def resume(self, say):
        savers.append(self)
        return original(self, say)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunSaver, "resume", resume)
        train(recipe, cpu=True, progress=False)
    shutil.copytree(output / "run" / "checkpoints", output / "kept")
    return savers[0], output / "kept"


@pytest.fixture
def saver(run):
    saver, kept = run
    shutil.rmtree(saver.checkpoints.folder)
    shutil.copytree(kept, saver.checkpoints.folder)
    return saver


def resumed(saver) -> tuple[int | str, list[str]]:
    """The step that the run resumes from, or the error, and what is reported."""
    reports = []
    saver.checkpoints.report = reports.append
    try:
        return saver.resume(lambda text: None)[0], reports
    except ValueError as error:
        return str(error), reports


def seal(folder):
    """List the files as they are now, as somebody would who knows the format."""
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    evaluation = folder / EVALUATION
    kept = evaluation.read_bytes() if evaluation.exists() and EVALUATION not in listed else None
    if kept is not None:
        evaluation.unlink()
    (folder / MANIFEST).unlink()
    module._write_manifest(folder, 4)
    if kept is not None:
        evaluation.write_bytes(kept)


def positions(value, path=()):
    """Paths to all values in a JSON value, itself included."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from positions(entry, (*path, key))


def replaced(value, path, other):
    if not path:
        return other
    value = copy.deepcopy(value)
    place = value
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = other
    return value


def assert_gone_back(saver, may_be_fine=False, what=""):
    step, reports = resumed(saver)
    if step == 2:
        assert len(reports) == 1, what
        assert reports[0].startswith("skipping a damaged checkpoint: "), what
        assert reports[0].endswith("; going back to step 2"), what
    elif may_be_fine:
        assert step == 4 or any(text in str(step) for text in OTHER_RUN), (what, step)
    else:
        pytest.fail(f"{what}: {step}, {reports}")


def test_the_run_resumes_from_the_last_step_where_nothing_is_damaged(saver):
    assert resumed(saver) == (4, [])
    seal(saver.checkpoints.path(4))
    assert resumed(saver) == (4, [])


@pytest.mark.parametrize("name", [STATE, EVALUATION, MANIFEST, "preprocessor_config.json", "config.json"])
@pytest.mark.parametrize("count", [20, pytest.param(400, marks=pytest.mark.slow)])
def test_any_json_value_may_stand_anywhere(saver, name, count):
    file = saver.checkpoints.path(4) / name
    original = json.loads(file.read_text())
    generator = random.Random(f"{name} {count}")
    changes = [(path, value) for path in positions(original) for value in VALUES]
    for path, value in generator.sample(changes, min(count, len(changes))):
        file.write_text(json.dumps(replaced(original, path, value)))
        if name not in (MANIFEST, EVALUATION):
            seal(file.parent)
        what = f"{name} {path} {str(value)[:20]}"
        # A manifest that says anything else is damaged; other values may be sound, or those of another run.
        assert_gone_back(saver, name != MANIFEST or path == ("step",), what)


@pytest.mark.parametrize("name", [STATE, EVALUATION, MANIFEST])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 200_000, b'{"step": 4', b"4" * 5000])
def test_files_that_are_no_json(saver, name, content):
    file = saver.checkpoints.path(4) / name
    file.write_bytes(content)
    if name == STATE:
        seal(file.parent)
    assert_gone_back(saver, may_be_fine=name == EVALUATION)


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, RANDOM, STATE])
def test_a_manifest_that_leaves_a_file_out(saver, name):
    file = saver.checkpoints.path(4) / MANIFEST
    content = json.loads(file.read_text())
    del content["files"][name]
    file.write_text(json.dumps(content))
    assert_gone_back(saver)


def test_a_moving_average_that_is_left_out(saver):
    (saver.checkpoints.path(4) / EMA).unlink()
    seal(saver.checkpoints.path(4))
    assert_gone_back(saver)


def test_a_manifest_that_names_files_elsewhere(saver):
    file = saver.checkpoints.path(4) / MANIFEST
    content = json.loads(file.read_text())
    content["files"]["../../secret"] = {"size": 1, "sha256": "0"}
    file.write_text(json.dumps(content))
    assert_gone_back(saver)


@pytest.mark.parametrize("name", [MODEL, EMA])
@pytest.mark.parametrize("damage", ["cut", "no header", "shape", "kind", "missing", "more"])
def test_weights_of_another_form(saver, name, damage):
    file = saver.checkpoints.path(4) / name
    if damage in ("cut", "no header"):
        file.write_bytes(file.read_bytes()[:-100] if damage == "cut" else bytes(100))
    else:
        tensors = load_file(file)
        key = sorted(tensors)[3]
        if damage == "missing":
            del tensors[key]
        elif damage == "more":
            tensors["more"] = torch.zeros(1)
        else:
            tensors[key] = torch.zeros(3) if damage == "shape" else tensors[key].to(torch.int8)
        save_file(tensors, file)
    seal(file.parent)
    assert_gone_back(saver)


def optimizer_forms(content):
    """Contents that `torch.load` reads, but that are no state of this optimiser."""
    yield from ([], 5, "text", {"optimizer": None}, {"optimizer": {}}, {"optimizer": content["optimizer"]})
    yield {**content, "schedule": 3}
    yield {**content, "schedule": {"last_epoch": "x", "_step_count": 1}}
    groups = content["optimizer"]["param_groups"]
    for state in ({}, [], {0: {}}, {0: 5}, {999: {}}, {"x": {"step": torch.tensor(1.0)}}):
        yield {**content, "optimizer": {"state": state, "param_groups": groups}}
    yield {**content, "optimizer": {"state": content["optimizer"]["state"], "param_groups": []}}
    for key in ("step", "exp_avg", "exp_avg_sq"):
        for value in (None, 1, torch.zeros(2, 3, 5)):
            form = copy.deepcopy(content)
            first = next(iter(form["optimizer"]["state"]))
            form["optimizer"]["state"][first][key] = value
            yield form
        form = copy.deepcopy(content)
        del form["optimizer"]["state"][first][key]
        yield form


def test_optimisers_of_another_form(saver):
    file = saver.checkpoints.path(4) / OPTIMIZER
    original = torch.load(file, weights_only=True)
    for number, form in enumerate(optimizer_forms(original)):
        torch.save(form, file)
        seal(file.parent)
        assert_gone_back(saver, what=f"form {number}")


@pytest.mark.parametrize(
    "form", [None, 5, [], [5], [{}], [{"python": 1}], [{"python": [3, [1, 2], None], "numpy": [], "torch": 1}]]
)
def test_random_states_of_another_form(saver, form):
    before = torch.get_rng_state()
    file = saver.checkpoints.path(4) / RANDOM
    torch.save(form, file)
    seal(file.parent)
    step, reports = resumed(saver)
    assert (step, len(reports)) == (2, 1)
    torch.set_rng_state(before)


def test_a_foreign_pickle_is_not_run(saver):
    class Foreign:
        def __reduce__(self):
            return pytest.fail, ("a pickle of a checkpoint was run",)

    for name in (OPTIMIZER, RANDOM):
        file = saver.checkpoints.path(4) / name
        torch.save({"optimizer": Foreign()}, file)
        seal(file.parent)
        assert_gone_back(saver)


def test_where_all_are_damaged_the_run_starts_anew(saver):
    for step in (2, 4):
        (saver.checkpoints.path(step) / STATE).write_text("{}")
    step, reports = resumed(saver)
    assert step == 0
    assert reports[-1].endswith("there is no earlier one: starting at step 0")


def test_a_history_of_any_form_is_read(tmp_path):
    sound = {"step": 2, "loss": 1.5}
    lines = [json.dumps(value) for value in VALUES]
    lines += [json.dumps({"step": value, "loss": 1}) for value in VALUES if value not in (0, -1, 7)]
    lines += ["[" * 100_000, '{"step": 1', "\x00"]
    text = "\n".join([*lines, json.dumps(sound), json.dumps({"step": 3, "loss": 10**400, "more": True})])
    (tmp_path / "history.jsonl").write_bytes(text.encode() + b"\n\xff\xfe\n")
    rows = read_history(tmp_path / "history.jsonl")
    assert sound in rows
    assert all(type(row["step"]) is int for row in rows)
    assert curves(rows)["loss"] == [(2, 1.5)]
