"""Publishing a folder that holds more or other things than a checkpoint, that changes meanwhile, or is interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_segvit.cli import main
from hf_segvit.hub import push
from hf_segvit.hub.push import plan_push, publish
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor

from ..hub_server import WRITE_TOKEN, HubServer
from ..tiny_models import tiny_eomt

RESULTS = {"task": "panoptic", "dataset": "scenes", "split": "test", "metrics": {"PQ": 51.25}}
PUBLISHED = ("config.json", "preprocessor_config.json", "model.safetensors", "README.md", "LICENSE", "NOTICE")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        server.stand_in(monkeypatch, tmp_path / "cache")
        yield server


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    tiny_eomt().save_pretrained(folder)
    EoMTImageProcessor(size=64, stuff_classes=[3, 4]).save_pretrained(folder)
    for name in ("README.md", "LICENSE", "NOTICE"):
        (folder / name).write_text(f"the {name}")
    (folder / "results.json").write_text(json.dumps(RESULTS))
    return folder


def refused(folder: Path, hub: HubServer, capsys, code: int = 2) -> str:
    capsys.readouterr()
    assert main(["push", str(folder), "tester/tiny"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert hub.requests == []
    assert "Traceback" not in line
    return line


class TestOnlyFilesOfTheFolder:
    @pytest.mark.parametrize("name", [*PUBLISHED, "results.json"])
    def test_no_link_is_followed(self, hub, folder, tmp_path, capsys, name):
        secret = tmp_path / "secret"
        shutil.copy(folder / name, secret)  # as good as the file itself
        (folder / name).unlink()
        (folder / name).symlink_to(secret)
        line = refused(folder, hub, capsys)
        assert f"{folder / name}: is a link to {secret}" in line
        assert "put a copy in its place" in line

    def test_no_link_to_a_shard_is_followed(self, hub, folder, tmp_path, capsys):
        (folder / "model.safetensors").unlink()
        tiny_eomt().save_pretrained(folder, max_shard_size="20KB")
        shard = sorted(folder.glob("model-*.safetensors"))[0]
        shard.rename(tmp_path / "elsewhere")
        shard.symlink_to(tmp_path / "elsewhere")
        assert f"{shard}: is a link to" in refused(folder, hub, capsys)

    @pytest.mark.parametrize("name", [*PUBLISHED, "results.json"])
    def test_pipes_and_folders_are_no_files(self, hub, folder, capsys, name):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert f"{folder / name}: is no ordinary file" in refused(folder, hub, capsys)
        (folder / name).unlink()
        (folder / name).mkdir()
        assert f"{folder / name}: is no ordinary file" in refused(folder, hub, capsys)

    def test_a_text_of_gigabytes_is_refused_before_it_is_read(self, hub, folder, capsys):
        with open(folder / "README.md", "wb") as file:
            file.truncate(2**34)
        assert "README.md: has 17,179,869,184 bytes" in refused(folder, hub, capsys)

    def test_a_text_in_another_encoding_is_told(self, hub, folder, capsys):
        (folder / "README.md").write_bytes("café".encode("latin-1"))
        assert f"{folder}/README.md: byte 3 is not UTF-8" in refused(folder, hub, capsys)

    def test_unreadable_files_are_told(self, hub, folder, capsys, monkeypatch):
        def denied(path, *arguments, **options):
            if str(path).endswith("NOTICE"):
                raise PermissionError(13, "Permission denied")
            return os_open(path, *arguments, **options)

        os_open = os.open
        monkeypatch.setattr(os, "open", denied)
        assert f"{folder / 'NOTICE'}: cannot be read (Permission denied)" in refused(folder, hub, capsys)

    def test_no_room_for_the_copies_is_told(self, hub, folder, capsys, monkeypatch):
        def full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(shutil, "copyfileobj", full)
        assert "(No space left on device), as is done before checking" in refused(folder, hub, capsys, code=1)


class TestWhatIsCheckedIsWhatIsUploaded:
    def test_a_configuration_that_names_other_weights(self, hub, folder, capsys):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
        assert "transformers_weights='adapter_model.bin' makes Transformers load other" in refused(folder, hub, capsys)

    @pytest.mark.parametrize(
        ("index", "told"),
        [
            ([], "holds a list, not a mapping"),
            ({}, "weight_map does not map tensors to files"),
            ({"weight_map": ["a"]}, "weight_map does not map tensors to files"),
            ({"weight_map": {"a": 3}}, "weight_map does not map tensors to files"),
            ({"weight_map": {"a": "/etc/passwd.safetensors"}}, "names '/etc/passwd.safetensors', which is not a"),
            ({"weight_map": {"a": "secret.safetensors"}}, "names 'secret.safetensors', which is not a"),
            ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "which is missing"),
            ({"weight_map": {}}, "names no files"),
        ],
    )
    def test_an_index_that_is_none(self, hub, folder, capsys, index, told):
        (folder / "model.safetensors").rename(folder / "secret.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert told in refused(folder, hub, capsys)

    def test_an_index_nested_without_end(self, hub, folder, capsys):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text("[" * 100_000)
        assert "index.json: n" in refused(folder, hub, capsys)  # nested too deep, or not JSON, by version of Python

    def test_an_index_that_disagrees_with_its_shards(self, hub, folder, capsys):
        (folder / "model.safetensors").unlink()
        tiny_eomt().save_pretrained(folder, max_shard_size="20KB")
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        files = sorted(set(index["weight_map"].values()))
        index["weight_map"]["class_predictor.bias"] = files[0]
        path.write_text(json.dumps(index))
        assert "says that 'class_predictor.bias' is in model-00001" in refused(folder, hub, capsys)

    def test_a_tensor_in_two_shards(self, hub, folder, capsys):
        (folder / "model.safetensors").unlink()
        tiny_eomt().save_pretrained(folder, max_shard_size="20KB")
        shards = sorted(folder.glob("model-*.safetensors"))
        extra = load_file(shards[0])
        name = sorted(extra)[0]
        save_file({**load_file(shards[1]), name: extra[name]}, shards[1], metadata={"format": "pt"})
        assert f"holds '{name}', as does {shards[0].name}" in refused(folder, hub, capsys)

    def test_a_path_in_the_metadata_of_weights(self, hub, folder, capsys):
        path = folder / "model.safetensors"
        save_file(load_file(path), path, metadata={"format": "pt", "source": "/home/jane/secret/run"})
        assert "model.safetensors (metadata), line" in refused(folder, hub, capsys)

    def test_a_path_that_json_spells_with_escapes(self, hub, folder, capsys):
        text = json.dumps(RESULTS | {"remark": "/home/jane/secret"}).replace("/", "\\u002f")
        (folder / "results.json").write_text(text)
        assert "holds the path '/home/jane/secret'" in refused(folder, hub, capsys)

    def test_changes_after_the_check_are_not_published(self, hub, folder, monkeypatch):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        check = push.check_checkpoint

        def change_and_check(copies):
            save_file({"other": torch.zeros(3)}, folder / "model.safetensors")
            (folder / "README.md").write_text("other")
            return check(copies)

        monkeypatch.setattr(push, "check_checkpoint", change_and_check)
        with plan_push(folder, "tester/tiny") as plan:
            (folder / "LICENSE").unlink()
            (folder / "LICENSE").symlink_to("/etc/passwd")
            (folder / "results.json").write_text("{}")
            publish(plan, "tester/tiny")
        published = hub.files("tester/tiny")
        for name in ("model.safetensors", "README.md", "LICENSE", "NOTICE", "results.json"):
            assert published[name] == before[name], name
        assert not Path(plan.copies.name).exists()


# A process that has everything imported, and forks one push for each line that it reads.
FORKS = """
import os, sys
from hf_segvit.cli import main
import hf_segvit.hub.push
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.stdin.readline()  # the next line lets it go
        os._exit(main(["push", sys.argv[1], "tester/tiny"]))
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class _KillAt(list):
    """A list of requests that kills a process as the server receives the one of a number."""

    def __init__(self, number: int, process: int) -> None:
        super().__init__()
        self.number, self.process = number, process

    def append(self, request) -> None:
        super().append(request)
        if len(self) == self.number:
            os.kill(self.process, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_push_that_is_killed_publishes_everything_or_nothing(folder, tmp_path):
    with HubServer() as hub:
        environment = hub.environment(tmp_path / "home", token=WRITE_TOKEN)
        environment["PYTHONPATH"] = str(Path(push.__file__).parents[2])
        command = [sys.executable, "-c", FORKS, str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, env=environment, text=True, **pipes) as forks:

            def pushed(kill_at: int) -> tuple[int, int]:
                """Status of a push, and the number of its requests."""
                print("fork", file=forks.stdin, flush=True)
                hub.requests = _KillAt(kill_at, int(answer()))
                print("go", file=forks.stdin, flush=True)
                return int(answer()), len(hub.requests)

            def answer() -> str:
                while not (line := forks.stdout.readline().strip()).lstrip("-").isdigit():
                    assert line, "the process that forks has ended"
                return line

            status, count = pushed(0)
            assert status == 0
            published = dict(hub.files("tester/tiny"))
            killed = 0
            for number in range(1, count + 3):
                (folder / "NOTICE").write_text(f"version {number}")
                weights = load_file(folder / "model.safetensors")
                weights["class_predictor.bias"] = torch.full_like(weights["class_predictor.bias"], number)
                save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
                complete = {name: (folder / name).read_bytes() for name in ("NOTICE", "model.safetensors")}
                status, _ = pushed(number)
                killed += status == signal.SIGKILL
                found = hub.files("tester/tiny")
                assert found == published or {**published, **complete} == found, f"killed at request {number}"
                published = dict(found)
            assert killed >= count - 1
            forks.stdin.close()
