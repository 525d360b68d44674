"""A full disk: one line that says so and exit code 1, nothing half-written, existing results unharmed.

A limit on the size of files (`RLIMIT_FSIZE`) fails in the same places as a full disk does, and needs no rights; where a
small file system can be mounted, it is tried, too.
"""

import errno
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from hf_segvit.atomic_files import DiskFull, is_disk_full, prepare_output_folder, replacing, write_json
from hf_segvit.cli import main
from hf_segvit.training.checkpoints import Checkpoints
from tests.tiny_training import tiny_recipe

from .test_interruptions import write_data, write_model
from .test_races import tiny_backbone

resource = pytest.importorskip("resource")


class largest_file:
    """Let this process write no file beyond so many bytes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def snapshot(folder: Path) -> dict[str, str]:
    """Hash of every file, hidden ones included."""
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """A command that writes into a folder, by name."""
    root = tmp_path_factory.mktemp("inputs")
    write_model(root / "model")
    data = write_data(root / "data")
    tiny_backbone(root / "backbone")
    (root / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(root / "unused", steps=2).to_dict()))
    model = ["--model", str(root / "model"), "--device", "cpu"]
    return {
        "evaluate": ["evaluate", *model, "--data", data, "--worst", "1", "--output"],
        "segment": ["segment", *model, str(root / "data" / "images" / "val" / "a.jpg"), "--output"],
        "check-data": ["check-data", data, "--samples", "2", "--output"],
        "convert": ["convert", "backbone", str(root / "backbone")],
        "train": ["train", str(root / "recipe.yaml"), "--cpu", "--output"],
    }


def assert_said(capsys, folder):
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1, lines
    assert "the disk is full" in lines[0]
    assert str(folder) in lines[0] or "/" in lines[0]


@pytest.mark.parametrize("name", ["evaluate", "segment", "check-data", "convert", "train"])
def test_a_command_without_room(name, commands, tmp_path, capsys):
    command = [*commands[name], str(tmp_path / "whole")]
    assert main(command) == 0
    whole = snapshot(tmp_path / "whole")
    sizes = sorted({path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()})
    # The largest file just does not fit, and one in the middle; a run of training is too slow for more.
    limits = [sizes[-1] - 1] if name == "train" else [sizes[-1] - 1, sizes[len(sizes) // 2] - 1, 1]
    for number, limit in enumerate(limits):
        folder = tmp_path / f"new-{number}"
        capsys.readouterr()
        with largest_file(limit):
            code = main([*commands[name], str(folder)])
        assert code == 1, limit
        assert_said(capsys, folder)
        left = snapshot(folder)
        assert not [path for path in left if ".partial" in path], left
        if name in ("convert", "train"):
            assert not (folder if name == "convert" else folder / "results.json").exists()
        for path, digest in left.items():
            # The list of a job says what is complete so far.
            if not path.startswith(("partial", ".hf-segvit-job")) and name not in ("train",):
                assert digest == whole[path], path
    # Existing results are as they were, or replaced as a whole.
    if name == "train":  # which has its checkpoints already, and writes its model again
        limits = [(tmp_path / "whole" / "model" / "model.safetensors").stat().st_size - 1]
    with largest_file(limits[-1]):
        again = {"convert": ["--overwrite"], "segment": ["--no-resume"]}.get(name, [])
        assert main([*command, *again]) == 1
    after = snapshot(tmp_path / "whole")
    for path in ("curves.png", ".hf-segvit-job.jsonl"):
        whole.pop(path, None)
    assert {path: after.get(path) for path in whole if "history" not in path} == {
        path: digest for path, digest in whole.items() if "history" not in path
    }
    assert main([*commands[name], str(tmp_path / "new-0")]) == 0, "the same command goes on once there is room"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]).returncode:
        pytest.skip("no file system can be mounted here, which needs root")
    yield folder
    subprocess.run([shutil.which("umount"), folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluate", "segment", "check-data", "convert", "train"])
def test_a_disk_that_is_full(name, commands, small_disk, capsys):
    for room in (0, 1, 3):  # blocks of 4 KiB, of which each file and folder takes one
        shutil.rmtree(small_disk / "out", ignore_errors=True)
        (small_disk / "filler").unlink(missing_ok=True)
        free = os.statvfs(small_disk).f_bavail
        with open(small_disk / "filler", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, (free - room - 1) * 4096)
        capsys.readouterr()
        code = main([*commands[name], str(small_disk / "out")])
        assert code == 1 or (room and code == 0), room
        if code:
            assert_said(capsys, small_disk)
        assert not [path for path in snapshot(small_disk) if ".partial" in path]
        results = small_disk / "out" / "results.json"
        if results.exists():  # the drawing of the worst images comes after it
            assert name == "evaluate"
            assert json.loads(results.read_text())["num_images"] == 6
        assert all(path.stat().st_size for path in small_disk.rglob("*.*") if path.is_file())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_code_is_a_full_disk(tmp_path, code):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(DiskFull, match=r"cannot write .*a\.json: the disk is full; make room") as raised:
        fail(tmp_path / "a.json", OSError(code, os.strerror(code)))
    assert raised.value.errno == errno.ENOSPC
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def fail(path, error):
    with replacing(path):
        raise error


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (OSError(errno.EACCES, "no"), ValueError("os error 28"), RuntimeError("(os error 13)")):
        with pytest.raises(type(error)) as raised:
            fail(tmp_path / "a", error)
        assert raised.value is error
        assert not is_disk_full(error)
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))


def test_a_quota_is_noticed_before_any_work(tmp_path, monkeypatch):
    def full(**options):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(DiskFull):
        prepare_output_folder(tmp_path / "out")


def test_json_is_whole_or_not_there(tmp_path):
    with largest_file(100), pytest.raises(DiskFull):
        write_json(tmp_path / "a.json", {"text": "x" * 200})
    assert not any(tmp_path.iterdir())


def test_an_optimiser_that_does_not_fit_names_the_disk(tmp_path):
    from tests.test_checkpoints import settings, state

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state(2), settings)
    large = state(4)
    large.optimizer["more"] = torch.zeros(5000)
    with largest_file(9000), pytest.raises(OSError, match="the disk is full; the checkpoint of step 2 is unharmed"):
        checkpoints.save(large, settings)
    assert checkpoints.newest_valid() == checkpoints.path(2)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000002"]
