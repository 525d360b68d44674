"""`from_backbone`: what is loaded, what is new, and what is refused, for every kind of source.

That converted backbones compute the same as their sources is tested in tests/parity/test_backbones.py.
"""

import builtins
import json
import re
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.dynamic_module_utils import get_imports

from hf_segvit.conversion.backbones import convert_backbone, image_normalization, supported_backbones
from hf_segvit.models import modeling_plain_vit
from hf_segvit.models.configuration_plain_vit import PlainViTConfig
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation, EoMTModel
from hf_segvit.models.modeling_plain_vit import PlainViTModel
from hf_segvit.models.plain_vit_layers import rotary_embeddings

from .tiny_models import randomize

TINY = {"depth": 3, "embed_dim": 48, "num_heads": 4}
DINOV2_TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 70, "patch_size": 14}


def tiny_timm(name: str = "vit_small_patch14_reg4_dinov2", **overrides) -> nn.Module:
    return randomize(timm.create_model(name, **{**TINY, **overrides})).eval()


def test_eomt_takes_the_backbone_and_keeps_its_own_initial_heads() -> None:
    source = tiny_timm()
    id2label = {0: "road", 1: "car", 2: "sky"}
    model = EoMTForUniversalSegmentation.from_backbone(
        source, image_size=64, patch_size=16, id2label=id2label, num_queries=50, num_query_layers=2, drop_path_rate=0.1
    )
    config = model.config
    assert (config.image_size, config.patch_size, config.num_queries) == (64, 16, 50)
    assert (config.num_labels, config.id2label, config.drop_path_rate) == (3, id2label, 0.1)
    assert config.masked_attention_probabilities == [1.0, 1.0]
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (48, 3, 4)
    assert config.num_register_tokens == 4
    assert not model.training
    assert torch.equal(model.eomt.layers[2].norm2.weight, source.blocks[2].norm2.weight)
    query, key, value = source.blocks[1].attn.qkv.weight.chunk(3)
    attention = model.eomt.layers[1].attention
    assert torch.equal(attention.q_proj.weight, query)
    assert torch.equal(attention.k_proj.weight, key)
    assert torch.equal(attention.v_proj.weight, value)
    assert 0.8 < model.eomt.query.weight.std() < 1.2  # N(0, 1), as in any new EoMT
    bound = 48**-0.5
    assert 0.9 * bound < model.class_predictor.weight.abs().max() <= bound
    assert model(torch.randn(1, 3, 64, 64)).masks_queries_logits.shape == (1, 50, 16, 16)


def test_nothing_is_shared_with_the_source_and_everything_learns() -> None:
    source = tiny_timm()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    model = EoMTModel.from_backbone(source, image_size=56, num_query_layers=1, masked_attention=False).train()
    outputs = model(torch.randn(1, 3, 56, 56))
    (outputs.last_hidden_state.square().mean() + outputs.masks_queries_logits.square().mean()).backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            parameter.add_(1.0)
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_loading_says_nothing(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture) -> None:
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.enable_propagation()
    try:
        EoMTForUniversalSegmentation.from_backbone(tiny_timm(), num_query_layers=1)
    finally:
        transformers.utils.logging.disable_propagation()
    assert not caplog.records
    assert "MISSING" not in capsys.readouterr().err
    assert transformers.utils.logging.get_verbosity() == verbosity


def test_sizes_default_to_the_grid_of_the_source() -> None:
    source = tiny_timm()
    fields, weights = convert_backbone(source)
    assert (fields["image_size"], fields["patch_size"]) == (518, 14)
    fields, resized = convert_backbone(source, patch_size=16)
    assert (fields["image_size"], fields["patch_size"]) == (37 * 16, 16)
    name = "embeddings.position_embeddings.weight"
    assert torch.equal(resized[name], weights[name])
    fields, resized = convert_backbone(tiny_timm(), image_size=[28, 70])
    assert fields["image_size"] == [28, 70]
    assert resized[name].shape == (2 * 5, 48)
    assert convert_backbone(tiny_timm(), image_size=(70, 70))[0]["image_size"] == 70


def test_dtype_is_fp32_unless_asked_otherwise() -> None:
    source = tiny_timm().to(torch.bfloat16)
    assert PlainViTModel.from_backbone(source).dtype == torch.float32
    assert PlainViTModel.from_backbone(source, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert PlainViTModel.from_backbone(source, attn_implementation="eager").config._attn_implementation == "eager"


def test_weights_may_come_apart_from_the_model_that_names_them() -> None:
    source = tiny_timm(num_classes=7)
    other = {name: tensor + 1.0 for name, tensor in source.state_dict().items()}
    model = PlainViTModel.from_backbone(source, state_dict=other)
    assert torch.equal(model.layernorm.weight, source.norm.weight + 1.0)
    full = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    model = PlainViTModel.from_backbone("timm/vit_tiny_patch16_224", state_dict=full.state_dict())
    assert torch.equal(model.layers[11].mlp.fc2.weight, full.blocks[11].mlp.fc2.weight)


# One of each kind: positions, norms and tokens that no other test model has.
FAMILIES = {
    "eva02": {"position_embedding_type": "learned_rope", "rope_reference_grid": 3, "rope_theta": 10000.0}
    | {"mlp_type": "swiglu", "mlp_norm": True, "attention_norm": True, "key_bias": False},
    "siglip": {"use_cls_token": False, "num_register_tokens": 0, "layer_scale_init_value": None},
    "perception encoder": {"position_embedding_type": "learned_rope", "rope_reference_grid": 4, "rope_offset": 1}
    | {"embedding_norm": True, "final_norm": False, "num_register_tokens": 0},
}


def tiny_plain_vit(family: str, attn_implementation: str = "sdpa") -> PlainViTModel:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = PlainViTConfig(**shape, image_size=64, **FAMILIES[family])
    config._attn_implementation = attn_implementation
    torch.manual_seed(0)
    return randomize(PlainViTModel(config)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_new_fields_agree_across_back_ends_and_survive_saving(family: str, tmp_path: Path) -> None:
    model, pixels = tiny_plain_vit(family), torch.randn(2, 3, 48, 80)
    expected = model(pixels).last_hidden_state
    assert expected.shape == (2, model.config.num_prefix_tokens + 15, 32)
    # The same sums in another order: a few units in the last place of fp32.
    torch.testing.assert_close(
        tiny_plain_vit(family, "eager")(pixels).last_hidden_state, expected, rtol=1e-4, atol=1e-5
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(PlainViTModel.from_pretrained(tmp_path)(pixels).last_hidden_state, expected)
    assert torch.equal(PlainViTModel.from_backbone(tmp_path)(pixels).last_hidden_state, expected)
    assert torch.equal(PlainViTModel.from_backbone(model)(pixels).last_hidden_state, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_eomt_on_every_kind_predicts_and_learns(family: str) -> None:
    model = EoMTForUniversalSegmentation.from_backbone(
        tiny_plain_vit(family),
        image_size=[32, 64],
        num_queries=5,
        num_query_layers=1,
        num_labels=3,
        train_num_points=16,
    ).train()
    masks, classes = [torch.zeros(2, 32, 64, dtype=torch.bool)], [torch.tensor([0, 2])]
    masks[0][0, :16], masks[0][1, 16:] = True, True
    outputs = model(torch.randn(1, 3, 32, 64), mask_labels=masks, class_labels=classes)
    assert outputs.masks_queries_logits.shape == (1, 5, 8, 16)
    outputs.loss.backward()
    assert all(p.grad is not None for p in model.eomt.embeddings.parameters())


def test_final_norm_may_be_added_where_the_source_has_none() -> None:
    source = tiny_plain_vit("perception encoder")
    assert not PlainViTModel.from_backbone(source).config.final_norm
    model = PlainViTModel.from_backbone(source, final_norm=True)
    pixels = torch.randn(1, 3, 64, 64)
    expected = nn.functional.layer_norm(source(pixels).last_hidden_state, (32,), eps=1e-6)
    torch.testing.assert_close(model(pixels).last_hidden_state, expected)


@pytest.mark.parametrize(("reference_grid", "offset"), [(16, 0), (24, 1)])
def test_rotary_embeddings_on_a_reference_grid_follow_the_published_formula(reference_grid: int, offset: int) -> None:
    grid_size, head_size, theta = (3, 5), 8, 10000.0
    cosines, sines = rotary_embeddings(grid_size, head_size, theta, 1, torch.device("cpu"), reference_grid, offset)
    assert torch.equal(cosines[0], torch.ones(head_size))
    for row in range(3):
        for column in range(5):
            y, x = (row + offset) / 3 * reference_grid, (column + offset) / 5 * reference_grid
            angles = torch.tensor([y, y / theta**0.5, x, x / theta**0.5]).repeat(2)
            torch.testing.assert_close(cosines[1 + 5 * row + column], angles.cos(), rtol=0, atol=1e-5)
            torch.testing.assert_close(sines[1 + 5 * row + column], angles.sin(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_reference_grid": 0}, "rope_reference_grid=0 must be at least 1"),
        ({"rope_offset": 1}, "rope_offset=1 needs rope_reference_grid"),
        ({"mlp_norm": True}, "mlp_norm=True needs mlp_type='swiglu', not 'mlp'"),
        ({"position_embedding_type": "learned_rope", "num_attention_heads": 512}, "multiple of 4 channels"),
    ],
)
def test_impossible_configs_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlainViTConfig(**fields)


def test_transformers_folder(tmp_path: Path) -> None:
    source = randomize(transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**DINOV2_TINY))).eval()
    source.save_pretrained(tmp_path)
    model = PlainViTModel.from_backbone(str(tmp_path))
    assert torch.equal(model.layernorm.bias, source.dinov2.layernorm.bias)
    pixels = torch.randn(1, 3, 70, 70)
    with torch.no_grad():
        expected = source.dinov2(pixels).last_hidden_state
    torch.testing.assert_close(model(pixels).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_timm_folder(tmp_path: Path) -> None:
    source = tiny_timm(num_classes=5)
    timm.models.save_for_hf(source, str(tmp_path), model_args={**TINY}, safe_serialization=True)
    model = PlainViTModel.from_backbone(tmp_path, image_size=56)
    assert torch.equal(model.layers[2].layer_scale1.lambda1, source.blocks[2].ls1.gamma)
    mean, std = image_normalization(tmp_path)
    assert (mean, std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_timm_name_is_created_pretrained_and_without_its_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    create, calls = timm.create_model, []

    def without_download(name: str, pretrained: bool = False, **kwargs) -> nn.Module:
        calls.append((name, pretrained, kwargs))
        return create(name.partition(".")[0], **{**kwargs, **TINY})

    monkeypatch.setattr(timm, "create_model", without_download)
    model = PlainViTModel.from_backbone("timm/vit_large_patch14_reg4_dinov2.lvd142m", image_size=64, patch_size=16)
    assert calls[-1] == ("vit_large_patch14_reg4_dinov2.lvd142m", True, {"num_classes": 0})
    assert model.config.hidden_size == 48


def test_supported_names_include_every_family() -> None:
    names = supported_backbones()
    for name in (
        "timm/vit_giant_patch14_reg4_dinov2.lvd142m",
        "timm/vit_7b_patch16_dinov3.lvd1689m",
        "timm/eva02_large_patch14_448.mim_m38m_ft_in22k_in1k",
        "timm/deit3_huge_patch14_224.fb_in22k_ft_in1k",
        "timm/vit_large_patch16_384.augreg_in21k_ft_in1k",
        "timm/vit_huge_patch14_224.mae",
        "timm/vit_so400m_patch16_siglip_512.v2_webli",
        "timm/vit_pe_spatial_large_patch14_448.fb",
        "facebook/dinov2-with-registers-giant",
        "facebook/dinov3-vit7b16-pretrain-lvd1689m",
    ):
        assert name in names
    assert not [name for name in names if "enormous" in name or "_r26_" in name]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("timm/vit_large_patch14_reg4_dinov2.lvd142", "timm/vit_large_patch14_reg4_dinov2.lvd142m"),
        ("timm/vit_larg_patch14_dinov2.lvd142m", "timm/vit_large_patch14_dinov2.lvd142m"),
        ("vit_base_patch16_dinov3.lvd1689m", "timm/vit_base_patch16_dinov3.lvd1689m"),
        ("facebook/dinov2-with-register-base", "facebook/dinov2-with-registers-base"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, nearest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise OSError(f"{name} is not there")

    monkeypatch.setattr("transformers.configuration_utils.PreTrainedConfig.get_config_dict", offline)
    with pytest.raises(ValueError, match=f"'{name}' is not a known backbone.*did you mean {nearest} or"):
        PlainViTModel.from_backbone(name)


def test_a_known_name_that_cannot_be_reached_keeps_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise OSError("no connection")

    monkeypatch.setattr("transformers.configuration_utils.PreTrainedConfig.get_config_dict", offline)
    with pytest.raises(OSError, match="no connection"):
        PlainViTModel.from_backbone("facebook/dinov2-large")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/resnet50.a1_in1k", "ResNet is of no family"),
        ("timm/beit_base_patch16_224.in22k_ft_in22k", "Beit is of no family"),
        ("timm/deit_tiny_distilled_patch16_224.fb_in1k", "VisionTransformerDistilled is of no family"),
        ("timm/eva02_enormous_patch14_clip_224.laion2b", "block of class EvaBlockPostNorm"),
        ("timm/vit_small_patch16_rope_mixed_224.naver_in1k", "rotary embeddings of class RotaryEmbeddingMixed"),
        ("timm/vit_small_patch16_rope_224.naver_in1k", "on the reference grid None are not supported"),
        ("timm/vit_base_patch16_18x2_224.untrained", "not a known backbone"),
    ],
)
def test_other_architectures_are_refused_before_any_download(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlainViTModel.from_backbone(name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: nn.Linear(2, 2), "Linear is of no family that becomes a plain ViT; known are timm"),
        (
            lambda: transformers.BeitModel(
                transformers.BeitConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
            ),
            "BeitModel is of no family",
        ),
        (lambda: tiny_timm("vit_small_patch16_18x2_224"), "block of class ParallelThingsBlock"),
        (lambda: tiny_timm("vit_base_patch16_rpn_224"), "block of class ResPostBlock"),
        (lambda: tiny_timm(qk_norm=True), r"the plain ViT lacks: blocks\.0\.attn\.q_norm\.weight"),
        (lambda: tiny_timm(act_layer=nn.ELU), "MLP uses ELU"),
        (lambda: tiny_timm(norm_layer=timm.layers.RmsNorm), "norm of class RmsNorm"),
        (lambda: tiny_timm(pos_embed="none"), "no position embeddings"),
        (lambda: tiny_timm(proj_bias=False), "parameters are missing, such as 'layers.0.attention.out_proj.bias'"),
    ],
)
def test_what_cannot_be_expressed_is_named(source, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlainViTModel.from_backbone(source())


def test_weights_that_do_not_fit_are_named() -> None:
    source = tiny_timm()
    weights = source.state_dict()
    extra = {**weights, "blocks.0.attn.gate.weight": torch.zeros(48, 48)}
    with pytest.raises(ValueError, match=r"the plain ViT lacks: blocks\.0\.attn\.gate\.weight"):
        convert_backbone(source, state_dict=extra)
    missing = {name: tensor for name, tensor in weights.items() if name != "blocks.1.norm2.bias"}
    with pytest.raises(ValueError, match=r"missing, such as 'layers\.1\.norm2\.bias'"):
        convert_backbone(source, state_dict=missing)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.fc1\.bias' has shape \(3,\) instead of \(192,\)"):
        convert_backbone(source, state_dict={**weights, "blocks.2.mlp.fc1.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"position_embeddings.weight' has shape \(1368, 48\) instead of \(1369, 48\)"):
        convert_backbone(source, state_dict={**weights, "pos_embed": weights["pos_embed"][:, 1:]})
    with pytest.raises(ValueError, match="no patch embedding or no blocks"):
        convert_backbone(source, state_dict={"norm.weight": torch.ones(48)})
    for pattern in ("cls_token", r"norm\..+", r".+\.ls[12]\.gamma", r"blocks\.2\..+"):  # what shapes would not tell
        rest = {name: tensor for name, tensor in weights.items() if not re.fullmatch(pattern, name)}
        assert len(rest) < len(weights)
        with pytest.raises(ValueError, match="VisionTransformer needs exactly its own weights"):
            convert_backbone(source, state_dict=rest)
    rest = {key: tensor for key, tensor in weights.items() if key != "pos_embed"}
    with pytest.raises(ValueError, match="hold no position embeddings"):
        convert_backbone(source, state_dict=rest)
    for value in (float("nan"), float("inf")):
        broken = weights["blocks.1.attn.proj.weight"].clone()
        broken[3, 4] = value
        with pytest.raises(ValueError, match=r"blocks\.1\.attn\.proj\.weight holds NaN or infinity"):
            convert_backbone(source, state_dict={**weights, "blocks.1.attn.proj.weight": broken})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 500}, r"image_size=\[500, 500\] is not a multiple of patch_size=14.*\[504, 504\]"),
        ({"image_size": [64, 8], "patch_size": 16}, r"nearest that is: \[64, 16\]"),
        ({"hidden_size": 64}, r"fields \['hidden_size', 'num_query_layers'\] do not go with this backbone"),
        ({"num_hidden_layers": 2}, r"unknown to the model, such as 'layers\.2\."),
        ({"num_queries": 0}, "num_queries=0 must be at least 1"),
    ],
)
def test_settings_that_contradict_the_backbone_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EoMTModel.from_backbone(tiny_timm(), **{"num_query_layers": 1, **settings})


def test_folders_that_hold_no_backbone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        PlainViTModel.from_backbone(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "eomt"}))
    with pytest.raises(ValueError, match=r"model of type 'eomt', no backbone.*from_pretrained"):
        PlainViTModel.from_backbone(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    source = transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2_TINY))
    source.config.save_pretrained(tmp_path)
    torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no safetensors weights; pickled ones"):
        PlainViTModel.from_backbone(tmp_path)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    source = transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2_TINY))
    source.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    norm = next(name for name in whole if name.endswith("layer.1.norm2.weight"))

    def saved(tensors: dict) -> Path:
        save_file(tensors, file)
        return tmp_path

    with pytest.raises(ValueError, match=r"missing, such as 'layers\.1\.norm2\.weight'"):
        PlainViTModel.from_backbone(saved({name: tensor for name, tensor in whole.items() if name != norm}))
    with pytest.raises(ValueError, match=r"1 weights that its model has no place for, such as encoder\.gate"):
        PlainViTModel.from_backbone(saved({**whole, "encoder.gate": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"do not fit its config\.json"):
        PlainViTModel.from_backbone(saved({**whole, norm: torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"norm2\.weight holds NaN or infinity"):
        PlainViTModel.from_backbone(saved({**whole, norm: whole[norm] * torch.nan}))
    assert PlainViTModel.from_backbone(saved({**whole, "classifier.weight": torch.zeros(3, 96)}))
    content = saved(whole).joinpath("model.safetensors").read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        PlainViTModel.from_backbone(tmp_path)


def test_image_normalization_is_the_backbones_own(tmp_path: Path) -> None:
    imagenet = [0.485, 0.456, 0.406]
    assert image_normalization("timm/vit_large_patch14_reg4_dinov2.lvd142m")[0] == imagenet
    assert image_normalization("timm/vit_base_patch16_224.augreg_in21k") == ([0.5] * 3, [0.5] * 3)
    assert image_normalization(tiny_timm("vit_large_patch16_dinov3.sat493m"))[0] == [0.430, 0.411, 0.296]
    source = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(hidden_size=24, num_hidden_layers=1))
    with pytest.raises(ValueError, match="set image_mean and image_std"):
        image_normalization(source)
    source.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    assert image_normalization(tmp_path) == ([0.5] * 3, [0.25] * 3)
    assert image_normalization(transformers.SiglipVisionModel.from_pretrained(tmp_path))[1] == [0.25] * 3
    with pytest.raises(ValueError, match="not a known backbone"):
        image_normalization("timm/vit_none_patch14.lvd")


def test_the_models_code_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "hf_segvit" not in get_imports(modeling_plain_vit.__file__)
    real_import = builtins.__import__

    def without_package(name: str, *args, **kwargs):
        if name.startswith("hf_segvit"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_package)
    with pytest.raises(ImportError, match=r"PlainViTModel\.from_backbone needs the package hf-segvit"):
        PlainViTModel.from_backbone(None)
