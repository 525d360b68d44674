"""Checkpoints: what is written comes back, a damaged or unfinished one is never used, a full disk harms nothing."""

import errno
import json
import os

import pytest
import torch

from hf_segvit import atomic_files
from hf_segvit.training import checkpoints as module
from hf_segvit.training.checkpoints import Checkpoints, DamagedCheckpoint, TrainingState, check, read

FILES = ("model.safetensors", "ema.safetensors", "optimizer.pt", "random_states.pt", "state.json", "manifest.json")


def state(step, value=1.0):
    weight = torch.full((3, 2), value)
    return TrainingState(
        step=step,
        model={"weight": weight, "half": weight.half()},
        ema={"weight": weight / 2},
        optimizer={
            "optimizer": {"state": {0: {"exp_avg": weight * 3}}, "param_groups": [{"lr": 0.1, "names": ["weight"]}]}
        },
        random_states=[{"torch": torch.get_rng_state(), "python": [3, [1, 2], None]}],
        progress={"selection": {"evaluations": []}, "seconds": 1.5},
    )


def settings(folder):
    (folder / "config.json").write_text("{}")


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=3)
    for step in (2, 4):
        checkpoints.save(state(step, value=step), settings)
    return checkpoints


def test_what_is_written_comes_back(saved):
    path = saved.newest_valid()
    assert path.name == "step-00000004"
    assert {file.name for file in path.iterdir()} == {*FILES, "config.json"}
    back, expected = read(path), state(4, value=4)
    assert (back.step, back.progress) == (4, expected.progress)
    for one, other in ((back.model, expected.model), (back.ema, expected.ema)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    assert torch.equal(
        back.optimizer["optimizer"]["state"][0]["exp_avg"], expected.optimizer["optimizer"]["state"][0]["exp_avg"]
    )
    assert back.optimizer["optimizer"]["param_groups"] == expected.optimizer["optimizer"]["param_groups"]
    assert torch.equal(back.random_states[0]["torch"], expected.random_states[0]["torch"])
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"].keys() == {*FILES, "config.json"} - {"manifest.json"}


@pytest.mark.parametrize("name", FILES[:-1])
@pytest.mark.parametrize("harm", ["cut", "flip", "delete"])
def test_any_damage_is_noticed(saved, name, harm):
    reports = []
    saved.report = reports.append
    file = saved.path(4) / name
    content = file.read_bytes()
    if harm == "delete":
        file.unlink()
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        file.write_bytes(content[:-1] if harm == "cut" else flipped)
    with pytest.raises(DamagedCheckpoint, match=name):
        check(saved.path(4))
    assert saved.newest_valid() == saved.path(2)
    assert len(reports) == 1
    assert name in reports[0]


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"files": {"model.safetensors": '])
def test_without_its_manifest_a_checkpoint_does_not_count(saved, content):
    saved.report = lambda text: None
    manifest = saved.path(4) / "manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
        check(saved.path(4))
    assert saved.newest_valid() == saved.path(2)


@pytest.mark.parametrize(
    ("place", "function"), [(module, "save_file"), (module, "_write_manifest"), (atomic_files, "_sync")]
)
def test_a_full_disk_leaves_the_old_checkpoint_valid(saved, monkeypatch, place, function):
    original, calls = getattr(place, function), []

    def full(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2 or function == "_write_manifest":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **options)

    monkeypatch.setattr(place, function, full)
    with pytest.raises(OSError, match=r"cannot save .*step-00000006: the disk is full.*step 4 is unharmed.*Make room"):
        saved.save(state(6), settings)
    assert saved.newest_valid() == saved.path(4)
    assert {path.name for path in saved.folder.iterdir()} == {"step-00000002", "step-00000004"}, "nothing half-written"
    monkeypatch.undo()
    saved.save(state(6), settings)
    assert saved.newest_valid() == saved.path(6)


def test_a_crash_between_any_two_files_leaves_the_old_checkpoint(saved, monkeypatch):
    """What is left when the process dies is passed over, and swept away by the next save."""
    for number in range(1, 9):
        original, calls = atomic_files._sync, []

        def dies(path, number=number, original=original, calls=calls):
            calls.append(path)
            if len(calls) == number:
                raise KeyboardInterrupt  # nothing handles it, as nothing handles SIGKILL
            return original(path)

        monkeypatch.setattr(atomic_files, "_sync", dies)
        with pytest.raises(KeyboardInterrupt):
            saved.save(state(6), settings)
        monkeypatch.undo()
        assert saved.newest_valid() == saved.path(4)
    saved.save(state(8), settings)
    assert [path.name for path in sorted(saved.folder.iterdir())] == [f"step-0000000{step}" for step in (2, 4, 8)]


def test_the_last_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    for step in range(1, 7):
        checkpoints.save(state(step), settings, keep=2 if step >= 2 else None)
    assert checkpoints.steps() == [2, 5, 6]
    checkpoints.save(state(7), settings, keep=7)
    assert checkpoints.steps() == [6, 7]


def test_a_step_is_saved_again_over_a_damaged_one(saved):
    (saved.path(4) / "optimizer.pt").unlink()
    saved.save(state(4, value=9), settings)
    assert read(saved.newest_valid()).model["weight"][0, 0] == 9


def test_where_nothing_was_saved_there_is_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.steps() == []
    assert checkpoints.newest_valid() is None


def test_a_pickle_is_not_run(saved):
    """Whoever exchanges a file and the manifest with it still cannot run code."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(saved.folder / "evil"),)

    file = saved.path(4) / "optimizer.pt"
    torch.save(Evil(), file)
    module._write_manifest(saved.path(4), 4)
    with pytest.raises(DamagedCheckpoint, match=r"optimizer\.pt cannot be read \(Weights only load failed"):
        read(saved.path(4))
    assert not (saved.folder / "evil").exists()
