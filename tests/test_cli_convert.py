"""`hf-segvit convert`: every kind from the command line, and every bad input as one clean line with nothing written."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import EomtConfig, EomtForUniversalSegmentation, EomtImageProcessor

from hf_segvit.cli import convert as command
from hf_segvit.cli import main
from hf_segvit.conversion import sources as convert_sources
from hf_segvit.conversion.backbones import image_normalization
from hf_segvit.conversion.kinds import KINDS
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation
from hf_segvit.models.modeling_plain_vit import PlainViTModel

from .official_files import official_state_dict
from .tiny_models import randomize, tiny_eomt

HEADS = ["--set", "num_attention_heads=2"]


@pytest.fixture
def official(tmp_path):
    """A file of the official code, with the model that it was made from."""
    model = tiny_eomt(masked_attention_probabilities=[0.0, 0.0])
    torch.save(official_state_dict(model), tmp_path / "official.bin")
    return tmp_path / "official.bin", model


@pytest.fixture
def upstream(tmp_path):
    """A folder that Transformers wrote."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2}
    config = EomtConfig(**sizes, image_size=64, num_blocks=2, num_queries=7, num_labels=19)
    model = randomize(EomtForUniversalSegmentation(config))
    model.attn_mask_probs.copy_(torch.tensor([0.0, 1.0]))
    folder = tmp_path / "upstream"
    model.save_pretrained(folder)
    EomtImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}, do_pad=True).save_pretrained(folder)
    return folder


def run(*words) -> int:
    return main(["convert", *map(str, words)])


def test_official_to_ours_to_transformers_and_back(official, tmp_path, capsys):
    source, model = official
    assert run("official-eomt", source, tmp_path / "ours", "--task", "panoptic", *HEADS) == 0
    printed = capsys.readouterr().out
    assert "8 tensors  eomt.layers.*.attention.q_proj" in printed  # weight and bias of four blocks
    assert "left out criterion.empty_weight" in printed
    assert "the 5 classes have no names" in printed
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
    }
    assert run("to-transformers", tmp_path / "ours", tmp_path / "theirs") == 2  # an MLP of 1.5 times the width
    assert "intermediate_size=48 with hidden_size=32" in capsys.readouterr().err
    ours = EoMTForUniversalSegmentation.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_transformers_to_ours_and_back(upstream, tmp_path, capsys):
    assert run("transformers-eomt", upstream, tmp_path / "ours", "--labels", "cityscapes") == 0
    assert "checked: outputs equal those of Transformers' model" in capsys.readouterr().out
    ours = EoMTForUniversalSegmentation.from_pretrained(tmp_path / "ours")
    assert ours.config.id2label[0] == "road"
    assert EoMTImageProcessor.from_pretrained(tmp_path / "ours").stuff_classes == list(range(11))
    assert run("to-transformers", tmp_path / "ours", tmp_path / "back") == 0
    assert "checked" in capsys.readouterr().out
    before, after = (load_file(folder / "model.safetensors") for folder in (upstream, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_task_given_for_a_foreign_folder_is_kept(upstream, tmp_path):
    assert run("transformers-eomt", upstream, tmp_path / "ours", "--task", "semantic", "--no-check") == 0
    processor = EoMTImageProcessor.from_pretrained(tmp_path / "ours")
    assert (processor.task, processor.do_split_image) == ("semantic", True)


def test_a_timm_file_becomes_a_backbone(tmp_path, capsys):
    name = "vit_tiny_patch16_224"
    model = randomize(timm.create_model(name, img_size=64, num_classes=3))
    state_dict = model.state_dict()
    save_file(state_dict, tmp_path / "small.safetensors")
    # The name stands for a model of 224 pixels.
    assert run("timm", tmp_path / "small.safetensors", tmp_path / "out", "--model", name) == 2
    assert "'pos_embed' has shape (1, 17, 192) instead of (1, 197, 192)" in capsys.readouterr().err
    model = randomize(timm.create_model(name, num_classes=3)).eval()
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    sizes = ["--set", "image_size=64,96", "patch_size=8"]
    assert run("timm", tmp_path / "tiny.safetensors", tmp_path / "out", "--model", name, *sizes) == 0
    printed = capsys.readouterr().out
    assert "left out head.weight: classifier" in printed
    assert "checked: outputs equal those of timm VisionTransformer" in printed
    assert "resampled to image_size=[64, 96], patch_size=8" in printed
    backbone = PlainViTModel.from_pretrained(tmp_path / "out")
    assert backbone.config.grid_size == (8, 12)
    assert backbone.embeddings.position_embeddings.weight.shape == (96, 192)
    assert image_normalization(tmp_path / "out") == ([0.5] * 3, [0.5] * 3)  # ViT augreg's, not ImageNet's


def test_a_published_timm_name_is_loaded_by_timm(tmp_path, monkeypatch):
    asked = []

    def create_model(name, pretrained=False, **kwargs):
        asked.append((name, pretrained))
        return randomize(right(name.partition(".")[0], pretrained=False, **kwargs))

    right = timm.create_model
    monkeypatch.setattr(convert_sources.timm, "create_model", create_model)
    assert run("timm", "timm/vit_tiny_patch16_224.augreg_in21k", tmp_path / "out") == 0
    assert asked == [("vit_tiny_patch16_224.augreg_in21k", True)]
    assert PlainViTModel.from_pretrained(tmp_path / "out").config.hidden_size == 192


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["offical-eomt", "SRC", "DST"], "unknown kind 'offical-eomt'; did you mean official-eomt?"),
        (["x", "SRC", "DST"], "choose one of timm, official-eomt, transformers-eomt, to-transformers"),
        (["official-eomt", "nothing.bin", "DST", "--task", "panoptic"], "neither a file nor a folder"),
        (["official-eomt", "SRC", "DST", *HEADS], "--task panoptic|instance|semantic"),
        (["official-eomt", "SRC", "DST", *HEADS, "--task", "panoptic", "--labels", "coco_panoptic"], "not 133"),
        (["official-eomt", "SRC", "DST", "--set", "num_heads=2"], "did you mean num_attention_heads"),
        (
            ["official-eomt", "SRC", "DST", "--model", "coco_panoptic_eomt_large"],
            "did you mean coco_panoptic_eomt_large",
        ),
        (["official-eomt", "SRC", "DST", "--max-gib", "1e-6", "--task", "panoptic"], "raise it with --max-gib"),
        (["official-eomt", "SRC", "DST", "--max-gib", "0"], "--max-gib 0.0 must be above 0"),
        (["official-eomt", "SRC", "SRC", "--task", "panoptic"], "is not a folder"),
        (["timm", "SRC", "DST", "--base", "x"], "--base has no effect for timm"),
        (["timm", "vit_tiny_patch16_225", "DST"], "did you mean vit_tiny_patch16_224"),
        (["timm", "vit_tiny_patch16_224", "DST", "--set", "num_queries=3"], "only image_size and patch_size"),
        (["timm", "SRC", "DST", "--model", "vit_tiny_patch16_224"], "does not hold the weights of timm's"),
        (
            ["to-transformers", "OURS", "DST", "--reset-class-head"],
            "--reset-class-head has no effect for to-transformers",
        ),
        (["transformers-eomt", "OURS", "DST"], "is of type 'segvit_eomt', not of Transformers' eomt"),
        (["transformers-eomt", "OURS", "DST", "--set", "image_size=64"], "--set has no effect"),
        (["to-transformers", "OURS", "OURS", "--overwrite"], "is the source"),
        (["to-transformers", "OURS", "OURS"], "--overwrite"),
    ],
)
def test_bad_requests_are_one_line_and_write_nothing(official, tmp_path, capsys, words, message):
    model = tiny_eomt()
    model.save_pretrained(tmp_path / "ours")
    EoMTImageProcessor(size=64).save_pretrained(tmp_path / "ours")
    places = {"SRC": official[0], "DST": tmp_path / "out", "OURS": tmp_path / "ours"}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(*(places.get(word, word) for word in words)) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-segvit convert: error: ")
    assert message in error
    assert "Traceback" not in error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("damage", ["truncated", "nan", "extra", "missing", "shape"])
def test_damaged_folders_of_transformers_are_refused(upstream, tmp_path, capsys, damage):
    path = upstream / "model.safetensors"
    weights = load_file(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        change = {
            "nan": {"layernorm.weight": torch.full((32,), float("nan"))},
            "extra": {"layers.9.norm1.weight": torch.zeros(32)},
            "missing": {},
            "shape": {"layernorm.weight": torch.zeros(16)},
        }[damage]
        if damage == "missing":
            del weights["layernorm.weight"]
        save_file({**weights, **change}, path, metadata={"format": "pt"})
    assert run("transformers-eomt", upstream, tmp_path / "out") == 2
    message = {
        "truncated": "cut short",
        "nan": "layernorm.weight holds NaN",
        "extra": "1 unknown to the model, such as 'eomt.layers.9.norm1.weight'",
        "missing": "1 parameters are missing, such as 'eomt.layernorm.weight'",
        "shape": "'eomt.layernorm.weight' has shape (16,) instead of (32,)",
    }[damage]
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pickled_weights_of_transformers_are_read_here_and_only_here(upstream, tmp_path, capsys):
    weights = load_file(upstream / "model.safetensors")
    (upstream / "model.safetensors").unlink()
    torch.save(weights, upstream / "pytorch_model.bin")
    with pytest.raises(ValueError, match="hf-segvit convert"):
        EoMTForUniversalSegmentation.from_pretrained(upstream)
    assert run("transformers-eomt", upstream, tmp_path / "out") == 0
    assert "checked: outputs equal" in capsys.readouterr().out
    ours = EoMTForUniversalSegmentation.from_pretrained(tmp_path / "out")
    assert torch.equal(ours.eomt.query.weight, weights["query.weight"])


def test_an_existing_model_is_replaced_on_request_only(official, tmp_path, capsys):
    words = ["official-eomt", official[0], tmp_path / "out", "--task", "panoptic", *HEADS]
    assert run(*words) == 0
    config = (tmp_path / "out" / "config.json").read_text()
    assert run(*words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(*words, "--overwrite", "--set", "masked_attention_probabilities=1") == 0
    changed = json.loads((tmp_path / "out" / "config.json").read_text())
    assert changed["masked_attention_probabilities"] == [1, 1]
    assert json.loads(config)["masked_attention_probabilities"] == [0.0, 0.0]


def test_a_failed_write_leaves_nothing(official, tmp_path, monkeypatch, capsys):
    def fail(self, folder, **kwargs):
        (Path(folder) / "preprocessor_config.json").write_text("{")
        raise OSError("No space left on device")

    monkeypatch.setattr(EoMTImageProcessor, "save_pretrained", fail)
    assert run("official-eomt", official[0], tmp_path / "out", "--task", "panoptic", *HEADS) == 2
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["official.bin"]


def test_the_help_lists_every_kind(capsys):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args(["convert", "--help"])
    printed = capsys.readouterr().out
    assert all(f"  {kind} " in printed for kind in KINDS)


def test_the_scripts_are_the_command(tmp_path):
    scripts = sorted((Path(__file__).parents[1] / "conversion").glob("*.py"))
    kinds = {json.loads(script.read_text().split('["convert", ')[1].split(",")[0]) for script in scripts}
    assert kinds == set(KINDS) - {"backbone", "mask2former-head", "vit-adapter"}
    result = subprocess.run(
        [sys.executable, scripts[0], "nothing.bin", tmp_path / "out", "--task", "panoptic"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2
    assert "nothing.bin is neither a file nor a folder" in result.stderr
