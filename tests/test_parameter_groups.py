"""Parameter groups: every trained parameter once, at its rate and decay."""

import pytest
import torch

from hf_segvit.models.configuration_vit_p import ViTPConfig
from hf_segvit.models.modeling_vit_p import ViTPForPointClassification
from hf_segvit.training.derivation import derive
from hf_segvit.training.optimizers import build_optimizer, layer_factor, parameter_groups, parameter_role
from hf_segvit.training.recipe import Recipe

from .tiny_models import FAMILIES, tiny_eomt


def groups_of(network, **fields):
    recipe = Recipe(**{"steps": 10, "learning_rate": 1.0, **fields})
    return parameter_groups(network, derive(recipe, 16, config=network.config))


def by_name(groups, key="lr"):
    return {name: group[key] for group in groups for name in group["names"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_one_group(family):
    model = tiny_eomt(**FAMILIES[family])
    groups = groups_of(model)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    parameters = dict(model.named_parameters())
    for group in groups:
        assert all(
            parameters[name] is parameter for name, parameter in zip(group["names"], group["params"], strict=True)
        )


def test_layer_wise_rates():
    rates = by_name(groups_of(tiny_eomt()))  # 4 blocks, of which 2 see the queries
    for name, rate in {
        "eomt.embeddings.cls_token": 0.8**3,
        "eomt.embeddings.register_tokens": 0.8**3,
        "eomt.embeddings.position_embeddings.weight": 0.8**3,
        "eomt.embeddings.patch_embeddings.projection.bias": 0.8**3,
        "eomt.layers.0.norm1.bias": 0.8**3,
        "eomt.layers.1.mlp.fc2.weight": 0.8**2,
        "eomt.layers.2.layer_scale1.lambda1": 0.8,
        "eomt.layers.3.attention.q_proj.weight": 1.0,
        "eomt.layernorm.weight": 1.0,
        "eomt.query.weight": 1.0,
        "eomt.mask_head.fc1.weight": 1.0,
        "eomt.upscale_block.block.0.layernorm2d.weight": 1.0,
        "class_predictor.bias": 1.0,
    }.items():
        assert rates[name] == pytest.approx(rate, rel=1e-12), name


def test_query_layers_may_be_spared_and_the_others_keep_their_exponents():
    rates = by_name(groups_of(tiny_eomt(), decay_query_layers=False))
    assert [rates[f"eomt.layers.{i}.norm1.weight"] for i in range(4)] == pytest.approx([0.8**3, 0.8**2, 1, 1])


def test_one_rate_for_all():
    groups = groups_of(tiny_eomt(), layer_decay=1.0)
    assert [(group["role"], group["lr"]) for group in groups] == [("backbone", 1.0), ("rest", 1.0)]


def test_groups_are_few_and_ordered():
    groups = groups_of(tiny_eomt())
    assert [group["role"] for group in groups] == ["backbone"] * 4 + ["rest"]
    assert [group["lr"] for group in groups] == pytest.approx([0.8**3, 0.8**2, 0.8, 1, 1])


def test_weight_decay_of_everything_or_of_matrices():
    assert set(by_name(groups_of(tiny_eomt()), "weight_decay").values()) == {0.05}
    decays = by_name(groups_of(tiny_eomt(), weight_decay_mode="matrices"), "weight_decay")
    for name, parameter in tiny_eomt().named_parameters():
        spared = parameter.ndim == 1 or name.endswith(("cls_token", "register_tokens"))
        assert decays[name] == (0.0 if spared else 0.05), name


def test_what_is_frozen_is_in_no_group():
    model = tiny_eomt()
    model.eomt.layers[0].requires_grad_(False)
    assert not [name for name in by_name(groups_of(model)) if name.startswith("eomt.layers.0.")]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="freeze less"):
        groups_of(model)


def tiny_vit_p() -> ViTPForPointClassification:
    config = ViTPConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=28,
        patch_size=14,
        num_labels=3,
    )
    return ViTPForPointClassification(config)


def test_prompt_encoder_of_vit_p_has_a_rate_of_its_own():
    model = tiny_vit_p()
    fields = {"model": "vit_p", "task": "points", "optimizer": "sgd", "layer_decay": 1.0}
    groups = groups_of(model, prompt_learning_rate=0.25, **fields)
    assert [(group["role"], group["lr"]) for group in groups] == [("backbone", 1.0), ("rest", 1.0), ("prompt", 0.25)]
    roles = by_name(groups, "role")
    # The table of a ViT without CLS token or registers is empty, and not trained.
    assert roles.keys() == {name for name, parameter in model.named_parameters() if parameter.numel()}
    for name, role in roles.items():
        expected = "rest"
        if name.startswith("vit_p.prompt_encoder."):
            expected = "prompt"
        elif name.startswith(("vit_p.embeddings.", "vit_p.layers.", "vit_p.layernorm.")):
            expected = "backbone"
        assert role == expected, name
    assert by_name(groups_of(model, **fields))["vit_p.prompt_encoder.weight"] == 1.0
    rates = by_name(groups_of(model, **{**fields, "layer_decay": 0.5}))
    assert rates["vit_p.layers.0.norm1.weight"] == 0.5


def test_names_of_wrapped_models_are_understood():
    for prefix in ("", "_orig_mod.", "module.", "base_model.model."):
        assert parameter_role(f"{prefix}eomt.layers.3.attention.q_proj.lora_A.default.weight") == "backbone"
        assert parameter_role(f"{prefix}eomt.upscale_block.block.0.layernorm2d.weight") == "rest"
        assert layer_factor(f"{prefix}eomt.layers.3.norm1.weight", 12, 0.5) == 0.5**8


def test_the_optimizer_takes_the_groups_and_equals_plain_adamw():
    torch.manual_seed(0)
    model, plain = tiny_eomt(), tiny_eomt()
    plan = derive(Recipe(steps=10, learning_rate=1e-2, betas=[0.8, 0.9]), 16, config=model.config)
    optimizer = build_optimizer(model, plan)
    rates = by_name(parameter_groups(plain, plan))
    reference = torch.optim.AdamW(
        [{"params": [parameter], "lr": rates[name]} for name, parameter in plain.named_parameters()],
        betas=(0.8, 0.9),
        weight_decay=0.05,
    )
    for step in range(3):
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            one.grad = other.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        reference.step()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # the fused kernel rounds elsewhere

    sgd = Recipe(steps=10, optimizer="sgd", momentum=0.7, weight_decay=0.0)
    optimizer = build_optimizer(model, derive(sgd, 16, config=model.config))
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(group["momentum"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.7, 0.0)}
