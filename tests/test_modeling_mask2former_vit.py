"""Mask2Former on a plain ViT: rows 0 to 3 of EoMT's Table 1, beside stock Mask2Former and plain formulas."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder, Mask2FormerTransformerModule

from hf_segvit.models.configuration_mask2former_vit import REMOVABLE_PARTS
from hf_segvit.models.modeling_mask2former_vit import Mask2FormerViTForUniversalSegmentation, transformers_config

from .tiny_models import tiny_mask2former_vit, tiny_mask2former_vit_config


@pytest.mark.parametrize("removed", REMOVABLE_PARTS)
def test_outputs_have_the_promised_shapes_on_any_grid(removed: str) -> None:
    model = tiny_mask2former_vit(removed)
    for height, width in ((64, 64), (48, 80)):
        outputs = model(torch.randn(2, 3, height, width), output_auxiliary_logits=True)
        assert outputs.class_queries_logits.shape == (2, 7, 6)
        assert outputs.masks_queries_logits.shape == (2, 7, height // 4, width // 4)
        assert len(outputs.auxiliary_logits) == 3
        assert outputs.auxiliary_logits[0]["masks_queries_logits"].shape == outputs.masks_queries_logits.shape
        assert outputs.auxiliary_logits[0]["class_queries_logits"].shape == (2, 7, 6)


@pytest.mark.parametrize("removed", REMOVABLE_PARTS)
def test_every_parameter_gets_a_gradient_from_the_loss(removed: str) -> None:
    model = tiny_mask2former_vit(removed).train()
    generator = torch.Generator().manual_seed(1)
    masks = [torch.rand(n, 64, 96, generator=generator) > 0.6 for n in (3, 2)]
    classes = [torch.tensor([0, 1, 2]), torch.tensor([3, 4])]
    outputs = model(torch.randn(2, 3, 64, 96, generator=generator), mask_labels=masks, class_labels=classes)
    outputs.loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []
    # Before the first layer, and after each of three.
    assert {name.rpartition("_")[2] for name in outputs.loss_dict} == {"0", "1", "2", "3"}
    weights = {"class": 2, "mask": 5, "dice": 5}
    total = sum(weights[name.split("_")[1]] * value for name, value in outputs.loss_dict.items())
    torch.testing.assert_close(outputs.loss.detach(), total)


@pytest.mark.parametrize("removed", REMOVABLE_PARTS)
def test_saved_and_loaded_models_answer_alike(removed: str, tmp_path) -> None:
    model = tiny_mask2former_vit(removed)
    model.save_pretrained(tmp_path)
    loaded = Mask2FormerViTForUniversalSegmentation.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 64, 64)
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert torch.equal(getattr(loaded(pixels), name), getattr(model(pixels), name))
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


@pytest.mark.parametrize("removed", REMOVABLE_PARTS)
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(removed: str) -> None:
    model = tiny_mask2former_vit(removed)
    pixels = torch.randn(3, 3, 64, 96)
    together = model(pixels)
    for index in range(3):
        alone = model(pixels[index : index + 1])
        for name in ("class_queries_logits", "masks_queries_logits"):
            torch.testing.assert_close(getattr(together, name)[index], getattr(alone, name)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("removed", REMOVABLE_PARTS)
@torch.no_grad()
def test_odd_sizes_are_padded_and_cropped_back(removed: str) -> None:
    model = tiny_mask2former_vit(removed)
    pixels = torch.randn(1, 3, 48, 80)
    odd = model(pixels)
    # A single scale needs no padding: its patches are those of the image.
    size = (48, 80) if removed == "multi_scale" else (64, 96)
    padded = model(F.pad(pixels, (0, size[1] - 80, 0, size[0] - 48)))
    assert torch.equal(odd.class_queries_logits, padded.class_queries_logits)
    assert torch.equal(odd.masks_queries_logits, padded.masks_queries_logits[..., :12, :20])
    tokens = model.config.num_prefix_tokens + size[0] * size[1] // 256
    assert odd.last_hidden_state.shape == (1, tokens, 32)
    with pytest.raises(ValueError, match="both sides must be multiples of patch_size=16"):
        model(torch.randn(1, 3, 50, 80))


@torch.no_grad()
def test_with_the_pixel_decoder_it_computes_what_stock_mask2former_computes() -> None:
    """Rows 0 and 1: stock modules that are built and loaded on their own, with the ViT's features as input."""
    for removed in ("nothing", "adapter"):
        model = tiny_mask2former_vit(removed)
        pixels = torch.randn(2, 3, 64, 96)
        stock = stock_mask2former(model)
        features, _ = model.mask2former.encode(pixels)
        assert [tuple(each.shape) for each in features] == [(2, 32, 64 // s, 96 // s) for s in (4, 8, 16, 32)]
        stock.model.pixel_level_module.encoder = FixedFeatures(features)
        expected = stock(pixels, output_auxiliary_logits=True)
        outputs = model(pixels, output_auxiliary_logits=True)
        torch.testing.assert_close(outputs.masks_queries_logits, expected.masks_queries_logits)
        torch.testing.assert_close(outputs.class_queries_logits, expected.class_queries_logits)
        for ours, theirs in zip(outputs.auxiliary_logits, expected.auxiliary_logits, strict=True):
            for name in ("masks_queries_logits", "class_queries_logits"):
                torch.testing.assert_close(ours[name], theirs[name])


@torch.no_grad()
def test_without_the_pixel_decoder_it_computes_what_the_stock_transformer_decoder_computes() -> None:
    """Rows 2 and 3: row 3 is a stock decoder that reads one map at all its three levels."""
    for removed in ("pixel_decoder", "multi_scale"):
        model = tiny_mask2former_vit(removed).mask2former
        config = transformers_config(model.config)
        config.enforce_input_projection = True
        stock = Mask2FormerTransformerModule(32, config).eval()
        weights = {
            name.removeprefix("transformer_module."): tensor
            for name, tensor in model.state_dict().items()
            if name.startswith("transformer_module.")
        }
        if removed == "multi_scale":
            for level in (1, 2):
                for part in ("weight", "bias"):
                    weights[f"input_projections.{level}.{part}"] = weights[f"input_projections.0.{part}"]
            weights["level_embed.weight"] = weights["level_embed.weight"].repeat(3, 1)
        stock.load_state_dict(weights)
        pixels = torch.randn(2, 3, 64, 96)
        features, last_hidden_state = model.encode(pixels)
        finest, *others = features
        maps = others[::-1] if removed == "pixel_decoder" else others * 3
        expected = stock(maps, model.mask_projection(finest))
        outputs = model(pixels)
        for ours, theirs in zip(outputs.masks_queries_logits, expected.masks_queries_logits, strict=True):
            torch.testing.assert_close(ours, theirs)
        for ours, theirs in zip(outputs.query_hidden_states, expected.intermediate_hidden_states, strict=True):
            torch.testing.assert_close(ours, theirs.transpose(0, 1))
        # The patches themselves are the features of stride 16.
        patches = last_hidden_state[:, model.config.num_prefix_tokens :].transpose(1, 2)
        assert torch.equal(features[-1 if removed == "multi_scale" else 2].flatten(2), patches)


class FixedFeatures(torch.nn.Module):
    """A backbone that gives the features that it was made with."""

    def __init__(self, features: list[torch.Tensor]) -> None:
        super().__init__()
        self.features = features

    def forward(self, pixel_values: torch.Tensor):
        return SimpleNamespace(feature_maps=self.features)


def stock_mask2former(model: Mask2FormerViTForUniversalSegmentation) -> Mask2FormerForUniversalSegmentation:
    """Transformers' own Mask2Former with the weights of our pixel decoder, transformer decoder and class head."""
    config = transformers_config(model.config)
    config.num_labels = model.config.num_labels
    stages = [f"stage{number}" for number in (1, 2, 3, 4)]
    config.backbone_config = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, out_features=stages)
    stock = Mask2FormerForUniversalSegmentation(config).eval()
    stock.model.pixel_level_module.decoder = Mask2FormerPixelDecoder(config, feature_channels=[32] * 4).eval()
    prefixes = {"mask2former.pixel_decoder.": "model.pixel_level_module.decoder."}
    prefixes |= {"mask2former.transformer_module.": "model.transformer_module.", "class_predictor.": "class_predictor."}
    weights = {
        theirs + name.removeprefix(ours): tensor
        for name, tensor in model.state_dict().items()
        for ours, theirs in prefixes.items()
        if name.startswith(ours)
    }
    report = stock.load_state_dict(weights, strict=False)
    assert report.unexpected_keys == []
    assert all(name.startswith(("model.pixel_level_module.encoder.", "criterion.")) for name in report.missing_keys)
    return stock


@torch.no_grad()
def test_the_pyramid_scales_as_plain_convolutions_do() -> None:
    pyramid = tiny_mask2former_vit("adapter").mask2former.pyramid
    patches = torch.randn(2, 4, 6, 32)

    def scaled(layer, features, down):
        convolve = F.conv2d if down else F.conv_transpose2d
        features = F.gelu(convolve(features, layer.conv1.weight, layer.conv1.bias, stride=2))
        features = F.conv2d(features, layer.conv2.weight, padding=1, groups=32).permute(0, 2, 3, 1)
        norm = layer.layernorm2d
        return F.layer_norm(features, (32,), norm.weight, norm.bias, eps=1e-6).permute(0, 3, 1, 2)

    f16 = patches.permute(0, 3, 1, 2)
    f4 = f16
    for layer in pyramid.scales[0].block:
        f4 = scaled(layer, f4, down=False)
    expected = [f4, scaled(pyramid.scales[1].block[0], f16, down=False), f16, scaled(pyramid.scales[3], f16, down=True)]
    for ours, theirs in zip(pyramid(patches), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_at_first_the_adapter_leaves_the_vit_as_it_was_and_its_blocks_are_divided_evenly() -> None:
    for depth, groups in ((4, [1, 1, 1, 1]), (7, [1, 2, 2, 2])):
        torch.manual_seed(0)
        config = tiny_mask2former_vit_config(num_hidden_layers=depth)
        model = Mask2FormerViTForUniversalSegmentation(config).mask2former.eval()
        pixels = torch.randn(1, 3, 64, 64)
        _, tokens = model.encode(pixels)
        expected = model.embeddings(pixels)
        for layer in model.layers:
            expected = layer(expected)
        assert torch.equal(tokens, expected)
        order: list[str] = []
        for layer in model.layers:
            layer.register_forward_hook(lambda *_, order=order: order.append("x"))
        for interaction in model.adapter.interactions:
            interaction.injector.register_forward_hook(lambda *_, order=order: order.append("|"))
        model.encode(pixels)
        assert [len(group) for group in "".join(order).split("|")[1:]] == groups


def test_initial_weights_are_those_of_transformers_and_no_parameter_is_left_out() -> None:
    model = Mask2FormerViTForUniversalSegmentation(tiny_mask2former_vit_config()).mask2former
    attentions = [model.adapter.interactions[0].injector.attention, model.pixel_decoder.encoder.layers[0].self_attn]
    for attention in attentions:
        assert not attention.sampling_offsets.weight.any()
        offsets = attention.sampling_offsets.bias.view(attention.n_heads, -1, 4, 2)
        # The first head looks to the right, the n-th point n cells away.
        assert offsets[0, 0].tolist() == [[1, 0], [2, 0], [3, 0], [4, 0]]
    with torch.device("meta"):
        built = Mask2FormerViTForUniversalSegmentation(tiny_mask2former_vit_config())
    assert {tensor.device.type for tensor in built.state_dict().values()} == {"meta"}
    queries = model.transformer_module.queries_features.weight
    assert 0.8 < queries.std() < 1.2
    assert not any(injector.injector.gamma.any() for injector in model.adapter.interactions)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 3}, r"num_hidden_layers=3: the adapter interacts with 4 groups of blocks.*'adapter'"),
        ({"removed": "everything"}, r"removed='everything' is not one of \('nothing', 'adapter'"),
        ({"patch_size": 14, "image_size": 56}, r"patch_size=14 must be 16: .*from_backbone\(..., patch_size=16\)"),
        # Of an image size that only the right patch size divides, too: its own message would send one astray.
        ({"patch_size": 14}, r"patch_size=14 must be 16"),
        (
            {"removed": "pixel_decoder", "num_decoder_layers": 2},
            r"num_decoder_layers=2: .* at least 3",
        ),
        ({"decoder_hidden_size": 48}, r"decoder_hidden_size=48 must be a multiple of 32"),
        ({"num_decoder_attention_heads": 5}, r"and of num_decoder_attention_heads=5"),
        ({"num_adapter_attention_heads": 3}, r"num_adapter_attention_heads=3 does not divide hidden_size=32"),
        ({"adapter_value_ratio": 0}, r"adapter_value_ratio=0 must be positive"),
        ({"num_queries": 0}, r"num_queries=0 must be at least 1"),
        ({"loss_normalization": "local"}, r"loss_normalization='local' is not one of"),
    ],
)
def test_impossible_configurations_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_mask2former_vit_config(**fields)
    if "num_decoder_layers" in fields:
        for other in ("nothing", "adapter", "multi_scale"):
            assert tiny_mask2former_vit_config(other, num_decoder_layers=2).num_decoder_layers == 2
    if "num_hidden_layers" in fields:
        assert tiny_mask2former_vit_config(removed="adapter", **fields).num_hidden_layers == 3


def test_labels_are_checked_before_the_forward_pass() -> None:
    model = tiny_mask2former_vit()
    with pytest.raises(ValueError, match="mask_labels came without class_labels"):
        model(torch.randn(1, 3, 64, 64), mask_labels=[torch.zeros(1, 64, 64)])
    with pytest.raises(ValueError, match="class"):
        model(torch.randn(1, 3, 64, 64), mask_labels=[torch.zeros(1, 64, 64)], class_labels=[torch.tensor([5])])
