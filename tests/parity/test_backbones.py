"""Converted backbones compute what timm and Transformers compute: every family, from random weights.

Models are shrunken but keep what makes a family: its position embeddings, norms, MLP, biases and activation. All
parameters are random, so that no initial zero or one hides a mistake. The tolerance is 1e-4 of the largest token value;
differences seen are below 1e-6, and 0 where the order of sums is the same.
"""

import sys

import pytest
import timm
import torch
import transformers
from timm.layers import resample_patch_embed
from torch import nn
from torch.nn import functional as F

from hf_segvit.conversion.backbones import NOT_EXPRESSED, TIMM_FAMILIES, convert_backbone
from hf_segvit.conversion.key_maps import resample_patch_kernel
from hf_segvit.models.configuration_plain_vit import PlainViTConfig
from hf_segvit.models.modeling_plain_vit import PlainViTModel

# timm's name to what it shows that others do not.
TIMM_BACKBONES = {
    "vit_small_patch14_dinov2": "CLS position to fold",
    "vit_small_patch14_reg4_dinov2": "registers",
    "vit_giant_patch14_dinov2": "packed SwiGLU, CLS position to fold",
    "vit_giant_patch14_reg4_dinov2": "packed SwiGLU, registers",
    "deit3_small_patch16_224": "LayerScale, no CLS position",
    "vit_tiny_patch16_224.augreg_in21k": "no LayerScale",
    "vit_base_patch16_224.mae": "the same, pre-trained without labels",
    "vit_base_patch16_siglip_224.v2_webli": "no CLS token, pooling by attention",
    "vit_giantopt_patch16_siglip_256.v2_webli": "GELU by tanh",
    "vit_base_patch16_siglip_gap_224.v2_webli": "pooling by average",
    "vit_small_patch16_dinov3": "RoPE, no biases of queries, keys and values",
    "vit_small_patch16_dinov3_qkvb": "no bias of keys",
    "vit_small_plus_patch16_dinov3": "SwiGLU of separate matrices",
    "vit_7b_patch16_dinov3": "the same without biases",
    "eva02_tiny_patch14_224": "RoPE of interleaved pairs and learned positions, packed SwiGLU, norm behind the average",
    "eva02_base_patch14_224": "separate projections, norm in the SwiGLU",
    "eva02_large_patch14_448": "grid of 32 x 32 on a reference of 16",
    "eva02_base_patch16_clip_224": "norm in the attention",
    "vit_pe_core_base_patch16_224": "norm before the blocks, RoPE with columns first and an offset, bias of keys",
    "vit_pe_spatial_large_patch14_448": "no norm after the blocks",
    "vit_pe_spatial_gigantic_patch14_448": "neither CLS token nor offset, LayerScale",
}
TINY = {"depth": 2, "embed_dim": 96, "num_heads": 4, "num_classes": 0}


def randomize(model: nn.Module) -> nn.Module:
    """Random weights of a scale at which tokens neither vanish nor all attend to one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "token" not in name and "pos" not in name:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif "weight" in name or "gamma" in name or "lambda" in name:
                parameter.normal_(1.0, 0.3)
            else:
                parameter.normal_(std=0.5)
    return model.eval()


def tiny_timm(name: str, **overrides) -> nn.Module:
    return randomize(timm.create_model(name, **{**TINY, **overrides}))


def converted(source: object, **sizes) -> PlainViTModel:
    fields, state_dict = convert_backbone(source, **sizes)
    model = PlainViTModel._from_config(PlainViTConfig(**fields))
    model.load_state_dict(state_dict)
    return model.eval()


@torch.no_grad()
def timm_tokens(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """timm's own features; a norm that stands behind its average is put before it, where a plain ViT has one."""
    return model.fc_norm(model.forward_features(pixels))


@torch.no_grad()
def assert_same_tokens(ours: PlainViTModel, pixels: torch.Tensor, theirs: torch.Tensor) -> None:
    tokens = ours(pixels).last_hidden_state
    assert tokens.shape == theirs.shape
    assert theirs.std() > 0.1
    assert (tokens - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", TIMM_BACKBONES)
def test_timm_at_native_and_other_sizes(name: str) -> None:
    theirs = tiny_timm(name, dynamic_img_size=True)
    ours = converted(theirs)
    patch_size = ours.config.patch_size
    assert ours.config.grid_size == tuple(theirs.patch_embed.grid_size)
    for rows, columns in (ours.config.grid_size, (6, 6), (5, 9), (20, 3)):
        pixels = torch.randn(1, 3, rows * patch_size, columns * patch_size)
        assert_same_tokens(ours, pixels, timm_tokens(theirs, pixels))


def timm_at(native: nn.Module, name: str, **sizes) -> nn.Module:
    """timm's own way to weights of another size: a model made for it, and its filter of checkpoints."""
    model = tiny_timm(name, **sizes)
    filter_checkpoint = sys.modules[type(model).__module__].checkpoint_filter_fn
    model.load_state_dict(filter_checkpoint(dict(native.state_dict()), model))
    return model


@pytest.mark.parametrize("name", TIMM_BACKBONES)
@pytest.mark.parametrize("grid_size", [(7, 7), (4, 9)])
def test_timm_converted_for_another_size(name: str, grid_size: tuple[int, int]) -> None:
    native = tiny_timm(name)
    size = [cells * native.patch_embed.patch_size[0] for cells in grid_size]
    ours = converted(native, image_size=size)
    assert list(ours.config.image_height_width) == size
    pixels = torch.randn(1, 3, *size)
    assert_same_tokens(ours, pixels, timm_tokens(timm_at(native, name, img_size=size), pixels))


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch14_dinov2", "eva02_base_patch14_224"]
)
@pytest.mark.parametrize("size", [[160, 160], [96, 144]])
def test_timm_converted_for_another_patch_size(name: str, size: list[int]) -> None:
    native = tiny_timm(name)
    ours = converted(native, image_size=size, patch_size=16)
    pixels = torch.randn(1, 3, *size)
    assert_same_tokens(ours, pixels, timm_tokens(timm_at(native, name, img_size=size, patch_size=16), pixels))


@pytest.mark.parametrize(("old", "new"), [(14, 16), (16, 14), (16, 8), (14, 32), (16, 16)])
def test_patch_kernels_resample_as_timms(old: int, new: int) -> None:
    kernel = torch.randn(7, 3, old, old)
    expected = resample_patch_embed(kernel, [new, new])
    # Both are fp32 pseudo-inverses of the same matrix.
    torch.testing.assert_close(resample_patch_kernel(kernel, new), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [(14, 16), (8, 32)])
def test_larger_patch_kernels_give_the_same_tokens_for_enlarged_patches(old: int, new: int) -> None:
    kernel, patch = torch.randn(7, 3, old, old), torch.randn(1, 3, old, old)
    enlarged = F.interpolate(patch, size=(new, new), mode="bicubic", antialias=True)
    tokens = F.conv2d(enlarged, resample_patch_kernel(kernel, new))
    torch.testing.assert_close(tokens, F.conv2d(patch, kernel), rtol=1e-3, atol=1e-3)  # fp32 sums of 588 products


def small(**fields) -> dict:
    shape = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 70, "patch_size": 14}
    return {**shape, **fields}


TRANSFORMERS_BACKBONES = {
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**small())),
    "dinov2 giant": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**small(use_swiglu_ffn=True))),
    "dinov2 classifier": lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**small())),
    "dinov2 with registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**small(num_register_tokens=3))
    ),
    "dinov3": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**small(num_register_tokens=4, intermediate_size=160))
    ),
    "dinov3 gated": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(
            **small(intermediate_size=160, use_gated_mlp=True, hidden_act="silu", query_bias=False, value_bias=False)
        )
    ),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**small(intermediate_size=160))),
    "vit classifier": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**small(intermediate_size=160, layer_norm_eps=1e-3))
    ),
    "siglip": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**small(intermediate_size=160, image_size=75))
    ),
    "siglip of both towers": lambda: transformers.SiglipModel(
        transformers.SiglipConfig(
            vision_config=small(intermediate_size=160),
            text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
        )
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS_BACKBONES)
def test_transformers_at_native_size(name: str) -> None:
    theirs = randomize(TRANSFORMERS_BACKBONES[name]())
    pixels = torch.randn(2, 3, 70, 70)
    inner = getattr(theirs, "vision_model", theirs.base_model)
    vision = inner if hasattr(inner, "embeddings") else theirs  # a bare DINOv3 has its blocks for base model
    with torch.no_grad():
        # "siglip" has images whose last pixels fill no patch; they are cut off.
        size = vision.config.image_size
        padded = F.pad(pixels, (0, size - 70, 0, size - 70))
        expected = vision(padded).last_hidden_state
    assert_same_tokens(converted(theirs), pixels, expected)


def test_transformers_dinov3_at_other_sizes() -> None:
    theirs = randomize(TRANSFORMERS_BACKBONES["dinov3"]())
    ours = converted(theirs, image_size=[28, 98])
    for height, width in ((28, 98), (140, 56)):
        pixels = torch.randn(1, 3, height, width)
        with torch.no_grad():
            expected = theirs(pixels).last_hidden_state
        assert_same_tokens(ours, pixels, expected)


@pytest.mark.parametrize("cls", [transformers.ViTMAEModel, transformers.ViTMAEForPreTraining])
def test_transformers_mae_sees_all_patches(cls: type) -> None:
    config = transformers.ViTMAEConfig(
        **small(intermediate_size=160, mask_ratio=0.0, decoder_num_hidden_layers=1, decoder_hidden_size=32)
    )
    theirs = randomize(cls(config))
    pixels = torch.randn(1, 3, 70, 70)
    with torch.no_grad():
        in_order = torch.arange(25.0)[None]
        expected = theirs.base_model(pixels, noise=in_order).last_hidden_state
    assert_same_tokens(converted(theirs), pixels, expected)


def test_transformers_siglip2_naflex_on_its_own_grid() -> None:
    fields = small(intermediate_size=160, num_patches=25)
    del fields["image_size"]
    theirs = randomize(transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**fields)))
    pixels = torch.randn(1, 3, 70, 70)
    patches = F.unfold(pixels, 14, stride=14).unflatten(1, (3, 196)).permute(0, 3, 2, 1).flatten(2)  # channels last
    with torch.no_grad():
        expected = theirs(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(1, 25, dtype=torch.int64),
            spatial_shapes=torch.tensor([[5, 5]]),
        ).last_hidden_state
    assert_same_tokens(converted(theirs), pixels, expected)


def test_plain_vit_for_another_size_is_what_its_source_would_have_given() -> None:
    source = tiny_timm("eva02_base_patch14_224")
    direct = converted(source, image_size=[96, 144], patch_size=16)
    pixels = torch.randn(1, 3, 96, 144)
    with torch.no_grad():
        expected = direct(pixels).last_hidden_state
    assert_same_tokens(converted(converted(source), image_size=[96, 144], patch_size=16), pixels, expected)


def architectures() -> list[str]:
    patterns = [pattern for patterns in TIMM_FAMILIES.values() for pattern in patterns]
    names = timm.list_pretrained(patterns, exclude_filters=[NOT_EXPRESSED])
    return sorted({name.partition(".")[0] for name in names})


@pytest.mark.slow  # a hundred models, up to the width of DINOv3-7B
@pytest.mark.parametrize("name", architectures())
def test_every_published_architecture_at_its_true_width(name: str) -> None:
    theirs = randomize(timm.create_model(name, depth=1, num_classes=0, dynamic_img_size=True))
    ours = converted(theirs)
    patch_size = ours.config.patch_size
    for rows, columns in ((4, 4), (3, 5)):
        pixels = torch.randn(1, 3, rows * patch_size, columns * patch_size)
        assert_same_tokens(ours, pixels, timm_tokens(theirs, pixels))
