"""Links, races and locks: nothing is written through a link, nothing that appears meanwhile is deleted, one writer."""

import ast
import os
import stat
import threading
from pathlib import Path

import pytest
import torch

from hf_segvit import atomic_files
from hf_segvit.atomic_files import complete_folder, delete_remains, only_writer, replacing, replacing_folder, write_json
from hf_segvit.cli import main
from hf_segvit.inference.loading import load_segmentation_model
from hf_segvit.models.configuration_plain_vit import PlainViTConfig
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.modeling_plain_vit import PlainViTModel
from hf_segvit.training import results
from hf_segvit.training.loop import train
from tests.tiny_models import tiny_eomt
from tests.tiny_training import tiny_recipe

SOURCE = Path(atomic_files.__file__).parent
pytestmark = pytest.mark.skipif(os.name == "nt", reason="links, forks and locks of POSIX systems")


def write_model(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(text)


def write_while(destination, overwrite, action):
    """Write a model folder, and do something else before it takes its place."""
    with complete_folder(destination, overwrite) as partial:
        (partial / "config.json").write_text("ours")
        action()


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path):
    target = tmp_path / "target.json"
    target.write_text("mine")
    link = tmp_path / "results.json"
    link.symlink_to(target)
    write_json(link, {"a": 1})
    assert target.read_text() == "mine"
    assert not link.is_symlink()
    assert link.read_text() == '{\n "a": 1\n}\n'


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_that_is_a_link_is_replaced_and_its_target_left_alone(tmp_path, exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(atomic_files, "_exchanged", lambda one, other: False)
    write_model(tmp_path / "target", "mine")
    (tmp_path / "model").symlink_to(tmp_path / "target")
    with replacing_folder(tmp_path / "model") as partial:
        (partial / "config.json").write_text("new")
    assert (tmp_path / "target" / "config.json").read_text() == "mine"
    assert not (tmp_path / "model").is_symlink()
    assert (tmp_path / "model" / "config.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "target"]


def test_a_folder_with_a_results_name_is_kept(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(ValueError, match=r"cannot write .*results\.json: Is a directory"):
        write_json(tmp_path / "results.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("what", ["model", "file", "link", "other folder"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_what_appears_at_the_destination_is_not_deleted(tmp_path, what, overwrite):
    destination, kept = tmp_path / "model", tmp_path / "kept"
    kept.mkdir()

    def appear():
        if what == "model":
            write_model(destination, "theirs")
        elif what == "file":
            destination.write_text("theirs")
        elif what == "link":
            destination.symlink_to(kept)
        else:
            destination.mkdir()
            (destination / "letter.txt").write_text("theirs")

    with pytest.raises(ValueError, match="model has appeared or changed meanwhile, and was left alone"):
        write_while(destination, overwrite, appear)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "model"]
    if what == "link":
        assert destination.readlink() == kept
    elif what == "file":
        assert destination.read_text() == "theirs"
    else:
        assert [path.read_text() for path in destination.iterdir()] == ["theirs"]


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_replaces_what_was_checked_and_nothing_else(tmp_path, exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(atomic_files, "_exchanged", lambda one, other: False)
    destination = tmp_path / "model"
    write_model(destination, "old")
    with complete_folder(destination, overwrite=True) as partial:
        (partial / "config.json").write_text("new")
    assert (destination / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    # Another folder takes its place while we work.
    def exchange_folders():
        destination.rename(tmp_path / "moved")
        write_model(destination, "theirs")

    with pytest.raises(ValueError, match="appeared or changed meanwhile"):
        write_while(destination, True, exchange_folders)
    assert (destination / "config.json").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "moved"]


def test_an_empty_folder_that_was_there_is_taken(tmp_path):
    (tmp_path / "model").mkdir()
    with complete_folder(tmp_path / "model") as partial:
        (partial / "config.json").write_text("new")
    assert (tmp_path / "model" / "config.json").read_text() == "new"


def tiny_backbone(folder: Path) -> None:
    config = PlainViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=64, patch_size=16
    )
    PlainViTModel(config).save_pretrained(folder)
    EoMTImageProcessor(size=64).save_pretrained(folder)


def in_child(action) -> int:
    """Exit code of a forked process: 0, or 1 if the action raised `ValueError`."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except ValueError:
            os._exit(1)
        except BaseException:  # the child must never return into pytest
            os._exit(2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("beside", [True, False])
def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path, beside):
    folder = tmp_path / "out"
    folder.mkdir()

    def write():
        with only_writer(folder, beside):
            pass

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        with only_writer(folder, beside):
            (folder / "locked").touch()
            os.read(reading, 1)  # until the parent closes its end
        os._exit(0)
    os.close(reading)
    while not (folder / "locked").exists():
        pass
    with pytest.raises(ValueError, match=f"another process is writing into {folder}; wait until it has ended"):
        write()
    os.close(writing)
    assert os.waitpid(child, 0)[1] == 0
    write()
    assert sorted(path.name for path in (*folder.iterdir(), *tmp_path.iterdir())) == ["locked", "out"]


def test_a_lock_that_a_killed_process_left_does_no_harm(tmp_path):
    def die():
        with only_writer(tmp_path):
            os.kill(os.getpid(), 9)

    assert in_child(die) == -9
    assert [path.name for path in tmp_path.iterdir()] == [".hf-segvit.lock"]
    with only_writer(tmp_path):
        # Neither another process nor another thread of this one may enter.
        assert in_child(lambda: atomic_files._locked.clear() or only_writer(tmp_path).__enter__()) == 1
        with pytest.raises(ValueError, match="another process"), only_writer(tmp_path):
            pass
    assert not any(tmp_path.iterdir())


def test_workers_do_not_inherit_the_lock(tmp_path):
    """A worker that outlives its killed parent must not keep the next run out."""
    reading, writing = os.pipe()

    def parent():
        with only_writer(tmp_path):
            if os.fork() == 0:  # the worker waits
                os.close(writing)
                os.read(reading, 1)
                os._exit(0)
            os.kill(os.getpid(), 9)

    assert in_child(parent) == -9
    with only_writer(tmp_path):
        pass
    os.close(writing)
    os.close(reading)


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / ".hf-segvit.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"cannot write .*hf-segvit\.lock"), only_writer(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_remains_are_deleted_and_a_cut_exchange_is_undone(tmp_path):
    write_model(tmp_path / ".model.0123abcd.replaced", "old")
    write_model(tmp_path / ".model.0123abcd.partial", "half")
    write_model(tmp_path / ".model.mine.partial", "not ours")
    delete_remains(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.mine.partial", "model"]
    assert (tmp_path / "model" / "config.json").read_text() == "old"


def test_threads_write_at_once_with_the_mode_of_the_umask(tmp_path):
    def write(number):
        for _ in range(20):
            with replacing(tmp_path / f"{number}.txt") as partial:
                partial.write_text("x")

    before = os.umask(0o027)
    try:
        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize("change", ["cut short", "replaced"])
def test_weights_whose_file_changes_after_loading_stay_as_they_were_checked(tmp_path, change):
    """A model that is still in its file would end the process by a bus error, or answer with unchecked weights."""
    model = tiny_eomt()
    model.save_pretrained(tmp_path)
    EoMTImageProcessor(size=64).save_pretrained(tmp_path)
    loaded, _ = load_segmentation_model(str(tmp_path))
    file = tmp_path / "model.safetensors"

    def use():
        if change == "cut short":
            os.truncate(file, 10)
        else:
            (tmp_path / "other").write_bytes(bytes(file.stat().st_size))
            os.replace(tmp_path / "other", file)
        for name, tensor in model.state_dict().items():
            if not torch.equal(loaded.state_dict()[name], tensor):
                raise ValueError(name)

    assert in_child(use) == 0


def test_a_second_run_of_training_into_one_folder_is_refused(tmp_path):
    recipe = tiny_recipe(tmp_path / "run", steps=2)
    (tmp_path / "run").mkdir()
    with only_writer(tmp_path / "run"), pytest.raises(ValueError, match="another process is writing into"):
        train(recipe, cpu=True, progress=False)
    assert not any((tmp_path / "run").iterdir())


def test_results_come_last_and_the_model_as_a_whole(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, steps=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "mine")
    original = results._keep_foreign_files

    def interrupted(old, new):
        raise KeyboardInterrupt  # as a kill would, between the files of model/

    monkeypatch.setattr(results, "_keep_foreign_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, cpu=True, progress=False)
    assert not (tmp_path / "results.json").exists()
    assert not any((tmp_path / "mine").iterdir())
    monkeypatch.setattr(results, "_keep_foreign_files", original)
    train(recipe, cpu=True, progress=False)
    assert (tmp_path / "results.json").is_file()
    assert not any((tmp_path / "mine").iterdir()), "never through a link"
    (tmp_path / "model" / "LICENSE").write_text("mine")
    (tmp_path / "model" / "model-00001-of-00002.safetensors").write_text("old")
    train(recipe, cpu=True, progress=False)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {
        "LICENSE",
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "results.json",
    }
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_convert_refuses_a_second_one_and_what_appears(tmp_path, capsys, monkeypatch):
    from hf_segvit.conversion import convert as module

    tiny_backbone(tmp_path / "source")
    command = ["convert", "backbone", str(tmp_path / "source"), str(tmp_path / "out")]
    with only_writer(tmp_path / "out", beside=True):
        assert main(command) == 2
    assert "another process is writing into" in capsys.readouterr().err
    original = module.write_folder

    def slow(converted, folder):
        original(converted, folder)
        write_model(tmp_path / "out", "theirs")

    monkeypatch.setattr(module, "write_folder", slow)
    assert main(command) == 2
    assert "has appeared or changed meanwhile" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_assert_is_a_check(path):
    """`python -O` drops assertions, so they may only tell mypy what is known anyway."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Assert):
            continue
        test = node.test
        is_not_none = isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot)
        is_instance = isinstance(test, ast.Call) and getattr(test.func, "id", "") == "isinstance"
        assert is_not_none or is_instance, f"{path}:{node.lineno} checks by assert; raise ValueError"
