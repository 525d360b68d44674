"""Files are written whole or not at all, and folders are tried before work is done for them."""

import os
import stat

import pytest

from hf_segvit.atomic_files import prepare_output_folder, replacing


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


def test_output_folders(tmp_path):
    prepare_output_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert not any((tmp_path / "a" / "b").iterdir())
    prepare_output_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file: it is there and is not a folder; choose another folder"):
        prepare_output_folder(tmp_path / "file")
    with pytest.raises(ValueError, match=r"cannot write to .*file/below: Not a directory"):
        prepare_output_folder(tmp_path / "file" / "below")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="Permission denied"):
        prepare_output_folder(tmp_path)
