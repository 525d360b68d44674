"""Every command over a corpus of broken inputs: each message names the file and a remedy, and none is a library's.

Inputs are those of a small working set of files, each broken in turn, and commands are run in this process.
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hf_segvit.cli import main
from hf_segvit.hub.export_record import ExportRecord, GraphRecord
from hf_segvit.models.configuration_vit_p import ViTPConfig
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor
from hf_segvit.models.modeling_vit_p import ViTPForPointClassification

from ..data_folders import coco_folder, mask_folder, panoptic_folder, write_image
from ..tiny_models import tiny_eomt

# What only a library says, or Python: to a user it tells neither the file nor what to do.
LIBRARY_TEXTS = re.compile(
    r"Traceback|TypeError|KeyError|IndexError|AttributeError|RuntimeError|RecursionError|OverflowError|struct\.error"
    r"|codec can't|Could not convert|shape '\[|NoneType|list index out of range|string index|object has no attribute"
    r"|unpack requires|not subscriptable|not iterable|unhashable|positional argument|keyword argument|invalid literal"
    r"|could not convert string|embedded null|unexpected keyword|must be str|expected str, bytes|indices must be"
    r"|size mismatch|HeaderTooLarge|InvalidHeader|MetadataIncomplete|UnpicklingError|pickle data|invalid load key"
    r"|PytorchStreamReader|maximum recursion|\[Errno \d+\]"
    r"|StrictDataclass|Validation error for field|<[\w.]+ object at 0x|<class '|<_io\.|BytesIO|bytes-like"
    r"|Expecting (value|property|',' delim|':' delim)|Unterminated string|Extra data|Invalid control character"
    r"|cannot identify image file|broken data stream|unrecognized data stream|image file is truncated|decoder"
    r"|not enough image data|BadZipFile|not a zip file|Bad magic number|Bad CRC|central directory|Truncated file header"
    r"|while parsing|while scanning|mapping values are not|did not find expected|could not find expected"
    r"|found character|special characters are not allowed|no element found|not well-formed|mismatched tag"
    r"|Ran out of input|could not find MARK|invalid start byte|invalid continuation byte|math domain"
    r"|unsupported operand",
)
# A message says what to do, in one of these words.
REMEDY = re.compile(
    r"\b(give|get|check|correct|choose|copy|save|name|fetch|use|run|write|delete|remove|convert|did you mean|put"
    r"|export|see|unpack|add|lower|pass|set|make|evaluate|repair|change|replace|install|download|leave out|draw|drop"
    r"|take|restore|keep|open|shorten|finish|move|describe|scale)\b",
    re.IGNORECASE,
)


def write(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def is_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for index in range(8, len(content), max(1, len(content) // 9)):
        content[index] ^= 0xFF
    path.write_bytes(bytes(content))


def unreadable(path: Path) -> None:
    path.chmod(0)


def other_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


def weights_of_another(path: Path) -> None:
    save_file({"a": torch.zeros(2, 3)}, path)


def an_image(path: Path) -> None:
    Image.new("RGB", (5, 4)).save(path, format="PNG")


GENERAL = {
    "missing": lambda path: path.unlink(),
    "empty": write(b""),
    "folder": is_folder,
    "junk": write(bytes(np.random.default_rng(0).integers(0, 256, 999, dtype=np.uint8))),
    "zeros": write(bytes(999)),
    "latin-1": write("café à la carte".encode("latin-1")),
    "utf-16": write('{"a": 1}'.encode("utf-16")),
    "truncated": truncated,
    "flipped": flipped,
    "unreadable": unreadable,
    "pickle": other_pickle,
    "image": an_image,
    "html": write(b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
    "lfs pointer": write(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"),
}
JSON = {
    f"json {text[:12]}": write(text.encode())
    for text in ("[]", "{}", "5", "null", '"x"', "[1, 2]", '{"a": 1}', "[" * 5000, "[null]", "[[]]", '{"images": 5}')
}
CLASSES = {"0": "cat", "1": "dog", "2": "tree"}
ROOT = os.geteuid() == 0 if hasattr(os, "geteuid") else True


def exported_folder(model: Path, folder: Path) -> None:
    """A folder as `hf-segvit export` writes it, but for the graph, which no runtime can read."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "exported": "onnx"}))
    (folder / "model.onnx").write_bytes(bytes(100))
    graph = GraphRecord({"model.onnx": 100}, ["pixel_values"], ["class_queries_logits", "masks_queries_logits"], 16)
    record = ExportRecord("onnx", {"model": graph}, 1e-3, [], {})
    (folder / "export.json").write_text(json.dumps(record.content()))


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """Models, data and images that all commands work with."""
    root = tmp_path_factory.mktemp("originals")
    labels = {0: "cat", 1: "dog", 2: "tree"}
    names = {name: label for label, name in labels.items()}
    tiny_eomt(id2label=labels, label2id=names, intermediate_size=64).save_pretrained(root / "model")
    EoMTImageProcessor(task="semantic", size=64).save_pretrained(root / "model")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = ViTPConfig(**sizes, image_size=56, id2label=labels, label2id=names)
    ViTPForPointClassification(config).save_pretrained(root / "points")
    ViTPImageProcessor(size={"height": 56, "width": 56}, patch_size=14, id2label=labels).save_pretrained(
        root / "points"
    )
    mask_folder(root / "masks", ("one", "two"), classes=CLASSES)
    mask_folder(root / "masks", ("three",), split="val", classes=CLASSES)
    write_image(root / "masks/images/val/three.jpg", seed=9)  # no copy of one for training
    coco_folder(root / "coco")
    panoptic_folder(root / "panoptic")
    yolo = root / "yolo"
    for split in ("train", "val"):
        (yolo / "labels" / split).mkdir(parents=True)
        (yolo / "images" / split).mkdir(parents=True)
        write_image(yolo / "images" / split / "a.png", seed=len(split))
        (yolo / "labels" / split / "a.txt").write_text("0 0.1 0.1 0.9 0.1 0.9 0.9\n")
    write_image(yolo / "images/train/b.png", seed=1)
    (yolo / "labels/train/b.txt").write_text("1 0.1 0.1 0.9 0.1 0.9 0.9\n")
    (yolo / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n")
    labelme = root / "labelme"
    labelme.mkdir()
    write_image(labelme / "a.png")
    shape = {"label": "cat", "points": [[0, 0], [4, 0], [4, 3]], "shape_type": "polygon", "flags": {}}
    size = Image.open(labelme / "a.png").size
    content = {"version": "5.0", "shapes": [shape], "imagePath": "a.png", "imageData": None}
    (labelme / "a.json").write_text(json.dumps({**content, "imageWidth": size[0], "imageHeight": size[1]}))
    write_image(root / "photo.png", size=(40, 30))
    (root / "recipe.yaml").write_text(
        "data: mask_folder:masks\ntask: semantic\nimage_size: 64\nsteps: 1\nbatch_size: 1\nnum_workers: 0\ndraw: 0\n"
        "trackers: []\noutput: run\ninit: model\n"
    )
    runs = root / "runs" / "one"
    runs.mkdir(parents=True)
    scores = {"mean_iou": 0.5}
    (runs / "results.json").write_text(
        json.dumps({"task": "semantic", "metrics": scores, "recipe": {}, "evaluations": [{"metrics": scores}]})
    )
    torch.save({"a": torch.zeros(2)}, root / "weights.pth")
    save_file({"a": torch.zeros(2)}, root / "weights.safetensors")
    assert main(["convert", "to-transformers", str(root / "model"), str(root / "stock")]) == 0
    exported_folder(root / "model", root / "exported")
    return root


@pytest.fixture(scope="module")
def working_copy(originals, tmp_path_factory) -> Path:
    """A copy for commands, which tests break and mend."""
    copy = tmp_path_factory.mktemp("working") / "in"
    shutil.copytree(originals, copy)
    return copy


@pytest.fixture
def root(working_copy, monkeypatch) -> Path:
    monkeypatch.chdir(working_copy)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return working_copy


EXPORT = "export model out --format onnx"
EXPORTED = "segment photo.png --model exported --device cpu --output out"
EVALUATE = "evaluate --model model --data mask_folder:masks --split val --device cpu"
SEGMENT = "segment photo.png --model model --device cpu --output out"
CLASSIFIED = f"{SEGMENT} --classifier points"
POINTS = "classify-points photo.png --model points --points 5,5 --device cpu"
TRAIN = "train recipe.yaml --cpu"
# Each command, and the files that it reads.
CASES = {
    EVALUATE: ("model/config.json", "model/preprocessor_config.json", "model/model.safetensors", "masks/classes.json"),
    f"{EVALUATE} ": ("masks/images/val/three.jpg", "masks/annotations/val/three.png"),
    SEGMENT: ("photo.png", "model/config.json", "model/preprocessor_config.json", "model/model.safetensors"),
    CLASSIFIED: ("points/config.json", "points/preprocessor_config.json", "points/model.safetensors"),
    POINTS: ("photo.png", "points/config.json", "points/preprocessor_config.json", "points/model.safetensors"),
    TRAIN: ("recipe.yaml", "model/config.json", "model/model.safetensors", "masks/classes.json"),
    f"{TRAIN} ": ("masks/images/train/one.jpg", "masks/annotations/train/one.png", "model/preprocessor_config.json"),
    "check-data mask_folder:masks": (
        "masks/classes.json",
        "masks/annotations/train/one.png",
        "masks/images/train/one.jpg",
    ),
    "check-data coco_folder:coco": ("coco/annotations/*.json", "coco/train/a.jpg"),
    "check-data coco_folder:panoptic --task panoptic": ("panoptic/annotations/*.json", "panoptic/annotations/*/*.png"),
    "check-data yolo:yolo": ("yolo/data.yaml", "yolo/labels/train/a.txt", "yolo/images/train/a.png"),
    "check-data labelme:labelme": ("labelme/a.json", "labelme/a.png"),
    "check-data auto:coco": ("coco/annotations/*.json",),
    "convert to-transformers model out": ("model/config.json", "model/model.safetensors"),
    "convert official-eomt weights.pth out --model coco_panoptic_eomt_large_640": ("weights.pth",),
    "convert official-vit-p weights.safetensors out": ("weights.safetensors",),
    "convert timm weights.safetensors out --model vit_base_patch14_reg4_dinov2": ("weights.safetensors",),
    "convert transformers-eomt stock out": ("stock/config.json", "stock/model.safetensors"),
    EXPORT: ("model/config.json", "model/model.safetensors"),
    EXPORTED: ("exported/config.json", "exported/export.json", "exported/model.onnx"),
    "push model me/tiny --dry-run": (
        *("model/config.json", "model/preprocessor_config.json", "model/model.safetensors"),
    ),
    "compare runs/one": ("runs/one/results.json",),
}
PAIRS = [(words, file) for words, files in CASES.items() for file in files]


def complaints(words: list[str], root: Path, broken: Path, capsys, what: str) -> list[str]:
    """What is wrong with what a command says about a broken file."""
    capsys.readouterr()
    try:
        code = main(words)
    except SystemExit as error:  # argparse
        code = error.code
    except Exception as error:
        return [f"{what}: {type(error).__name__} escaped: {str(error)[:300]}"]
    said = capsys.readouterr()
    text = said.err + said.out
    found = []
    if code not in (0, 1, 2):
        found.append(f"{what}: exit code {code}")
    if match := LIBRARY_TEXTS.search(text):
        found.append(f"{what}: says {match[0]!r}: {text.strip()[-600:]}")
    if code == 0:
        return found
    # The file, or where none is left the folder that should have it.
    names = {broken.name, f"the recipe {broken.stem!r}"}
    if not broken.is_file():
        names |= {f"{broken.stem}.", *map(str, broken.relative_to(root).parents)} - {"."}
    lines = [line for line in text.splitlines() if any(name in line for name in names)]
    if not lines:
        found.append(f"{what}: does not name {broken.name}: {text.strip()[-600:]}")
    elif not any(REMEDY.search(line.partition("error:")[2] or line) for line in lines):
        found.append(f"{what}: no remedy: {text.strip()[-600:]}")
    if max(map(len, text.splitlines()), default=0) > 3000:
        found.append(f"{what}: a line of {max(map(len, text.splitlines()))} characters")
    return found


def breakages_of(file: str) -> dict[str, Callable[[Path], None]]:
    """Each way in which a file is broken."""
    found = GENERAL | (JSON if file.endswith(("json", "yaml")) else {})
    if file.endswith(".safetensors"):
        found["weights of another"] = weights_of_another
    if ROOT:
        del found["unreadable"]  # nothing is unreadable to root
    return found


def walk(words: str, file: str, breakages: dict[str, Callable[[Path], None]], root, originals, capsys) -> list[str]:
    """Run a command once for each breakage of a file, which is mended afterwards."""
    (path,) = sorted(root.glob(file))[:1]
    relative = path.relative_to(root)
    found = []
    for name, damage in breakages.items():
        damage(path)
        for output in ("out", "run"):
            shutil.rmtree(root / output, ignore_errors=True)
        found += complaints(words.split(), root, path, capsys, f"{words}, {relative} {name}")
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(originals / relative, path)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("words", "file"), PAIRS, ids=[f"{words.split()[0]}-{file}" for words, file in PAIRS])
def test_every_message_names_the_file_and_a_remedy(root, originals, capsys, words, file):
    found = walk(words, file, breakages_of(file), root, originals, capsys)
    assert not found, "\n".join(found)


def test_messages_of_a_sample_name_the_file_and_a_remedy(root, originals, capsys):
    """A breakage for each pair of command and file, another for each, so that all occur."""
    found = []
    for index, (words, file) in enumerate(PAIRS):
        if words.startswith(("train", "evaluate")) and index % 3:
            continue  # which take longer
        breakages = list(breakages_of(file).items())
        name, damage = breakages[index * 5 % len(breakages)]
        found += walk(words, file, {name: damage}, root, originals, capsys)
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for words in CASES if words not in (EXPORT, EXPORTED)])
def test_commands_work_on_sound_files(root, capsys, words):
    for output in ("out", "run"):
        shutil.rmtree(root / output, ignore_errors=True)
    refused = words.startswith(("convert official", "convert timm"))  # weights of no released model
    assert main(words.split()) == (2 if refused else 0), capsys.readouterr().err


WORDS = {
    "nothing there": ("nowhere", "nowhere"),
    "a file for a folder": ("photo.png", "photo.png"),
    "a name that is too long": ("x" * 300, "xxx"),
    "an unknown user": ("~nobody-of-this-name/x", "nobody-of-this-name"),
    "a null": ("a\0b", "a"),
}


# Each command, with a path of `WORDS` in turn in place of the braces.
PATHS = (
    "evaluate --model {} --data mask_folder:masks",
    "evaluate --model model --data mask_folder:{}",
    "segment {} --model model --output out",
    "segment photo.png --model {} --output out",
    "segment photo.png --model model --output {}/x",
    "segment photo.png --model model --output out --classifier {}",
    "classify-points {} --model points --points 5,5",
    "classify-points photo.png --model {} --points 5,5",
    *(f"check-data {name}:{{}}" for name in ("mask_folder", "auto", "coco_folder", "yolo", "labelme")),
    "train {}",
    "train recipe.yaml init={}",
    "train recipe.yaml data=mask_folder:{}",
    "train recipe.yaml output={}/x",
    "train --replay {}",
    "convert official-eomt {} out --model coco_panoptic_eomt_large_640",
    "convert to-transformers {} out",
    "convert official-vit-p {} out",
    "convert to-transformers model {}/x",
    "push {} me/tiny --dry-run",
    "compare {}",
    "demo --output {}/x --steps 1",
)


@pytest.mark.parametrize("words", PATHS)
def test_every_path_that_leads_nowhere_is_told(root, capsys, words):
    found = []
    for what, (path, name) in WORDS.items():
        if (what == "nothing there" and "{}/x" in words) or (path == "photo.png" and " {} --model" in words):
            continue  # is made, and is what the command asks for
        capsys.readouterr()
        try:
            code = main([word.format(path) for word in words.split()])
        except SystemExit as error:
            code = error.code
        except Exception as error:
            found.append(f"{what}: {type(error).__name__} escaped: {str(error)[:300]}")
            continue
        text = capsys.readouterr().err
        if code not in (1, 2):
            found.append(f"{what}: exit code {code}")
        if match := LIBRARY_TEXTS.search(text):
            found.append(f"{what}: says {match[0]!r}: {text[-500:]}")
        if name not in text:
            found.append(f"{what}: does not name {name}: {text[-500:]}")
        if not REMEDY.search(text.partition("error:")[2] or text):
            found.append(f"{what}: no remedy: {text[-500:]}")
    assert not found, f"{words}\n" + "\n".join(found)
