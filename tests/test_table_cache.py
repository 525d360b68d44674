"""The cache of tables: the same rows as without, and a cache that is stale, damaged or out of reach does no harm."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets.table import InMemoryTable
from torch.utils.data import DataLoader

from hf_segvit.cli import main
from hf_segvit.data import reading, table_cache
from hf_segvit.data.reading import decoder_of, describe, load_segmentation_dataset, metadata

from .data_folders import coco_folder, panoptic_folder, write_image, write_json
from .test_readers import TASKS_WITH_FILES, WRITERS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache that also takes small annotations, written just now."""
    monkeypatch.setenv("HF_SEGVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(table_cache, "SMALLEST", 0)
    monkeypatch.setattr(table_cache, "_RECENT", -(10**9))
    return tmp_path / "cache"


def files(cache):
    return sorted(cache.rglob("*.arrow"))


@pytest.fixture
def reads(monkeypatch):
    """How often a reader was asked."""
    calls, read = [], reading._read
    monkeypatch.setattr(reading, "_read", lambda *arguments: calls.append(arguments[0]) or read(*arguments))
    return calls


def same_dataset(cached, plain):
    assert cached.features == plain.features
    assert cached.data.schema == plain.data.schema
    assert describe(cached) == describe(plain)
    assert decoder_of(cached) == decoder_of(plain)
    assert list(metadata(cached)) == list(metadata(plain))
    for ours, theirs in zip(cached, plain, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["segments"] == theirs["segments"]
        assert ours["image"].tobytes() == theirs["image"].tobytes()
        for key in ("image_id", "segment_map"):
            assert (ours[key] == theirs[key]) is True or (ours[key] == theirs[key]).all()


@pytest.mark.parametrize("name", ["coco", "coco_folder", "labelme", "yolo", "cvat", "via", "supervisely", "datumaro"])
def test_rows_are_those_of_the_files(tmp_path, cache, reads, name):
    spec = WRITERS[name](tmp_path / "data")
    tasks = TASKS_WITH_FILES.get(name, reading.available_tasks(spec))
    for task in tasks:
        plain = load_segmentation_dataset(spec, task=task, cache=False)
        first = load_segmentation_dataset(spec, task=task)
        assert len(reads) == 2
        second = load_segmentation_dataset(spec, task=task)
        assert len(reads) == 2  # not a third time
        same_dataset(first, plain)
        same_dataset(second, plain)
        reads.clear()
    assert len(files(cache)) == len(tasks)


@pytest.mark.parametrize("form", ["", "?cache=false"])
def test_options_split_and_task_have_tables_of_their_own(tmp_path, cache, form):
    spec = coco_folder(tmp_path / "data")
    for options in ({}, {"task": "semantic"}, {"split": "train"}, {"drop": "cat"}, {"range": "0-99"}):
        load_segmentation_dataset(spec + form, **options)
        load_segmentation_dataset(spec + form, **options)
    assert len(files(cache)) == (0 if form else 4)  # the range of values concerns images alone
    with pytest.raises(ValueError, match="cache=perhaps is neither true nor false"):
        load_segmentation_dataset(f"{spec}?cache=perhaps")


def test_settings_of_images_are_kept_apart(tmp_path, cache):
    spec = coco_folder(tmp_path / "data")
    load_segmentation_dataset(spec)
    assert reading.image_settings_of(load_segmentation_dataset(spec, range="0-99")).value_range == (0, 99)
    assert reading.image_settings_of(load_segmentation_dataset(spec)).value_range is None


def test_what_the_reader_looked_at_is_watched(tmp_path, cache, reads):
    root = tmp_path / "data"
    spec = panoptic_folder(root)
    annotations = root / "annotations" / "panoptic_train.json"

    def is_read_anew():
        reads.clear()
        dataset = load_segmentation_dataset(spec, task="panoptic")
        return bool(reads), len(dataset[0]["segments"])

    assert is_read_anew() == (True, 2)
    assert is_read_anew() == (False, 2)
    # Copied or touched: another time, the same content.
    os.utime(annotations, ns=(1, 1))
    os.utime(root / "annotations", ns=(1, 1))
    assert is_read_anew() == (False, 2)
    # Another content of the same size.
    content = annotations.read_text().replace('"iscrowd": 0', '"iscrowd": 1', 1)
    annotations.write_text(content)
    assert is_read_anew() == (True, 2)
    assert is_read_anew() == (False, 2)
    # A file that is new might be an image that was missing, or a split with classes.
    write_image(root / "train" / "b.jpg")
    assert is_read_anew()[0]
    (root / "train" / "b.jpg").unlink()
    assert is_read_anew()[0]
    (root / "images").mkdir()
    assert is_read_anew()[0]
    assert not is_read_anew()[0]


def test_a_damaged_table_is_written_again_and_said(tmp_path, cache, reads, caplog):
    spec = coco_folder(tmp_path / "data")
    plain = load_segmentation_dataset(spec, cache=False)
    load_segmentation_dataset(spec)
    (file,) = files(cache)
    whole = file.read_bytes()
    trailer = table_cache._TRAILER.size
    damaged = [
        *(whole[:-1], whole[: len(whole) // 2], b"", whole[:20], whole + b"\0"),
        *(bytes([whole[at] ^ 1]).join([whole[:at], whole[at + 1 :]]) for at in (0, 99, 2000, len(whole) - trailer - 5)),
    ]
    for content in damaged:
        reads.clear()
        caplog.clear()
        file.write_bytes(content)
        same_dataset(load_segmentation_dataset(spec), plain)
        assert len(reads) == 1
        assert f"the cached table {file} is damaged" in caplog.text
        assert file.read_bytes() == whole
    assert [path.name for path in cache.rglob("*") if path.is_file()] == [file.name]


@pytest.mark.parametrize("change", ["reader", "field", "labels", "key", "list"])
def test_a_table_with_a_right_checksum_but_other_content_is_refused(tmp_path, cache, reads, change):
    spec = coco_folder(tmp_path / "data")
    load_segmentation_dataset(spec)
    (file,) = files(cache)
    whole, trailer = file.read_bytes(), table_cache._TRAILER
    length, _, magic = trailer.unpack(whole[-trailer.size :])
    end = len(whole) - trailer.size
    content = json.loads(whole[end - length : end])
    if change == "reader":
        content["read_masks"][0] = "Popen"
    elif change == "field":
        content["read_masks"][1] = {"args": "true"}
    elif change == "labels":
        content["labels"].append("zebra")
    elif change == "key":
        content["key"] = "0"
    else:
        content = [content]
    text = json.dumps(content).encode()
    file.write_bytes(whole[: end - length] + text)
    digest = table_cache._checksum(file)
    file.write_bytes(file.read_bytes() + trailer.pack(len(text), digest, magic))
    reads.clear()
    dataset = load_segmentation_dataset(spec)
    assert len(reads) == 1
    assert file.read_bytes() == whole
    assert "zebra" not in describe(dataset).id2label.values()


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_SEGVIT_CACHE", str(tmp_path / "file"))
    spec = coco_folder(tmp_path / "data")
    assert len(load_segmentation_dataset(spec)) == 1
    assert f"cannot be kept in {tmp_path / 'file'}" in caplog.text
    assert "HF_SEGVIT_CACHE" in caplog.text


@pytest.mark.parametrize("folder", ["~nobody-of-this-name/cache", "/" + "x" * 300, "LOCKED"])
def test_a_folder_that_cannot_be_reached_is_said(folder, tmp_path, monkeypatch, caplog):
    spec = coco_folder(tmp_path / "data")
    if folder == "LOCKED":  # root may enter every folder, so that of another user is made up
        folder = str(tmp_path / "locked")
        look = os.stat

        def stat(path, **settings):
            if str(path).startswith(folder):
                raise PermissionError(13, "Permission denied", str(path))
            return look(path, **settings)

        def make(path, *arguments):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(os, "stat", stat)
        monkeypatch.setattr(os, "mkdir", make)
    monkeypatch.setenv("HF_SEGVIT_CACHE", folder)
    monkeypatch.setattr(table_cache.logger, "warning_once", table_cache.logger.warning)
    assert len(load_segmentation_dataset(spec)) == 1
    assert f"cannot be kept in {folder}" in caplog.text
    assert "name a folder that can be written in HF_SEGVIT_CACHE" in caplog.text


def test_the_cache_can_be_off(tmp_path, monkeypatch, cache):
    spec = coco_folder(tmp_path / "data")
    monkeypatch.setenv("HF_SEGVIT_CACHE", "off")
    assert table_cache.cache_root() is None
    load_segmentation_dataset(spec)
    assert not cache.exists()
    monkeypatch.delenv("HF_SEGVIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert table_cache.cache_root() == Path("/somewhere/hf_segvit")


def test_no_cache_is_an_option_of_the_commands(monkeypatch, capsys):
    monkeypatch.setenv("HF_SEGVIT_CACHE", "/somewhere")
    assert main(["train", "--list"]) == 0
    assert os.environ["HF_SEGVIT_CACHE"] == "/somewhere"
    assert main(["train", "--list", "--no-cache"]) == 0
    assert os.environ["HF_SEGVIT_CACHE"] == "off"


def test_small_and_recent_annotations_are_not_kept(tmp_path, cache, monkeypatch):
    spec = coco_folder(tmp_path / "data")
    monkeypatch.setattr(table_cache, "_RECENT", 60.0)
    load_segmentation_dataset(spec)
    assert not files(cache)
    for file in (tmp_path / "data").rglob("*"):
        os.utime(file, (time.time() - 120, time.time() - 120))
    monkeypatch.setattr(table_cache, "SMALLEST", 10**6)
    load_segmentation_dataset(spec)
    assert not files(cache)
    monkeypatch.setattr(table_cache, "SMALLEST", 100)
    load_segmentation_dataset(spec)
    assert len(files(cache)) == 1


def test_tables_are_shared_with_workers_by_path(tmp_path, cache):
    spec = coco_folder(tmp_path / "data")
    load_segmentation_dataset(spec)
    dataset = load_segmentation_dataset(spec)
    assert isinstance(dataset.data, InMemoryTable)
    assert dataset.cache_files == []  # or `map` would write beside it
    content = pickle.dumps(dataset.data)
    assert len(content) < 500
    assert pickle.loads(content).table == dataset.data.table
    rows = DataLoader(metadata(dataset), batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert [row["image_id"] for row in rows] == [row["image_id"] for row in metadata(dataset)]
    (file,) = files(cache)
    file.write_bytes(file.read_bytes()[:-20] + b"\0" * 20)
    with pytest.raises(ValueError, match="have changed since the start of the run"):
        pickle.loads(content)
    file.unlink()
    with pytest.raises(ValueError, match="the cached table is gone"):
        pickle.loads(content)
    # What is mapped stays readable.
    assert len(list(metadata(dataset))) == 1


WRITE = """
import sys
from hf_segvit.data import reading, table_cache
table_cache.SMALLEST, table_cache._RECENT = 0, -1e9
for _ in range(20):
    table_cache.cached_table = reading.cached_table = lambda key: None
    assert len(reading.load_segmentation_dataset(sys.argv[1])) == 1
    (file,) = (table_cache.cache_root() / "tables").glob("[0-9a-f]*.arrow")
    table_cache._opened(file)
"""


@pytest.mark.slow
def test_processes_may_write_at_once(tmp_path, cache):
    spec = coco_folder(tmp_path / "data")
    command = [sys.executable, "-c", WRITE, spec]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert not [error for error in errors if "damaged" in error]
    assert len(list(cache.rglob("*"))) == 2  # the folder and one file, no partial ones


def test_long_numbers_are_found_wherever_they_are(tmp_path):
    from hf_segvit.data import archives

    block = archives._BLOCK
    for start in (0, 5, block - 10, block - 1, block, 2 * block - 19):
        text = "x" * start + "1234567890123456789" + "é" * block
        assert archives._has_long_integer(text)
        assert not archives._has_long_integer(text.replace("345", "3.5"))
    assert not archives._has_long_integer("")
    write_json(tmp_path / "a.json", {"a": [10**30, 2**63 - 1, 2**63]})
    location = {"archive": None, "member": str(tmp_path / "a.json")}
    assert archives.read_json(location) == {"a": [1e30, 2**63 - 1, float(2**63)]}
