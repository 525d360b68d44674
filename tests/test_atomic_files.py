"""Files and folders are written whole or not at all, and folders are tried before work is done for them."""

import errno
import json
import os
import stat
import threading

import pytest

from hf_segvit import atomic_files
from hf_segvit.atomic_files import DiskFull, prepare_output_folder, replacing, replacing_folder, write_json, writing


def test_replaces_when_all_went_well(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    with replacing(path) as partial:
        assert partial.suffix == ".png"  # writers choose the format by it
        assert partial.parent == tmp_path
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ValueError, match="half done"):
        write_half(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def write_half(path):
    with replacing(path) as partial:
        partial.write_text("half")
        raise ValueError("half done")


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX systems")
def test_files_get_ordinary_permissions(tmp_path):
    umask = os.umask(0o027)
    try:
        with replacing(tmp_path / "a.txt"):
            pass
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX systems")
def test_the_umask_is_never_touched(tmp_path, monkeypatch):
    """It belongs to the whole process: two threads that change it for a moment can leave it at 0."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("changed the umask"))
    threads = [threading.Thread(target=write_json, args=(tmp_path / f"{n}.json", {"n": n})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(4)] == [{"n": n} for n in range(4)]


def test_writing_names_the_file_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    message = r"cannot write .*folder: Is a directory; check its folder"
    with pytest.raises(ValueError, match=message), writing(tmp_path / "folder") as partial:
        partial.write_text("text")
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DiskFull, match="make room"), writing(tmp_path / "file"):
        raise full
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_json_is_for_people_too(tmp_path):
    write_json(tmp_path / "a.json", {"name": "Straße", "values": [1, 2.5]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.startswith('{\n "name": ')
    assert text.endswith("]\n}\n")
    assert json.loads(text) == {"name": "Straße", "values": [1, 2.5]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"name": object()})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_is_durable_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(atomic_files, "_sync", lambda path: synced.append((path.name, (tmp_path / "new").exists())))
    with replacing(tmp_path / "new") as partial:
        pass
    assert synced == []
    (tmp_path / "new").unlink()
    with replacing(tmp_path / "new", durable=True) as partial:
        pass
    assert synced == [(partial.name, False), (tmp_path.name, True)]
    (tmp_path / "new").unlink()
    synced.clear()
    with replacing_folder(tmp_path / "new") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").touch()
    assert sorted(synced[:-1]) == [(partial.name, False), ("file", False), ("inner", False)]
    assert synced[-1] == (tmp_path.name, True)


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_files, "_exchanged", lambda one, other: False)  # a system without the exchange
    target = tmp_path / "step-1"
    target.mkdir()
    (target / "file").write_text("old")
    rename = os.rename

    def refusing(source, destination):
        if str(source).endswith(".partial"):
            raise OSError("disk is gone")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", refusing)
    with pytest.raises(OSError, match="disk is gone"), replacing_folder(target) as partial:
        (partial / "file").write_text("new")
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_output_folders(tmp_path):
    prepare_output_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert not any((tmp_path / "a" / "b").iterdir())
    prepare_output_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file: it exists and is not a folder; choose another folder"):
        prepare_output_folder(tmp_path / "file")
    with pytest.raises(ValueError, match=r"cannot write to .*file/below: Not a directory"):
        prepare_output_folder(tmp_path / "file" / "below")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="Permission denied"):
        prepare_output_folder(tmp_path)
