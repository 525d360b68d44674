"""LoRA by PEFT: what is trained, and that merged, saved and reloaded models compute the same."""

import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForUniversalSegmentation

from hf_segvit.inference.loading import load_segmentation_model
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation
from hf_segvit.training.checkpoints import check, read
from hf_segvit.training.derivation import derive
from hf_segvit.training.loop import train
from hf_segvit.training.optimizers import build_optimizer, parameter_groups
from hf_segvit.training.recipe import Recipe, load_recipe
from hf_segvit.training.start import add_adapters, merge_adapters, merged_weights
from hf_segvit.training.tasks.eomt import EoMTTask

from .test_freezing import batch
from .test_parameter_groups import tiny_vit_p
from .tiny_models import DINOV2_GIANT, tiny_eomt
from .tiny_training import assert_equal, saved_tensors, tiny_recipe

pytest.importorskip("peft")
HEADS = ("eomt.query.", "eomt.mask_head.", "eomt.upscale_block.", "class_predictor.")
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0}


def plan_for(model):
    return derive(Recipe(steps=10, learning_rate=0.05, layer_decay=1.0, lora=LORA), 16, config=model.config)


def trained_adapters(**overrides):
    """A model with adapters after three steps, in evaluation mode."""
    model = add_adapters(tiny_eomt(**overrides), LORA)
    optimizer = build_optimizer(model, plan_for(model))
    model.train()
    for _ in range(3):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.set_masked_attention_probabilities(0.0)
    return model.eval()


def answers(model):
    with torch.no_grad():
        outputs = model(pixel_values=batch()["pixel_values"])
    return outputs.class_queries_logits, outputs.masks_queries_logits


def assert_same(model, other):
    for one, another in zip(answers(model), answers(other), strict=True):
        torch.testing.assert_close(one, another, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [{}, DINOV2_GIANT])
def test_adapters_in_the_blocks_and_the_rest_in_full(family):
    model = tiny_eomt(**family)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("eomt.layers.")}
    heads = {name for name, _ in model.named_parameters() if name.startswith(HEADS)}
    adapted = add_adapters(model, LORA)
    trained = {name.removeprefix("base_model.model.") for name, p in adapted.named_parameters() if p.requires_grad}
    adapters = {name.partition(".lora_")[0] for name in trained if ".lora_" in name}
    assert adapters == linear
    rest = {name.replace("modules_to_save.default.", "") for name in trained if ".lora_" not in name}
    assert rest == heads
    roles = {group["role"] for group in parameter_groups(adapted, plan_for(adapted))}
    assert roles == {"backbone", "rest"}


def test_adapters_of_vit_p():
    model = tiny_vit_p()
    adapted = add_adapters(model, LORA)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    adapters = {name.split(".lora_")[0].rpartition(".")[2] for name in trained if ".lora_" in name}
    assert adapters == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    in_full = {name for name in trained if ".lora_" not in name}
    assert any("prompt_encoder" in name for name in in_full)
    assert any("classifier" in name for name in in_full)
    assert not any(".embeddings." in name or ".layernorm." in name for name in in_full)


def test_new_adapters_change_nothing_and_trained_ones_do():
    plain = tiny_eomt()
    adapted = add_adapters(tiny_eomt(), LORA).eval()
    assert_same(plain, adapted)
    adapted = trained_adapters()
    plain.set_masked_attention_probabilities(0.0)
    assert (answers(plain)[1] - answers(adapted)[1]).abs().max() > 0.1
    base = dict(tiny_eomt().named_parameters())
    for name, parameter in adapted.named_parameters():
        if ".base_layer." in name:
            original = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, base[original]), "the adapted weights stay as they were"


def test_merged_model_saves_and_loads_without_peft(tmp_path):
    adapted = trained_adapters()
    expected = answers(adapted)
    merged = merge_adapters(adapted)
    assert isinstance(merged, EoMTForUniversalSegmentation)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in tiny_eomt().named_parameters()}
    merged.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    loaded = AutoModelForUniversalSegmentation.from_pretrained(tmp_path).eval()
    assert loaded.config.masked_attention_probabilities == [0.0, 0.0]
    for one, another in zip(answers(loaded), expected, strict=True):
        torch.testing.assert_close(one, another, rtol=1e-5, atol=1e-5)
    plain = tiny_eomt()
    assert merge_adapters(plain) is plain


@pytest.mark.parametrize("family", [{}, DINOV2_GIANT])
def test_weights_are_merged_as_peft_merges_them(family):
    adapted = trained_adapters(**family)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    merged = merged_weights(adapted, adapted.state_dict())
    after = adapted.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()), "the model goes on training"
    expected = merge_adapters(adapted).state_dict()
    assert merged.keys() == expected.keys() == tiny_eomt(**family).state_dict().keys()
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name


def test_a_checkpoint_of_adapters_is_a_model_and_goes_on_to_the_bit(tmp_path):
    lora = {"lora": {"rank": 2}, "warmup_steps": [0], "ema_decay": 0.9}
    train(tiny_recipe(tmp_path / "one", **lora), cpu=True, progress=False)

    def crash(number, loss):
        if number == 5:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        train(tiny_recipe(tmp_path / "two", **lora), cpu=True, progress=False, on_step=crash)
    train(tiny_recipe(tmp_path / "two", **lora), cpu=True, progress=False)
    assert_equal(saved_tensors(tmp_path / "one"), saved_tensors(tmp_path / "two"))

    folder = tmp_path / "two" / "checkpoints" / "step-00000006"
    check(folder)
    state = read(folder)
    adapted = [name for name in state.model if ".lora_" in name]
    assert adapted
    model, _ = load_segmentation_model(str(folder))
    with torch.no_grad():
        for name in adapted:  # what is loaded is what was trained, adapters and all
            layer, _, rest = name.partition(".lora_A.")
            if rest:
                up, down = state.model[f"{layer}.lora_B.default.weight"], state.model[name]
                expected = state.model[f"{layer}.base_layer.weight"] + up @ down * (32 / 2)
                own = model.get_parameter(f"{layer.removeprefix('base_model.model.')}.weight")
                torch.testing.assert_close(own, expected, rtol=0, atol=1e-6)
                assert not torch.equal(own, state.model[f"{layer}.base_layer.weight"])
    trained_in_full = "base_model.model.class_predictor.modules_to_save.default.weight"
    assert torch.equal(model.class_predictor.weight, state.model[trained_in_full])

    recipe = tiny_recipe(tmp_path / "three", init=str(folder), model_config={}, steps=1, warmup_steps=[0])
    started, _ = EoMTTask(recipe).build_model()
    assert torch.equal(started.class_predictor.weight, model.class_predictor.weight)


def test_adapters_alone_go_back_onto_their_model(tmp_path):
    adapted = trained_adapters()
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    fresh = tiny_eomt()
    fresh.set_masked_attention_probabilities(0.0)
    assert_same(PeftModel.from_pretrained(fresh, tmp_path).eval(), adapted)


def test_the_recipe_trains_few_parameters_at_one_rate():
    recipe = load_recipe("own_lora")
    assert recipe.layer_decay == 1.0
    model = add_adapters(tiny_eomt(), recipe.lora)
    assert model.peft_config["default"].r == 16
    assert model.peft_config["default"].lora_alpha == 32
    rates = {group["lr"] for group in parameter_groups(model, derive(recipe, 16, config=model.config))}
    assert rates == {2e-4}


def test_targets_can_be_chosen_and_unknown_ones_are_told(monkeypatch):
    model = add_adapters(tiny_eomt(), {**LORA, "targets": ["q_proj", "v_proj"]})
    names = {name.partition(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_" in name}
    assert names == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match=r"qkv, which the blocks do not have; choose from fc1"):
        add_adapters(tiny_eomt(), {"targets": ["qkv"]})
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install"):
        add_adapters(tiny_eomt(), LORA)
