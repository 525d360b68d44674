"""The plain ViT: back-ends agree, any grid is served, positions resample and rotate as the formulas say."""

import math

import pytest
import torch
from torch.nn import functional as F

from hf_segvit.models.configuration_plain_vit import PlainViTConfig
from hf_segvit.models.modeling_plain_vit import PlainViTModel, resample_position_embeddings
from hf_segvit.models.plain_vit_layers import PlainViTAttention, rotary_embeddings, rotate

from .tiny_models import FAMILIES, randomize

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 64}


def tiny_vit(family: str = "dinov2", attn_implementation: str = "sdpa", **overrides) -> PlainViTModel:
    config = PlainViTConfig(**{**SIZE, **FAMILIES[family], **overrides})
    config._attn_implementation = attn_implementation
    torch.manual_seed(0)
    return randomize(PlainViTModel(config)).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 80), (16, 16)])
def test_back_ends_agree_on_any_grid(family: str, height: int, width: int) -> None:
    pixels = torch.randn(2, 3, height, width)
    reference = tiny_vit(family, "eager")(pixels, output_attentions=True)
    tokens = 5 + (height // 16) * (width // 16)
    assert reference.last_hidden_state.shape == (2, tokens, 32)
    assert len(reference.attentions) == 3
    torch.testing.assert_close(reference.attentions[0].sum(-1), torch.ones(2, 2, tokens))
    # The same sums in another order: a few units in the last place of fp32.
    other = tiny_vit(family, "sdpa")(pixels).last_hidden_state
    torch.testing.assert_close(other, reference.last_hidden_state, rtol=1e-4, atol=1e-5)


@torch.no_grad()  # flex attention has no backward pass on the CPU
@pytest.mark.slow  # it compiles its kernel
@pytest.mark.parametrize("family", FAMILIES)
def test_flex_attention_agrees(family: str) -> None:
    pixels = torch.randn(2, 3, 32, 80)
    outputs = [tiny_vit(family, name)(pixels).last_hidden_state for name in ("flex_attention", "sdpa")]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


def test_leading_mask_is_the_same_in_every_back_end_and_leaves_other_rows_alone() -> None:
    hidden_states = torch.randn(2, 12, 32)
    mask = torch.rand(2, 1, 4, 12) > 0.5
    mask[..., 0] = True
    outputs = {}
    for name in ("eager", "sdpa"):
        config = PlainViTConfig(**SIZE)
        config._attn_implementation = name
        torch.manual_seed(0)
        attention = randomize(PlainViTAttention(config)).eval()
        outputs[name], weights = attention(hidden_states, leading_mask=mask)
        unmasked, _ = attention(hidden_states)
        torch.testing.assert_close(outputs[name][:, 4:], unmasked[:, 4:], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(outputs[name][:, :4], unmasked[:, :4])
        if name == "eager":
            full = torch.cat((mask, mask.new_ones(2, 1, 8, 12)), dim=2).expand(-1, 2, -1, -1)
            assert torch.equal(weights > 0, full)
    torch.testing.assert_close(outputs["sdpa"], outputs["eager"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    pixels = torch.randn(2, 3, 64, 64)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_vit(family).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
            assert all(layer.gradient_checkpointing for layer in model.layers)
        model(pixels).last_hidden_state.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_hidden_states_are_the_input_and_output_of_every_block() -> None:
    model = tiny_vit()
    pixels = torch.randn(1, 3, 32, 64)
    outputs = model(pixels, output_hidden_states=True)
    assert len(outputs.hidden_states) == 4
    torch.testing.assert_close(outputs.hidden_states[0], model.embeddings(pixels))
    torch.testing.assert_close(outputs.hidden_states[1], model.layers[0](outputs.hidden_states[0]))
    torch.testing.assert_close(outputs.hidden_states[-1], outputs.last_hidden_state)


def test_position_embeddings_resample_as_bicubic_with_antialiasing() -> None:
    table = torch.randn(4 * 6, 8)
    assert resample_position_embeddings(table, (4, 6), (4, 6)) is table
    resampled = resample_position_embeddings(table, (4, 6), (3, 5))
    grid = table.T.reshape(1, 8, 4, 6)
    expected = F.interpolate(grid, size=(3, 5), mode="bicubic", antialias=True).reshape(8, 15).T
    torch.testing.assert_close(resampled, expected)


def test_rotary_embeddings_follow_the_published_formula() -> None:
    rows, columns, head_size, theta = 3, 5, 16, 100.0
    cosines, sines = rotary_embeddings((rows, columns), head_size, theta, 2, torch.device("cpu"))
    assert cosines.shape == (2 + rows * columns, head_size)
    assert torch.equal(cosines[:2], torch.ones(2, head_size))
    assert torch.equal(sines[:2], torch.zeros(2, head_size))
    for row in range(rows):
        for column in range(columns):
            y, x = 2 * (row + 0.5) / rows - 1, 2 * (column + 0.5) / columns - 1
            for channel in range(head_size):
                quarter, index = divmod(channel % (head_size // 2), head_size // 4)
                angle = 2 * math.pi * (x if quarter else y) * theta ** (-index * 4 / head_size)
                token = 2 + row * columns + column
                assert cosines[token, channel].item() == pytest.approx(math.cos(angle), abs=1e-5)
                assert sines[token, channel].item() == pytest.approx(math.sin(angle), abs=1e-5)


def test_rotation_keeps_lengths_and_depends_on_differences_only() -> None:
    cosines, sines = rotary_embeddings((1, 8), 16, 100.0, 0, torch.device("cpu"))
    query, key = torch.randn(16), torch.randn(16)
    queries = rotate(query.expand(1, 1, 8, 16), cosines, sines)
    keys = rotate(key.expand(1, 1, 8, 16), cosines, sines)
    torch.testing.assert_close(queries.norm(dim=-1), query.norm().expand(1, 1, 8))
    scores = (queries @ keys.transpose(-1, -2))[0, 0]
    for offset in range(-7, 8):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal), rtol=1e-4, atol=1e-4)


def test_drop_path_drops_whole_samples_in_training_only() -> None:
    model = tiny_vit(drop_path_rate=0.9)
    assert [layer.drop_path.rate for layer in model.layers] == pytest.approx([0.0, 0.45, 0.9])
    drop_path = model.layers[-1].drop_path
    states = torch.ones(400, 2, 3)
    assert torch.equal(drop_path(states), states)
    dropped = drop_path.train()(states)
    per_sample = dropped.flatten(1)
    torch.testing.assert_close(per_sample.unique(), torch.tensor([0.0, 10.0]))
    assert torch.equal(per_sample.amin(1), per_sample.amax(1))
    assert 0.02 < (per_sample[:, 0] > 0).float().mean() < 0.25


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 60, 64), "60 x 64 pixels.*patch_size=16"),
        ((1, 3, 64, 0), "64 x 0"),
        ((1, 4, 64, 64), "batch, 3, height, width"),
        ((3, 64, 64), "batch, 3, height, width"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_vit()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads=5 does not divide hidden_size=32"),
        ({"image_size": 60}, r"image_size=60 is not a multiple of patch_size=16.*\[64, 64\]"),
        ({"image_size": [64, 70]}, r"nearest that is: \[64, 64\]"),
        ({"image_size": [64, 64, 64]}, "int or .height, width."),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"num_register_tokens": -1}, "num_register_tokens=-1"),
        ({"position_embedding_type": "sine"}, "position_embedding_type='sine' is not one of"),
        ({"position_embedding_type": "rope", "num_attention_heads": 16}, "multiple of 4 channels"),
        ({"mlp_type": "moe"}, "mlp_type='moe' is not one of"),
        ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, "num_labels=3 disagrees with id2label, which names 2"),
    ],
)
def test_impossible_configs_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlainViTConfig(**{**SIZE, **fields})


def test_fields_set_after_construction_are_checked_by_the_model() -> None:
    config = PlainViTConfig(**SIZE)
    config.num_attention_heads = 3
    with pytest.raises(ValueError, match="num_attention_heads=3"):
        PlainViTModel(config)
