"""Heads of Transformers' Mask2Former and public ViT-Adapters become a Mask2Former on a plain ViT."""

import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from hf_segvit.cli import main
from hf_segvit.inference.loading import load_mask2former_vit
from hf_segvit.models.modeling_plain_vit import PlainViTModel

from .tiny_models import randomize, tiny_mask2former_vit, tiny_mask2former_vit_config
from .vit_adapter_reference import adapter_features

NAMES = {0: "sky", 1: "cat", 2: "road"}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A folder with a tiny plain ViT and the normalisation of its pre-training."""
    folder = tmp_path_factory.mktemp("backbone")
    model = tiny_mask2former_vit("adapter").mask2former
    fields = {name: value for name, value in model.config.to_diff_dict().items() if name in PLAIN_FIELDS}
    plain = PlainViTModel(PlainViTModel.config_class(**fields))
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    plain.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "EoMTImageProcessor", "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.3]}'
    )
    return folder, plain


PLAIN_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size")


def save_mask2former(folder, widths, **fields):
    """A stock Mask2Former on a Swin with these widths."""
    swin = SwinConfig(
        embed_dim=widths[0],
        depths=[1] * 4,
        num_heads=[1] * 4,
        window_size=2,
        image_size=64,
        out_features=[f"stage{stage}" for stage in (1, 2, 3, 4)],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        **{
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 40,
            "dim_feedforward": 48,
            "encoder_layers": 2,
            "decoder_layers": 4,
            "num_attention_heads": 4,
            "num_queries": 9,
            "id2label": NAMES,
            **fields,
        },
    )
    torch.manual_seed(1)
    model = randomize(Mask2FormerForUniversalSegmentation(config)).eval()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def test_a_head_of_transformers_goes_onto_a_plain_vit_and_computes_the_same(tmp_path, backbone, capsys):
    folder, plain = backbone
    stock = save_mask2former(tmp_path / "stock", (8, 16, 32, 64))
    assert (
        main(["convert", "mask2former-head", str(tmp_path / "stock"), str(tmp_path / "out"), "--base", str(folder)])
        == 0
    )
    report = capsys.readouterr().out
    model, processor = load_mask2former_vit(str(tmp_path / "out"))
    assert model.config.id2label == NAMES
    assert (model.config.removed, model.config.num_queries, model.config.num_decoder_layers) == ("nothing", 9, 3)
    assert list(processor.image_mean) == [0.4, 0.5, 0.6]
    # The features of stage 3 have the ViT's 32 channels; what reads the others is new, and said to be.
    new = re.findall(r"new: mask2former\.(\S+),", report)
    assert new == ["pixel_decoder.adapter_1", "pixel_decoder.input_projections.0", "pixel_decoder.input_projections.2"]
    assert "new: the adapter" in report
    assert "checked: outputs equal those of Transformers' transformer decoder" in report
    own = model.mask2former
    for name, tensor in plain.state_dict().items():
        if not name.startswith("layernorm."):
            assert torch.equal(own.state_dict()[name], tensor), name
    # With the new convolutions in the stock pixel decoder too, both decode alike.
    theirs = stock.model.pixel_level_module.decoder
    copied = own.pixel_decoder
    for index in (0, 2):
        theirs.input_projections[index] = copied.input_projections[index]
    theirs.adapter_1 = copied.adapter_1
    theirs.lateral_convolutions = [copied.adapter_1]
    features = [torch.randn(1, 32, side, side) for side in (16, 8, 4, 2)]
    expected = theirs(features)
    decoded = stock.model.transformer_module(list(expected.multi_scale_features), expected.mask_features)
    ours = own.decode_queries(*own.decode_pixels(features))
    torch.testing.assert_close(ours.masks_queries_logits, decoded.masks_queries_logits)
    queries = decoded.intermediate_hidden_states[-1]
    torch.testing.assert_close(
        model.class_predictor(ours.intermediate_hidden_states[-1]), stock.class_predictor(queries)
    )


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, [], r"mask2former-head needs --base: timm/NAME, folder or Hub id"),
        ({"pre_norm": True}, ["--base", "BASE"], r"config.json: pre_norm is True, but these models have False"),
        ({"mask_feature_size": 16}, ["--base", "BASE"], r"mask_feature_size=16 must be equal"),
        ({}, ["--base", "BASE", "--labels", "coco_panoptic"], r"coco_panoptic names 133 classes, but .* has 3"),
        ({}, ["--base", "BASE", "--set", "removed=pixel_decoder"], r"unknown to the model"),
    ],
)
def test_heads_that_do_not_fit_are_refused(fields, options, message, tmp_path, backbone, capsys):
    save_mask2former(tmp_path / "stock", (8, 16, 32, 64), **fields)
    options = [str(backbone[0]) if option == "BASE" else option for option in options]
    assert main(["convert", "mask2former-head", str(tmp_path / "stock"), str(tmp_path / "out"), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def public_names(adapter) -> dict[str, torch.Tensor]:
    """The weights of an adapter under the names of the public code, from the other end than the conversion."""
    published = {}
    for name, tensor in adapter.state_dict().items():
        parts = name.split(".")
        if parts[0] == "spatial_prior":
            rest = parts[2:] if parts[1] == "projections" else parts[1:]
            parts = ["spm", f"fc{int(rest[0]) + 1}", *rest[1:]] if parts[1] == "projections" else ["spm", *rest]
        elif parts[0] == "norms":
            parts = [f"norm{int(parts[1]) + 1}", *parts[2:]]
        elif parts[0] == "upscaling":
            parts[0] = "up"
        elif parts[0] == "interactions":
            if parts[2] == "extractors":
                number = int(parts[3])
                parts[2:4] = ["extractor"] if number == 0 else ["extra_extractors", str(number - 1)]
            new = {"feature_norm": "feat_norm", "attention": "attn", "mlp_norm": "ffn_norm", "mlp": "ffn"}
            parts = [new.get(part, part) for part in parts]
            if "convolution" in parts:
                parts[parts.index("convolution")] = "dwconv.dwconv"
        published[".".join(parts)] = tensor.clone()
    return published


VIT = {"embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 1.5, "img_size": 64, "num_classes": 0}


@pytest.fixture
def tiny_vit(monkeypatch):
    """timm's DINOv2 S under its own name, but tiny."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, **{**kwargs, **VIT}))
    torch.manual_seed(2)
    return randomize(create("vit_small_patch16_224", **VIT)).eval()


@torch.no_grad()
def test_a_public_vit_adapter_computes_here_what_a_plain_implementation_computes(tmp_path, tiny_vit, capsys):
    source = tiny_mask2former_vit().mask2former.adapter
    published = public_names(source)
    assert {
        "level_embed",
        "spm.stem.0.weight",
        "spm.fc4.bias",
        "interactions.0.injector.attn.sampling_offsets.weight",
        "interactions.0.extractor.ffn.dwconv.dwconv.weight",
        "interactions.3.extra_extractors.1.ffn_norm.weight",
        "up.weight",
        "norm4.running_mean",
    } <= published.keys()
    file = {f"backbone.{name}": tensor for name, tensor in (published | tiny_vit.state_dict()).items()}
    del file["backbone.norm.weight"], file["backbone.norm.bias"]  # an adapter's ViT has no final norm
    file["decode_head.cls_embed.weight"] = torch.zeros(2, 2)
    save_file(file, tmp_path / "adapter.safetensors")
    command = ["convert", "vit-adapter", str(tmp_path / "adapter.safetensors"), str(tmp_path / "out")]
    assert main([*command, "--model", "vit_small_patch16_224", "--labels", "cityscapes"]) == 0
    report = capsys.readouterr().out
    assert "left out 1 tensors of decode_head" in report
    assert "new: pixel decoder, transformer decoder and class head" in report
    model, processor = load_mask2former_vit(str(tmp_path / "out"))
    assert model.config.num_labels == 19
    assert list(processor.image_mean) == [0.5, 0.5, 0.5]
    assert model.config.num_adapter_attention_heads == 2
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.mask2former.adapter.state_dict()[name], tensor), name
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    features, _ = model.mask2former.encode(pixels)
    expected = adapter_features(published, tiny_vit, pixels, num_heads=2)
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_adapters_that_do_not_fit_are_refused(tmp_path, tiny_vit, capsys):
    published = public_names(tiny_mask2former_vit().mask2former.adapter)
    whole = published | tiny_vit.state_dict()
    cases = {
        "needs --model: timm's name of the ViT": (whole, []),
        "timm has no model 'vit_smal_patch16_224'": (whole, ["--model", "vit_smal_patch16_224"]),
        "has no weights of a ViT-Adapter": (tiny_vit.state_dict(), ["--model", "vit_small_patch16_224"]),
        "lacks spm.stem.0.weight": (
            {name: tensor for name, tensor in whole.items() if name != "spm.stem.0.weight"},
            ["--model", "vit_small_patch16_224"],
        ),
        "the weights do not fit the adapter: 1 parameters are missing, such as 'norms.1.weight'": (
            {name: tensor for name, tensor in whole.items() if name != "norm2.weight"},
            ["--model", "vit_small_patch16_224"],
        ),
    }
    for message, (weights, options) in cases.items():
        save_file(dict(weights), tmp_path / "file.safetensors")
        assert (
            main(["convert", "vit-adapter", str(tmp_path / "file.safetensors"), str(tmp_path / "out"), *options]) == 2
        )
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_the_heads_of_the_adapter_follow_from_its_width():
    assert tiny_mask2former_vit_config(hidden_size=128).num_adapter_attention_heads == 2
    assert tiny_mask2former_vit_config(hidden_size=48).num_adapter_attention_heads == 2  # those of the ViT
