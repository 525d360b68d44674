"""What no command does with local inputs: open a pickle, start a process, use the network, or touch files elsewhere.

Python's own audit events tell it, which no import under another name evades.
"""

import dataclasses
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import EomtImageProcessor, Mask2FormerImageProcessor

import hf_segvit.demo
from hf_segvit.cli import main
from hf_segvit.data.generated_scenes import SCENE_LABELS
from hf_segvit.models.configuration_plain_vit import PlainViTConfig
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor
from hf_segvit.models.modeling_plain_vit import PlainViTModel

from ..hub_server import HubServer
from ..official_files import official_state_dict
from ..test_official_vit_p import official_state_dict as official_vit_p
from ..tiny_generators import tiny_classifier, tiny_generator
from ..tiny_models import tiny_eomt
from ..tiny_training import tiny_recipe

NAMES = {label: SCENE_LABELS[label] for label in range(6)}  # of the easy scenes
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn")
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
WRITTEN = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "shutil.rmtree")
# What Python, its packages and the system's libraries read of themselves.
OF_PYTHON = tuple({os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, Path(__file__).parents[2])})
OF_SYSTEM = ("/usr", "/lib", "/proc", "/sys", "/dev", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types")


class Watch:
    """Notes forbidden events while `allowed` is set: the folder whose files may be touched."""

    def __init__(self) -> None:
        self.allowed: str | None = None
        self.hosts: tuple[str, ...] = ()
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.allowed is None:
            return
        if event == "pickle.find_class" or event in PROCESSES:
            self.seen.append(f"{event} {arguments!r:.300}")
        elif event in NETWORK:
            address = arguments[1] if event == "socket.connect" else arguments
            if str(address[0]) not in self.hosts:
                self.seen.append(f"{event} {address!r:.300}")
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            self.opened(os.fsdecode(arguments[0]), bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
        elif event in WRITTEN:
            for argument in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                if isinstance(argument, str | bytes | os.PathLike) and os.path.isabs(os.fsdecode(argument)):
                    self.opened(os.fsdecode(argument), writes=True)

    def opened(self, name: str, writes: bool) -> None:
        path = os.path.realpath(name)
        own = path.endswith(".pyc") or "__pycache__" in path
        if path.startswith(self.allowed) or own or path.startswith("/dev/") or (not writes and self.is_known(path)):
            return
        self.seen.append(f"{'write' if writes else 'read'} {path}")

    def is_known(self, path: str) -> bool:
        return path.startswith((*OF_PYTHON, *OF_SYSTEM))


@pytest.fixture(scope="module")
def watch():
    """The one hook of this process, as Python cannot remove one."""
    watch = Watch()
    sys.addaudithook(watch)
    return watch


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a model of each kind, weights of other codes, an image and a recipe."""
    pytest.importorskip("matplotlib.font_manager")  # which writes its own cache once
    root = tmp_path_factory.mktemp("inputs")
    tiny_generator("segvit_eomt", NAMES).save_pretrained(root / "eomt")
    EoMTImageProcessor(size=64, num_labels=6, stuff_classes=[1, 2, 4], task="panoptic").save_pretrained(root / "eomt")
    for name in ("README.md", "LICENSE", "NOTICE"):
        (root / "eomt" / name).write_text(f"the {name}")
    tiny_generator("mask2former", NAMES).save_pretrained(root / "mask2former")
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(root / "mask2former")
    tiny_generator("eomt", NAMES).save_pretrained(root / "upstream")
    sizes = {"shortest_edge": 64, "longest_edge": 64}
    EomtImageProcessor(size=sizes, do_pad=True).save_pretrained(root / "upstream")
    tiny_classifier(NAMES).save_pretrained(root / "vit_p")
    ViTPImageProcessor(size=56, patch_size=14, id2label=NAMES).save_pretrained(root / "vit_p")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    PlainViTModel(PlainViTConfig(**small, image_size=64, patch_size=16)).save_pretrained(root / "backbone")
    EoMTImageProcessor(size=64).save_pretrained(root / "backbone")
    tiny_eomt(intermediate_size=128).save_pretrained(root / "regular")
    EoMTImageProcessor(size=64, num_labels=5).save_pretrained(root / "regular")
    torch.save(official_state_dict(tiny_eomt(masked_attention_probabilities=[0.0, 0.0])), root / "official.bin")
    torch.save(official_vit_p(), root / "vit_p.pth")
    Image.new("RGB", (90, 70), "grey").save(root / "image.png")
    recipe = tiny_recipe(root / "unused", steps=2, draw=1, trackers=["tensorboard"], cache=False).to_dict()
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


SCENES = "generated:easy?num_scenes=2&size=64"
COMMANDS = {
    "segment": "segment image.png --model eomt --output {} --device cpu",
    "segment fused": "segment image.png --model mask2former --classifier vit_p --output {} --device cpu",
    "evaluate": f"evaluate --model eomt --data {SCENES} --output {{}} --worst 1 --device cpu",
    "evaluate fused": f"evaluate --model mask2former --classifier vit_p --data {SCENES} --output {{}} --device cpu",
    "evaluate points": f"evaluate --model vit_p --data {SCENES} --output {{}} --device cpu",
    "classify-points": "classify-points image.png --model vit_p --points 3,4 --output {}/a.png --device cpu",
    "check-data": f"check-data {SCENES} --output {{}}",
    "train": "train recipe.yaml --cpu --output {}",
    "convert official-eomt": "convert official-eomt official.bin {} --task panoptic --set num_attention_heads=2",
    "convert official-vit-p": "convert official-vit-p vit_p.pth {} --set num_attention_heads=2",
    "convert transformers-eomt": "convert transformers-eomt upstream {}",
    "convert to-transformers": "convert to-transformers regular {}",
    "convert backbone": "convert backbone backbone {}",
    "push": "push eomt tester/tiny --dry-run",
}


@pytest.fixture
def run(watch, inputs, tmp_path, monkeypatch):
    """Run a command of words below the inputs' folder, and give its exit code and what it should not have done."""
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loads, real = [], torch.load

    def load(*arguments, **options):
        loads.append(options.get("weights_only"))
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "load", load)

    def execute(action, hosts=()):
        loads.clear()
        watch.seen, watch.hosts = [], hosts
        watch.allowed = os.path.commonpath([os.path.realpath(inputs), os.path.realpath(tmp_path)])
        try:
            result = action()
        finally:
            watch.allowed = None
        return result, watch.seen, list(loads)

    return execute


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_touch_their_folders_only(name, run, tmp_path, capsys):
    words = [word.format(tmp_path / "out") for word in COMMANDS[name].split()]
    code, seen, loads = run(lambda: main(words))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert seen == []
    # The explicit command alone reads a pickle, and nothing but tensors from it.
    assert all(weights_only is True for weights_only in loads)
    assert bool(loads) == (name in ("convert official-eomt", "convert official-vit-p"))
    if name == "evaluate":
        assert '"num_images": 2' in (tmp_path / "out" / "results.json").read_text()
    if name == "train":
        code, seen, loads = run(lambda: main(["compare", str(tmp_path / "out")]))
        assert (code, seen, loads) == (0, [], [])
        (tmp_path / "out" / "results.json").unlink()
        code, seen, loads = run(lambda: main(words))
        assert (code, seen) == (0, []), capsys.readouterr().err
        assert loads  # of its own checkpoint
        assert all(weights_only is True for weights_only in loads)


def test_a_push_talks_to_the_hub_alone(run, inputs, tmp_path, monkeypatch):
    with HubServer() as hub:
        hub.stand_in(monkeypatch, tmp_path / "cache")
        code, seen, loads = run(lambda: main(["push", "eomt", "tester/tiny"]), ("127.0.0.1",))
        assert (code, seen, loads) == (0, [], [])
        assert hub.files("tester/tiny")["model.safetensors"] == (inputs / "eomt" / "model.safetensors").read_bytes()


def test_the_demo_touches_its_folder_only(run, tmp_path, monkeypatch):
    original = hf_segvit.demo.demo_recipe
    # Its worker would be a process, of our own making.
    monkeypatch.setattr(
        hf_segvit.demo, "demo_recipe", lambda *sizes: dataclasses.replace(original(*sizes), num_workers=0)
    )
    sizes = {"steps": 2, "num_training_scenes": 8, "num_test_scenes": 2}
    results, seen, loads = run(lambda: hf_segvit.demo.run_demo(tmp_path, report=lambda text: None, **sizes))
    assert (results["steps"], seen, loads) == (2, [], [])


def test_the_watch_sees_what_it_should(run, tmp_path):
    """Each kind of event, by ways that the standard library offers."""
    import pickle
    import socket
    import subprocess

    def misbehave():
        pickle.loads(pickle.dumps(Path("x")))
        subprocess.run([sys.executable, "-c", ""], check=True)
        with socket.socket() as one:
            one.connect_ex(("127.0.0.1", 9))
        with tempfile.TemporaryDirectory(dir=tmp_path.parents[1]) as folder:
            Path(folder, "x").write_text("x")
        Path("/etc/passwd").read_text()

    _, seen, _ = run(misbehave)
    kinds = {text.split()[0] for text in seen}
    assert kinds >= {"pickle.find_class", "subprocess.Popen", "socket.connect", "write", "read"}
    assert "read /etc/passwd" in seen
