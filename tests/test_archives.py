"""Archives: members read in place, at the cost of their own bytes, and nothing unsafe."""

import io
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import pytest

from hf_segvit.data.archives import Archive, open_archive, read_location
from hf_segvit.data.folders import DataFolder


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """An archive of 100,000 members, the last of which are larger."""
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(100_000):
            archive.writestr(f"train2017/{number:012}.jpg", b"x" * (number % 3))
        archive.writestr("train2017/last.jpg", b"last" * 500, zipfile.ZIP_DEFLATED)
    return path


def test_a_member_of_a_large_archive_costs_its_own_bytes(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directories, read = [], []
    original = zipfile.ZipFile

    class CountedFile(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            content = super().read(size)
            read.append(len(content))
            return content

    monkeypatch.setattr(zipfile, "ZipFile", lambda *args, **kw: directories.append(1) or original(*args, **kw))
    monkeypatch.setattr(zipfile.io, "open", CountedFile)
    location = {"archive": str(many), "member": "train2017/last.jpg"}
    assert read_location(location) == b"last" * 500
    assert sum(read) > 100_000 * 46  # the directory
    read.clear()
    for number in range(200):
        name = f"train2017/{number * 400:012}.jpg"
        assert read_location({"archive": str(many), "member": name}) == b"x" * (number * 400 % 3)
    assert len(directories) == 1
    assert sum(read) <= 200 * (30 + len(name) + 2)  # a header, its name and the member's own, each time


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_process_reads_through_a_handle_of_its_own(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "inner.zip", "w") as archive:
        archive.writestr("a", b"content")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "inner.zip", "inner.zip")
    outer, inner = (open_archive(f"{tmp_path / 'a.zip'}{end}") for end in ("", "::inner.zip"))
    before = outer._zip, inner._content
    assert inner.read("a") == b"content"
    child = os.fork()
    if child == 0:
        is_apart = outer._zip is None and inner.read("a") == b"content" and outer.read("inner.zip")
        # What a compressed inner archive holds is inherited, not unpacked again.
        os._exit(0 if is_apart and inner._content is before[1] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert outer._zip is before[0]
    assert inner.read("a") == b"content"


def test_an_open_archive_is_not_pickled(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", b"")
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(Archive(str(tmp_path / "a.zip")))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives_in_archives(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "inner.zip", "w") as inner:
        inner.writestr("train/a.png", b"first")
        inner.writestr("train/b.png", b"second" * 100, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as outer:
        outer.writestr("before", b"0" * 99)
        outer.write(tmp_path / "inner.zip", "annotations/inner.zip", method)
    folder = DataFolder(tmp_path, ("outer.zip", "absent.zip", "outer.zip::annotations/inner.zip", "outer.zip::absent"))
    files = folder.files("train")
    assert list(files) == ["a.png", "b.png"]
    assert [read_location(files[name]) for name in files] == [b"first", b"second" * 100]


def _write(path: Path, *names: str) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return str(path)


@pytest.mark.parametrize("name", ["../a", "/a", "x/../../a", "..\\a", "C:\\a", "\\a"])
def test_members_outside_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"a\.zip: member .* names a file outside"):
        Archive(_write(tmp_path / "a.zip", name))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_occur_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two members are called 'a'"):
        Archive(_write(tmp_path / "a.zip", "a", "a"))


def test_encrypted_members_are_refused(tmp_path: Path) -> None:
    path = Path(_write(tmp_path / "a.zip", "a"))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the directory's flag
    path.write_bytes(content)
    with pytest.raises(ValueError, match="member 'a' is encrypted"):
        Archive(str(path))


def test_rare_compression_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a", b"content")
    with pytest.raises(ValueError, match="compressed by method 12"):
        Archive(str(tmp_path / "a.zip"))


def test_bombs_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", b"\0" * 5000)
    opened = Archive(str(tmp_path / "a.zip"))
    with pytest.raises(ValueError, match=r"a\.zip/a: 5,000 bytes, more than the limit of 4,999"):
        opened.read("a", max_bytes=4999)
    assert opened.read("a", max_bytes=5000) == bytes(5000)
    # One that declares less than it holds yields no more than it declares.
    content = bytearray((tmp_path / "a.zip").read_bytes())
    start = content.index(b"PK\x01\x02")
    content[start + 24 : start + 28] = (100).to_bytes(4, "little")
    (tmp_path / "b.zip").write_bytes(content)
    lengths = []
    real = zlib.decompressobj

    class Counting:
        def __init__(self, *args: int) -> None:
            self.inner = real(*args)

        def decompress(self, data: bytes, limit: int) -> bytes:
            lengths.append(limit)
            return self.inner.decompress(data, limit)

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile.zlib, "decompressobj", Counting)
        with pytest.raises(ValueError, match=r"b\.zip/a: damaged \(Bad CRC-32"):
            Archive(str(tmp_path / "b.zip")).read("a")
    assert lengths
    assert max(lengths) <= zipfile.ZipExtFile.MIN_READ_SIZE  # which is more than 100, but no more than once
    assert len(lengths) == 1


@pytest.mark.parametrize("damage", ["content", "header", "directory", "cut"])
def test_damage_is_told(tmp_path: Path, damage: str) -> None:
    path = Path(_write(tmp_path / "a.zip", "a", "b"))
    content = bytearray(path.read_bytes())
    if damage == "content":
        content[content.index(b"content")] ^= 1
    elif damage == "header":
        content[0] ^= 1
    elif damage == "directory":
        content[content.index(b"PK\x01\x02")] ^= 1
    else:
        del content[len(content) // 2 :]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.zip.* (damaged|not a readable zip archive)"):
        Archive(str(path)).read("a")


def test_missing_members_and_files_are_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.zip", "a")
    with pytest.raises(ValueError, match=r"a\.zip/b: the archive has no such member"):
        Archive(path).read("b")
    with pytest.raises(ValueError, match=r"c\.png: no such file"):
        read_location({"archive": None, "member": str(tmp_path / "c.png")})
    with pytest.raises(ValueError, match="not a regular file"):
        read_location({"archive": None, "member": str(tmp_path)})
    with pytest.raises(ValueError, match=r"a\.zip: \d+ bytes, more than the limit of 3"):
        read_location({"archive": None, "member": path}, max_bytes=3)
