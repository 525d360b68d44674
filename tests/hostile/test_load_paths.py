"""What loading never does: open a pickle, run code of a checkpoint, use the network for a folder, or build any size."""

import builtins
import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForUniversalSegmentation, Mask2FormerImageProcessor

from hf_segvit.cli import main
from hf_segvit.inference.loading import load_fused_model, load_point_classifier, load_universal_model
from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation, EoMTModel
from hf_segvit.models.modeling_vit_p import ViTPForPointClassification
from hf_segvit.models.modeling_vit_p_fusion import ViTPFusionForUniversalSegmentation

from ..tiny_generators import LABELS, tiny_classifier, tiny_generator
from ..tiny_models import tiny_eomt

WEIGHTS = "model.safetensors"


@pytest.fixture
def folders(tmp_path):
    """An EoMT, a Mask2Former, a ViT-P and an image."""
    tiny_generator("segvit_eomt").save_pretrained(tmp_path / "eomt")
    EoMTImageProcessor(size=64, num_labels=5, stuff_classes=[0, 1]).save_pretrained(tmp_path / "eomt")
    tiny_generator("mask2former").save_pretrained(tmp_path / "mask2former")
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "mask2former")
    tiny_classifier().save_pretrained(tmp_path / "vit_p")
    ViTPImageProcessor(size=56, patch_size=14, id2label=LABELS).save_pretrained(tmp_path / "vit_p")
    Image.new("RGB", (40, 30), "grey").save(tmp_path / "image.png")
    return tmp_path


@pytest.fixture
def no_pickles(monkeypatch):
    """Every way to open a pickle fails the test."""

    def refuse(*args, **kwargs):
        pytest.fail("a pickle was opened")

    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, refuse)


@pytest.fixture
def no_network(monkeypatch):
    """Every connection and look-up of a name fails the test, though the Hub may be asked."""

    def refuse(*args, **kwargs):
        pytest.fail("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def pickled(folder: Path) -> Path:
    """The same folder with its weights as a pickle only."""
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


def edit(folder: Path, name: str = "config.json", **fields) -> Path:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | fields))
    return folder


LOADERS = {
    "EoMTForUniversalSegmentation": ("eomt", EoMTForUniversalSegmentation.from_pretrained),
    "EoMTModel": ("eomt", EoMTModel.from_pretrained),
    "ViTPForPointClassification": ("vit_p", ViTPForPointClassification.from_pretrained),
    "AutoModel of ours": ("eomt", AutoModelForUniversalSegmentation.from_pretrained),
    "load_universal_model": ("mask2former", load_universal_model),
    "load_point_classifier": ("vit_p", load_point_classifier),
    "generator": (
        "mask2former",
        lambda folder: ViTPFusionForUniversalSegmentation.from_generator_and_classifier(folder, tiny_classifier()),
    ),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_pickle_is_refused_unopened(loader, folders, no_pickles):
    kind, load = LOADERS[loader]
    folder = pickled(folders / kind)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*hf-segvit convert"):
        load(str(folder))


def test_use_safetensors_cannot_be_switched_off(folders, no_pickles):
    with pytest.raises(ValueError, match=r"use_safetensors=False.*hf-segvit convert"):
        EoMTForUniversalSegmentation.from_pretrained(folders / "eomt", use_safetensors=False)


@pytest.mark.parametrize("kind", ["eomt", "mask2former"])
def test_a_configuration_cannot_name_a_pickle(kind, folders, no_pickles):
    torch.save(load_file(folders / kind / WEIGHTS), folders / kind / "adapter_model.bin")
    edit(folders / kind, transformers_weights="adapter_model.bin")
    with pytest.raises(ValueError, match=r"config\.json: transformers_weights is 'adapter_model.bin'"):
        load_universal_model(str(folders / kind))


def commands(folders: Path) -> list[list[str]]:
    model, classifier, image = (str(folders / name) for name in ("mask2former", "vit_p", "image.png"))
    output = str(folders / "output")
    return [
        ["segment", image, "--model", str(folders / "eomt"), "--output", output + "1"],
        ["segment", image, "--model", model, "--classifier", classifier, "--output", output + "2"],
        ["evaluate", "--model", model, "--data", "generated:easy?num_scenes=2", "--output", output + "3"],
        ["classify-points", image, "--model", classifier, "--point", "3,4"],
    ]


@pytest.mark.parametrize("index", range(4))
def test_commands_open_no_pickle_and_no_socket(index, folders, no_pickles, no_network, capsys):
    command = commands(folders)[index]
    # The data has other classes than the model, which is said once the model is loaded.
    assert main(command) == (2 if command[0] == "evaluate" else 0)
    capsys.readouterr()
    pickled(Path(command[command.index("--model") + 1]))
    assert main([f"{part}-again" if part.startswith(str(folders / "output")) else part for part in command]) == 2
    assert "hf-segvit convert" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_pretrained_backbone", True), ("attn_implementation", "kernels-community/flash-attn")],
)
def test_a_configuration_cannot_fetch(field, value, folders, no_network):
    with pytest.raises(ValueError, match=rf"config\.json: {field} is"):
        load_universal_model(str(edit(folders / "mask2former", **{field: value})))


def test_a_named_backbone_is_not_fetched(folders, no_network):
    edit(folders / "mask2former", backbone="microsoft/resnet-50", backbone_config=None, use_timm_backbone=False)
    with pytest.raises(ValueError, match=r"config\.json: backbone is 'microsoft/resnet-50'"):
        load_universal_model(str(folders / "mask2former"))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("kind", ["eomt", "mask2former"])
def test_no_code_of_a_checkpoint_runs(kind, name, folders, monkeypatch):
    """Even where stdin would say yes to Transformers' question."""
    monkeypatch.setattr(builtins, "input", lambda *args: "y")
    (folders / kind / "evil.py").write_text(f"open({str(folders / 'ran')!r}, 'w')\nclass Evil: pass\n")
    fields = {"auto_map": dict.fromkeys(("AutoConfig", "AutoImageProcessor", "AutoModel"), "evil.Evil")}
    fields |= {"model_type": "unknown"} if name == "config.json" else {"image_processor_type": "Evil"}
    edit(folders / kind, name, **fields)
    with contextlib.suppress(ValueError):
        load_universal_model(str(folders / kind))
    with contextlib.suppress(ValueError):
        load_fused_model(str(folders / kind), str(folders / "vit_p"))
    assert not (folders / "ran").exists()


def adapter(folder: Path, **fields) -> Path:
    """A LoRA of rank 2 on one layer of an EoMT's first block, beside it."""
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(settings | fields))
    name = "base_model.model.eomt.layers.0.attention.q_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.zeros(2, 32), name.format("B"): torch.zeros(32, 2)}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(a+)+$"},
        {"r": 10**9},
        {"r": 3},
        {"r": "2"},
        {"peft_type": "XLORA"},
        {"rank_pattern": {"(a+)+$": 4}},
        {"layers_pattern": "(a+)+$"},
        {"megatron_config": {"a": 1}},
        {"init_lora_weights": "eva"},
        {"lora_dropout": 2},
    ],
)
def test_adapters_are_plain_lora(fields, folders):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=rf"adapter_config\.json.*{next(iter(fields))}"):
        EoMTForUniversalSegmentation.from_pretrained(adapter(folders / "eomt", **fields))


def test_a_pickled_adapter_is_refused(folders, no_pickles):
    pytest.importorskip("peft")
    folder = adapter(folders / "eomt")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors.*hf-segvit convert"):
        EoMTForUniversalSegmentation.from_pretrained(folder)


def test_a_plain_adapter_loads(folders):
    pytest.importorskip("peft")
    model = EoMTForUniversalSegmentation.from_pretrained(adapter(folders / "eomt"))
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 4


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_weights_are_floating_point(dtype, folders):
    path = folders / "eomt" / WEIGHTS
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor '.*' has the dtype (I64|BOOL|F8_E4M3)"):
        EoMTForUniversalSegmentation.from_pretrained(folders / "eomt")


def with_header(path: Path, change) -> None:
    """Rewrite the header of a safetensors file as text."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + length])
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


EMPTY = b'{"z":{"dtype":"F32","shape":[0,1000000000000],"data_offsets":[0,0]},'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header + b" " * 2_000_000, "white space"),
        (lambda header: header.replace(b"{", EMPTY, 1), "no elements"),
        (lambda header: header.replace(b'{"format":"pt"}', b"[]", 1), "__metadata__"),
        (lambda header: header.replace(b"eomt", b"eom\xff", 1), "cannot be read"),
        (lambda header: b"[]", "holds a list"),
        (lambda header: b"3", "holds a number"),
        (lambda header: b'{"' + b"q" * 10_000_000 + b'":3,' + header[1:], r"\(10000000 characters\) lacks"),
    ],
    ids=["padded", "empty tensor", "metadata", "not UTF-8", "list", "number", "long name"],
)
def test_headers_are_checked(change, message, folders):
    path = folders / "eomt" / WEIGHTS
    with_header(path, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_universal_model(str(folders / "eomt"))
    assert WEIGHTS in str(caught.value) or "eomt" in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("index", ["absolute", "outside", "twice", "no metadata", "list", "pipe"])
def test_indexes_are_checked(index, folders):
    folder = folders / "eomt"
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / "a.safetensors")
    save_file(tensors, folders / "outside.safetensors")
    places = dict.fromkeys(tensors, "a.safetensors")
    first = next(iter(places))
    content = {"metadata": {}, "weight_map": places}
    if index == "absolute":
        places[first] = str(folders / "outside.safetensors")
    elif index == "outside":
        places[first] = "../outside.safetensors"
    elif index == "twice":
        save_file({first: tensors[first]}, folder / "b.safetensors")
        places[first] = "b.safetensors"
    elif index == "no metadata":
        del content["metadata"]
    elif index == "list":
        content = [content]
    else:
        os.mkfifo(folder / "pipe.safetensors")
        places[first] = "pipe.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        EoMTForUniversalSegmentation.from_pretrained(folder)


BOUNDED = """
import resource, sys, json
limit = 6 * 2**30
import torch
from hf_segvit.inference.loading import load_universal_model
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for fields in json.loads(sys.argv[2]):
    path = sys.argv[1] + "/config.json"
    original = open(path).read()
    open(path, "w").write(json.dumps(json.loads(original) | fields))
    try:
        load_universal_model(sys.argv[1])
    except ValueError as error:
        print(json.dumps([next(iter(fields)), str(error)]))
    open(path, "w").write(original)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eomt", "mask2former"])
def test_sizes_are_those_of_the_weights(kind, folders):
    """Whatever one configuration says, loading takes little memory; measured in a process with a limit."""
    sizes = (10**5, 10**9, 10**12)
    names = ["num_hidden_layers", "num_upscale_blocks", "num_queries", "image_size", "num_channels", "hidden_size"]
    names += ["num_register_tokens", "num_query_layers", "patch_size", "intermediate_size", "num_labels"]
    if kind == "mask2former":
        names = ["decoder_layers", "encoder_layers", "hidden_dim", "num_queries", "dim_feedforward", "feature_size"]
    fields = [{name: size} | ({"id2label": None} if name == "num_labels" else {}) for name in names for size in sizes]
    run = subprocess.run(
        [sys.executable, "-c", BOUNDED, str(folders / kind), json.dumps(fields)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    *refused, grown = run.stdout.splitlines()
    assert len(refused) == len(fields)
    assert all("config.json" in line for line in refused)
    assert int(grown) < 1_500_000  # KiB


def test_a_kernel_may_be_asked_for_in_python(folders):
    """Only then is it Transformers that decides."""
    with pytest.raises((ImportError, ValueError, OSError)) as caught:
        EoMTForUniversalSegmentation.from_pretrained(folders / "eomt", attn_implementation="somebody/kernel")
    assert "remove it from the file" not in str(caught.value)


def test_pipes_and_claims_of_pickles_are_refused(tmp_path):
    from hf_segvit.conversion.checkpoint_files import find_checkpoint, read_checkpoint

    os.mkfifo(tmp_path / "pipe.bin")
    with pytest.raises(ValueError, match="no regular file"):
        find_checkpoint(tmp_path / "pipe.bin")

    class Claim:
        def __reduce__(self):
            return bytearray, (4 * 10**9,)

    torch.save({"a": Claim()}, tmp_path / "claim.bin", pickle_protocol=2)
    with pytest.raises(ValueError, match=r"claim\.bin: this pickle makes byte arrays"):
        read_checkpoint(tmp_path / "claim.bin")
    torch.save({"blocks.1000000000.a": torch.zeros(1)}, tmp_path / "blocks.bin")
    with pytest.raises(ValueError, match=r"blocks\.bin: 'blocks\.1000000000\.a' has a number beyond"):
        read_checkpoint(tmp_path / "blocks.bin")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_cannot_claim_storages(zipped, tmp_path):
    """A small file whose storage says that it has two billion numbers."""
    from hf_segvit.conversion.checkpoint_files import read_checkpoint

    path = tmp_path / "claim.bin"
    torch.save({"a": torch.zeros(200)}, path, _use_new_zipfile_serialization=zipped)
    number, claim = b"K\xc8", b"J" + (2 * 10**9).to_bytes(4, "little")
    if zipped:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content.replace(number, claim) if name.endswith("data.pkl") else content)
    else:
        assert path.read_bytes().count(number) == 2
        path.write_bytes(path.read_bytes().replace(number, claim))
    size = path.stat().st_size
    with pytest.raises(ValueError, match=rf"its tensors claim 8000000000 bytes, but the file has {size}"):
        read_checkpoint(path)


def test_what_loads_still_loads(folders):
    """Plain use of Transformers is as before: other classes, other sizes, round trips."""
    folder = folders / "eomt"
    model = EoMTForUniversalSegmentation.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    assert model.class_predictor.weight.shape == (4, 32)
    model.save_pretrained(folders / "again")
    again = AutoModelForUniversalSegmentation.from_pretrained(folders / "again")
    assert torch.equal(again.class_predictor.weight, model.class_predictor.weight)
    tiny_eomt().save_pretrained(folders / "shards", max_shard_size="20KB")
    assert len(list((folders / "shards").glob("*.safetensors"))) > 1
    EoMTForUniversalSegmentation.from_pretrained(folders / "shards")
    assert EoMTConfig.from_pretrained(folder).num_queries == 7
