"""Freezing: which parameters, that they stay as they are, and that frozen blocks compute as in inference."""

import copy

import pytest
import torch

from hf_segvit.training.derivation import derive
from hf_segvit.training.optimizers import build_optimizer, freeze, parameter_groups
from hf_segvit.training.recipe import Recipe

from .tiny_models import tiny_eomt


def batch():
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, :32] = masks[1, 32:] = True
    return {
        "pixel_values": torch.randn(2, 3, 64, 64, generator=generator),
        "mask_labels": [masks, masks],
        "class_labels": [torch.tensor([0, 1]), torch.tensor([2, 3])],
    }


@pytest.mark.parametrize(
    ("setting", "prefixes"),
    [
        (None, ()),
        ("backbone", ("eomt.embeddings.", "eomt.layers.", "eomt.layernorm.")),
        ("until_layer:0", ("eomt.embeddings.",)),
        ("until_layer:2", ("eomt.embeddings.", "eomt.layers.0.", "eomt.layers.1.")),
        ("until_layer:4", ("eomt.embeddings.", "eomt.layers.")),
    ],
)
def test_what_is_frozen_and_that_a_step_leaves_it_alone(setting, prefixes):
    model = tiny_eomt()
    frozen = freeze(model, setting)
    assert frozen == [name for name, _ in model.named_parameters() if prefixes and name.startswith(prefixes)]
    plan = derive(Recipe(steps=10, learning_rate=0.1, layer_decay=1.0), 16, config=model.config)
    grouped = {name for group in parameter_groups(model, plan) for name in group["names"]}
    assert grouped == {name for name, _ in model.named_parameters()} - set(frozen)

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, plan)
    model.train()
    model(**batch()).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved is (name not in frozen), name


def test_gradients_of_the_rest_are_those_of_the_whole_model():
    def gradients(setting):
        model = tiny_eomt()
        freeze(model, setting)
        torch.manual_seed(0)
        model.train()(**batch()).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    whole, rest = gradients(None), gradients("until_layer:2")
    assert len(rest) < len(whole)
    for name, gradient in rest.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-5, atol=1e-6)


def test_frozen_blocks_have_no_stochastic_depth_also_after_train_and_in_a_copy():
    model = tiny_eomt(drop_path_rate=0.9)
    freeze(model, "until_layer:2")
    for tested in (model, copy.deepcopy(model)):
        for _ in range(2):
            tested.train()
            assert [layer.training for layer in tested.eomt.layers] == [False, False, True, True]
            assert [layer.drop_path.training for layer in tested.eomt.layers] == [False, False, True, True]
            assert tested.training
            tested.eval()
    model.train()
    states = torch.randn(3, 9, 32)
    assert torch.equal(model.eomt.layers[1](states), model.eomt.layers[1](states))
    assert not torch.equal(model.eomt.layers[3](states), model.eomt.layers[3](states))


def test_more_blocks_than_there_are():
    with pytest.raises(ValueError, match="the model has 4 blocks"):
        freeze(tiny_eomt(), "until_layer:5")
    with pytest.raises(ValueError, match="until_layer:N"):
        freeze(tiny_eomt(), "layers")
