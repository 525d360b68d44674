"""Presets that trade quality for speed, larger patches and smaller inputs: from a foreign backbone to segments."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch.utils.flop_counter import FlopCounterMode

from hf_segvit.cli import main
from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation
from hf_segvit.models.modeling_plain_vit import PlainViTModel
from hf_segvit.training.derivation import model_fields
from hf_segvit.training.loop import train
from hf_segvit.training.recipe import find_recipe, flat, load_recipe, packaged_recipes

from .tiny_models import randomize
from .tiny_training import tiny_recipe

PRESETS = {
    "fast_ade20k_semantic_large_512_patch32": ("ade20k_semantic_large_512", {"model_config"}),
    "fast_coco_panoptic_large_640_patch32": ("coco_panoptic_large_640", {"model_config"}),
    "fast_coco_panoptic_large_448": ("coco_panoptic_large_640", {"image_size"}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch_size", "image_size", "cells"), [(32, 64, 16), (16, 48, 12)], ids=["patches of 32", "smaller input"]
)
def test_from_a_foreign_backbone_to_segments(patch_size, image_size, cells, tmp_path, capsys) -> None:
    name = "vit_tiny_patch16_224"
    source = randomize(timm.create_model(name, num_classes=0))
    save_file(source.state_dict(), tmp_path / "tiny.safetensors")
    sizes = ["--set", f"patch_size={patch_size}", f"image_size={image_size}"]
    arguments = ["convert", "timm", str(tmp_path / "tiny.safetensors"), str(tmp_path / "backbone"), "--model", name]
    assert main([*arguments, *sizes]) == 0
    assert f"resampled to image_size={image_size}, patch_size={patch_size}" in capsys.readouterr().out
    backbone = PlainViTModel.from_pretrained(tmp_path / "backbone")
    side = image_size // patch_size
    assert backbone.config.grid_size == (side, side)
    # What timm makes of its own weights at this size.
    kernel = resample_patch_embed(source.patch_embed.proj.weight.detach(), [patch_size, patch_size])
    table = resample_abs_pos_embed(source.pos_embed.detach(), (side, side))
    torch.testing.assert_close(backbone.embeddings.patch_embeddings.projection.weight, kernel, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(backbone.embeddings.position_embeddings.weight, table[0, 1:], rtol=1e-4, atol=1e-4)

    recipe = tiny_recipe(
        tmp_path / "run",
        backbone=str(tmp_path / "backbone"),
        model_config={"num_queries": 7, "num_query_layers": 2, "train_num_points": 32},
        image_size=image_size,
        steps=1,
        warmup_steps=[0],
        save_every_steps=1,
    )
    assert train(recipe, cpu=True, progress=False).step == 1
    model = EoMTForUniversalSegmentation.from_pretrained(tmp_path / "run" / "model")
    assert (model.config.patch_size, model.config.image_size) == (patch_size, image_size)
    trained = model.eomt.embeddings.patch_embeddings.projection.weight
    assert trained.shape == kernel.shape
    assert not torch.equal(trained, backbone.embeddings.patch_embeddings.projection.weight)
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, image_size, image_size)).masks_queries_logits.shape[-2:] == (cells, cells)
    Image.new("RGB", (70, 50), (200, 30, 90)).save(tmp_path / "image.png")
    command = ["segment", str(tmp_path / "image.png"), "--model", str(tmp_path / "run" / "model")]
    assert main([*command, "--output", str(tmp_path / "out"), "--task", "semantic", "--device", "cpu"]) == 0
    with Image.open(tmp_path / "out" / "image.semantic.png") as segmented:
        assert segmented.size == (70, 50)
    listed = json.loads((tmp_path / "out" / "image.segments.json").read_text())
    assert sum(segment["area"] for segment in listed["segments"]) == 70 * 50


def test_a_backbone_takes_the_patches_of_the_recipe(tmp_path) -> None:
    source = randomize(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64))
    model = EoMTForUniversalSegmentation.from_backbone(source, image_size=64, patch_size=32, num_labels=3)
    kernel = resample_patch_embed(source.patch_embed.proj.weight.detach(), [32, 32])
    torch.testing.assert_close(model.eomt.embeddings.patch_embeddings.projection.weight, kernel, rtol=1e-4, atol=1e-4)
    assert model.config.num_upscale_blocks == 3


def test_presets_differ_from_their_recipe_in_what_they_say() -> None:
    assert sorted(PRESETS) == [name for name in packaged_recipes() if name.startswith("fast_")]
    for name, (base, changed) in PRESETS.items():
        fields, before = flat(load_recipe(name)), flat(load_recipe(base))
        different = {field for field in fields if fields[field] != before[field]} - {"name", "output"}
        assert different == changed, name


@torch.no_grad()
def multiply_adds(name: str) -> float:
    """Billions of an input, by the recipe."""
    recipe = load_recipe(name)
    fields = {"num_labels": 150 if recipe.task == "semantic" else 133, **model_fields(recipe, 24)}
    with torch.device("meta"):
        model = EoMTForUniversalSegmentation(EoMTConfig(image_size=recipe.image_size, masked_attention=False, **fields))
        with FlopCounterMode(display=False) as flops:
            model.eval()(torch.zeros(1, 3, recipe.image_size, recipe.image_size))
    return flops.get_total_flops() / 2e9


@pytest.mark.parametrize("name", PRESETS)
def test_the_multiply_adds_of_the_head_comment(name) -> None:
    text = Path(find_recipe(name)).read_text()
    ours, before = map(int, re.search(r"(\d+) instead of (?:the )?(\d+) billion", text).groups())
    assert (round(multiply_adds(name)), round(multiply_adds(PRESETS[name][0]))) == (ours, before)
