"""Token merging: the rule against a plain one, positions, batches, cost, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from hf_segvit.cli import main
from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.hub.remote_code import code_files
from hf_segvit.inference.segmenter import Segmenter, merge_tokens
from hf_segvit.models import cpu_kernels, plain_vit_layers, token_merging
from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.configuration_vit_p import ViTPConfig
from hf_segvit.models.cpu_kernels import CPUKernels
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation, EoMTModel
from hf_segvit.models.modeling_vit_p import ViTPForPointClassification
from hf_segvit.models.modeling_vit_p_fusion import ViTPFusionForUniversalSegmentation
from hf_segvit.models.plain_vit_layers import rotary_embeddings
from hf_segvit.models.token_merging import MergedTokens
from hf_segvit.training.recipe import Recipe
from hf_segvit.training.tasks.eomt import EoMTTask

from .test_cost_guard import attention_flops
from .tiny_models import DINOV2, DINOV3, FAMILIES, tiny_config, tiny_eomt

EVA = {"position_embedding_type": "learned_rope", "rope_reference_grid": 16, "rope_theta": 10000}
BARE = {"use_cls_token": False, "num_register_tokens": 0}
ANNEALED = {"masked_attention": False}
PIXELS = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def smooth(batch_size: int = 2) -> torch.Tensor:
    """Images that are flat in some places and noisy in others, each another share."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.zeros(batch_size, 3, 64, 96)
    for index in range(batch_size):
        width = 32 * (index + 1)
        pixels[index, :, :, :width] = torch.randn(3, 64, width, generator=generator)
    return pixels


def token_counts(model: EoMTForUniversalSegmentation, pixels: torch.Tensor) -> list[int]:
    """Tokens that come out of each block."""
    counts: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: counts.append(output.shape[1]))
        for layer in model.eomt.layers
    ]
    with torch.no_grad():
        model(pixels)
    for hook in hooks:
        hook.remove()
    return counts


# The rule


def cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True)) / (math.hypot(*one) * math.hypot(*other))


def mean(vectors: list[list[float]]) -> list[float]:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def plain_windows(images, height, width, threshold, batch_lowest):
    """Merge windows as the papers say: per image a list of (patches, vector)."""
    ranked = []
    for patches in images:
        windows = []
        for row in range(0, height, 2):
            for column in range(0, width, 2):
                corner = row * width + column
                members = [corner, corner + 1, corner + width, corner + width + 1]
                pairs = [(i, j) for i in members for j in members if i < j]
                windows.append((sum(cosine(patches[i], patches[j]) for i, j in pairs) / len(pairs), members))
        ranked.append(windows)
    counts = [sum(score >= threshold for score, _ in windows) for windows in ranked]
    results = []
    for patches, windows, own in zip(images, ranked, counts, strict=True):
        count = min(counts) if batch_lowest else own
        chosen = sorted(range(len(windows)), key=lambda index: -windows[index][0])[:count]
        tokens = [(windows[i][1], mean([patches[j] for j in windows[i][1]])) for i in sorted(chosen)]
        for index, (_, members) in enumerate(windows):
            if index not in chosen:
                tokens += [([j], patches[j]) for j in members]
        results.append(tokens)
    return results


def plain_alike(images, patch_vectors, layer, batch_lowest):
    """Merge every second token into the one most like it, from an image's own threshold on."""
    matched = []
    for tokens in images:
        movers, targets = tokens[0::2], tokens[1::2]
        best = []
        for _, vector in movers:
            scores = [cosine(vector, other) for _, other in targets]
            best.append((max(scores), scores.index(max(scores))))
        average = sum(score for score, _ in best) / len(best)
        deviation = math.sqrt(sum((score - average) ** 2 for score, _ in best) / len(best))
        matched.append((best, sum(score >= average + deviation / layer for score, _ in best)))
    results = []
    for tokens, patches, (best, own) in zip(images, patch_vectors, matched, strict=True):
        count = min(number for _, number in matched) if batch_lowest else own
        chosen = sorted(range(len(best)), key=lambda index: -best[index][0])[:count]
        groups = [list(members) for members, _ in tokens[1::2]]
        alone = []
        for index, (members, _) in enumerate(tokens[0::2]):
            if index in chosen:
                groups[best[index][1]] += members
            else:
                alone.append(members)
        results.append([(group, mean([patches[j] for j in group])) for group in alone + groups])
    return results


@pytest.mark.parametrize("batch_lowest", [True, False])
@pytest.mark.parametrize("settings", [DINOV2, DINOV3, EVA])
def test_the_rule_is_that_of_a_plain_implementation(settings, batch_lowest) -> None:
    height, width, layer, threshold = 6, 8, 3, 0.8
    config = tiny_config(**settings, token_merging_threshold=threshold)
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(3, height // 2, 1, width // 2, 1, 16, generator=generator)
    noise = torch.rand(3, height // 2, 1, width // 2, 1, 1, generator=generator)
    patches = patches + noise * torch.randn(3, height // 2, 2, width // 2, 2, 16, generator=generator)
    patches = patches.reshape(3, height * width, 16)
    prefix = torch.randn(3, 2, 16, generator=generator)
    vectors = patches.double().tolist()
    expected = plain_windows(vectors, height, width, threshold, batch_lowest)
    # Blocks lie between the two steps in a model; a mean of means weighted by size is the mean of all patches.
    final = plain_alike(expected, vectors, layer, batch_lowest)
    lengths = {len(tokens) for tokens in expected}
    assert batch_lowest is (len(lengths) == 1)
    assert max(lengths) < height * width
    batches = [slice(0, 3)] if batch_lowest else [slice(index, index + 1) for index in range(3)]
    head_size = config.hidden_size // config.num_attention_heads
    full = rotary_embeddings(
        (height, width), head_size, config.rope_theta, 2, patches.device, config.rope_reference_grid
    )
    for batch in batches:
        merged = MergedTokens(config, (height, width), 2, patches.device)
        states = merged.merge_windows(torch.cat((prefix[batch], patches[batch]), dim=1))
        for step, tokens_of in ((1, expected), (2, final)):
            if step == 2:
                states = merged.merge_alike(states, layer)
            assert torch.equal(states[:, :2], prefix[batch])
            for row, tokens in enumerate(tokens_of[batch]):
                assert states.shape[1] == 2 + len(tokens)
                torch.testing.assert_close(states[row, 2:], torch.tensor([vector for _, vector in tokens]))
                assert merged.sizes[row].tolist() == [len(members) for members, _ in tokens]
                owners = {member: index for index, (members, _) in enumerate(tokens) for member in members}
                assert merged.indices[row].tolist() == [owners[patch] for patch in range(height * width)]
                if not config.has_rotary_positions:
                    assert merged.position_embeddings() is None
                    continue
                # Tokens of one patch are rotated as that patch is, others by the mean of their patches' angles.
                cosines, sines = (part[row, 0] for part in merged.position_embeddings())
                assert torch.equal(cosines[:2], torch.ones(2, head_size))
                single = [(index, members[0]) for index, (members, _) in enumerate(tokens) if len(members) == 1]
                assert single
                for index, patch in single:
                    torch.testing.assert_close(cosines[2 + index], full[0][2 + patch])
                    torch.testing.assert_close(sines[2 + index], full[1][2 + patch])
        grid = merged.unmerge(states)
        assert grid.shape == (len(patches[batch]), 2 + height * width, 16)
        torch.testing.assert_close(grid[:, 2:], states[:, 2:].gather(1, merged.indices[..., None].expand(-1, -1, 16)))


@pytest.mark.parametrize(("reference", "offset"), [(None, 0), (16, 0), (16, 1)])
def test_a_merged_window_is_rotated_by_the_position_of_its_middle(reference, offset) -> None:
    settings = {"rope_reference_grid": reference, "rope_offset": offset}
    config = tiny_config(position_embedding_type="rope", token_merging_threshold=0.9, **settings)
    merged = MergedTokens(config, (4, 6), 3, torch.device("cpu"))
    merged.merge_windows(torch.ones(2, 3 + 24, 8))
    # The middles of windows are the middles of patches twice as large, which start half a small patch later.
    expected = rotary_embeddings((2, 3), 16, 100.0, 3, torch.device("cpu"), reference, (offset + 0.5) / 2)
    for part, whole in zip(merged.position_embeddings(), expected, strict=True):
        torch.testing.assert_close(part, whole.expand(2, 1, -1, -1))


def test_similarities_in_half_precision_are_computed_in_full() -> None:
    merged = MergedTokens(tiny_config(token_merging_threshold=1.0), (2, 2), 0, torch.device("cpu"))
    states = merged.merge_windows(torch.randn(1, 1, 32).expand(1, 4, 32).bfloat16())
    assert states.dtype == torch.bfloat16
    assert states.shape == (1, 1, 32)


# The model


@pytest.mark.parametrize("end", ["queries", "upscaling"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_a_merge_answers_are_those_of_the_model(family, end) -> None:
    model = tiny_eomt(**FAMILIES[family], **ANNEALED)
    expected = model(PIXELS)
    # Tokens are in another order then, and come back to the grid; random patches are not alike.
    model.merge_tokens(1.0, layers=[1], end=end)
    assert token_counts(model, PIXELS)[0] == model.config.num_prefix_tokens + 24
    for name in ("class_queries_logits", "masks_queries_logits", "last_hidden_state"):
        torch.testing.assert_close(model(PIXELS)[name], expected[name], rtol=1e-4, atol=1e-4)
    model.merge_tokens(0.2, end=end)
    assert not torch.allclose(model(PIXELS).masks_queries_logits, expected.masks_queries_logits, atol=1e-2)
    model.merge_tokens(None)
    assert torch.equal(model(PIXELS).masks_queries_logits, expected.masks_queries_logits)


@pytest.mark.parametrize("position_embedding_type", ["learned", "rope", "learned_rope"])
@torch.no_grad()
def test_constant_images_merge_fully_and_lose_nothing(position_embedding_type) -> None:
    model = tiny_eomt(**BARE, **ANNEALED, position_embedding_type=position_embedding_type, image_size=[64, 96])
    if position_embedding_type != "rope":
        model.eomt.embeddings.position_embeddings.weight.fill_(0.25)
    pixels = torch.ones(2, 3, 64, 96) * torch.tensor([0.5, -1.0])[:, None, None, None]
    expected = model(pixels)
    model.merge_tokens(0.999, layers=[1, 2])
    # 24 patches: 6 windows, of which every second joins another; then 7 queries and the grid.
    assert token_counts(model, pixels) == [6, 3, 31, 31]
    for name in ("class_queries_logits", "masks_queries_logits"):
        torch.testing.assert_close(model(pixels)[name], expected[name], rtol=1e-4, atol=1e-4)
    model.merge_tokens(0.999, end="upscaling")
    assert token_counts(model, pixels) == [6, 3, 10, 10]


@torch.no_grad()
def test_batches_merge_as_much_as_the_image_that_allows_the_least() -> None:
    model = tiny_eomt(**DINOV3, **ANNEALED)
    pixels = smooth()
    prefix = model.config.num_prefix_tokens
    model.merge_tokens(0.9, layers=[1])
    alone = [token_counts(model, image[None])[0] - prefix for image in pixels]
    assert alone[0] < alone[1] < 24
    assert token_counts(model, pixels)[0] - prefix == max(alone)
    assert not torch.allclose(
        model(pixels).masks_queries_logits[0], model(pixels[:1]).masks_queries_logits[0], atol=1e-3
    )


@pytest.mark.parametrize("end", ["queries", "upscaling"])
@pytest.mark.parametrize("family", [DINOV2, DINOV3, EVA])
@torch.no_grad()
def test_image_by_image_an_answer_does_not_depend_on_the_batch(family, end) -> None:
    model = tiny_eomt(**family, **ANNEALED).merge_tokens(0.9, end=end, batch="per_image")
    pixels = smooth(3)
    together = model(pixels)
    for index, image in enumerate(pixels):
        alone = model(image[None])
        for name in ("class_queries_logits", "masks_queries_logits"):
            torch.testing.assert_close(together[name][index], alone[name][0], rtol=1e-4, atol=1e-4)
    assert torch.equal(model(pixels[[2, 1, 0]]).masks_queries_logits.flip(0), together.masks_queries_logits)


@torch.no_grad()
def test_masked_attention_goes_with_tokens_back_on_the_grid() -> None:
    model = tiny_eomt(masked_attention_probabilities=[1.0, 0.0])
    expected = model(PIXELS).masks_queries_logits
    model.merge_tokens(1.0, layers=[1])
    torch.testing.assert_close(model(PIXELS).masks_queries_logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"1 of 2 query layers mask it .*use end='queries', or anneal"):
        model.merge_tokens(0.9, end="upscaling")
    assert (model.config.token_merging_threshold, model.config.token_merging_end) == (1.0, "queries")
    model.config.token_merging_end = "upscaling"  # as a configuration may come
    with pytest.raises(ValueError, match="1 of 2 query layers mask it"):
        model(PIXELS)


@torch.no_grad()
def test_optimised_models_merge_the_same() -> None:
    model = tiny_eomt(**DINOV3, **ANNEALED).merge_tokens(0.9)
    pixels = smooth()
    expected = model(pixels)
    model.optimize_for_inference(fuse_qkv=True, channels_last=True)
    torch.testing.assert_close(model(pixels).masks_queries_logits, expected.masks_queries_logits, rtol=1e-4, atol=1e-4)
    pruned = model(pixels, pruning_threshold=0.3)
    kept = pruned.kept_queries[0]
    torch.testing.assert_close(
        pruned.masks_queries_logits[0], expected.masks_queries_logits[0, kept], rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="compile=True: token merging makes the number of tokens depend on the image"):
        model.optimize_for_inference(compile=True)


def test_the_fallback_on_an_accelerator_is_said(caplog, monkeypatch) -> None:
    config, messages = tiny_config(token_merging_threshold=0.9), []
    monkeypatch.setattr(token_merging.logger, "warning", messages.append)
    assert token_merging.compile_unless_merging(config, None, torch.device("cuda")) is False
    assert "the model runs uncompiled" in messages[0]
    assert token_merging.compile_unless_merging(config, None, torch.device("cpu")) is False
    assert token_merging.compile_unless_merging(tiny_config(), None, torch.device("cuda")) is None
    assert len(messages) == 1


# Cost


@torch.no_grad()
def multiply_adds(kept: float | None, batch_size: int, end: str, monkeypatch) -> float:
    """Billions, of an annealed EoMT-L at 1024 x 1024, with this share of its tokens left after block 1."""
    monkeypatch.setattr(cpu_kernels, "KERNELS", CPUKernels())
    for cls in (EoMTForUniversalSegmentation, EoMTModel):
        monkeypatch.setattr(cls, "init_weights", lambda self: None)  # needs memory
    for module in (cpu_kernels, plain_vit_layers):
        monkeypatch.setattr(module, "is_plain", lambda weight: True)
    config = EoMTConfig(image_size=1024, num_labels=19, masked_attention=False)
    if kept is not None:
        # What the images decide is given here, as fake tensors have no values: a merged window saves three tokens.
        tokens = 64 * 64 + config.num_prefix_tokens
        merged = round((1 - kept) * tokens / 3)
        monkeypatch.setattr(token_merging, "lowest_count", lambda passing: merged)
    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    with FakeTensorMode():
        model = EoMTForUniversalSegmentation(config).eval()
        if kept is not None:
            model.merge_tokens(0.9, layers=[1], end=end)
        with FlopCounterMode(display=False, custom_mapping=formulas) as flops:
            model(torch.zeros(batch_size, 3, 1024, 1024))
    return flops.get_total_flops() / 2e9


def test_multiply_adds_are_those_of_the_paper(monkeypatch) -> None:
    # EoMT's Table 9: Cityscapes images are two windows of 1024 x 1024; 4350 become 1183.
    assert multiply_adds(None, 2, "queries", monkeypatch) == pytest.approx(4350, rel=0.01)
    assert multiply_adds(0.29, 1, "upscaling", monkeypatch) == pytest.approx(591, rel=0.01)
    assert multiply_adds(0.29, 2, "upscaling", monkeypatch) == pytest.approx(1183, rel=0.01)


@pytest.mark.parametrize("end", ["queries", "upscaling"])
@pytest.mark.parametrize("kept", [0.26, 0.5, 0.8])
def test_multiply_adds_follow_the_share_of_tokens(kept, end, monkeypatch) -> None:
    depth, width, query_layers, queries, patches = 24, 1024, 4, 200, 4096
    merged = round((1 - kept) * (patches + 5) / 3)
    tokens = patches + 5 - 3 * merged

    def attention(count: int) -> int:
        return count * 4 * width**2 + 2 * count**2 * width

    def mlp(count: int) -> int:
        return 2 * count * width * 4 * width

    last = queries + (tokens if end == "upscaling" else patches + 5)
    blocks = attention(patches + 5) + mlp(tokens)  # the first merges after its attention
    blocks += (depth - query_layers - 1) * (attention(tokens) + mlp(tokens))
    blocks += query_layers * (attention(last) + mlp(last))
    embeddings = patches * width * 3 * 16**2
    upscaling = sum(4**step * patches * (4 * width**2 + 4 * 9 * width) for step in (0, 1))
    heads = 3 * queries * width**2 + queries * 20 * width + queries * 16 * patches * width
    total = embeddings + blocks + upscaling + heads
    assert multiply_adds(kept, 1, end, monkeypatch) == pytest.approx(total / 1e9, rel=1e-4)


# Settings


def test_settings_are_saved_with_the_model(tmp_path) -> None:
    model = tiny_eomt(**DINOV3, **ANNEALED)
    keys = list(model.state_dict())
    assert model.merge_tokens(0.9, layers=(1, 2), end="upscaling", batch="per_image") is model
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        expected = model(smooth()).masks_queries_logits
        model.save_pretrained(tmp_path)
        loaded = EoMTForUniversalSegmentation.from_pretrained(tmp_path)
        assert torch.equal(loaded(smooth()).masks_queries_logits, expected)
    assert loaded.config == EoMTConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert AutoConfig.from_pretrained(tmp_path).token_merging_layers == [1, 2]
    other = EoMTForUniversalSegmentation.from_pretrained(tmp_path, token_merging_threshold=None)
    with torch.no_grad():
        plain = tiny_eomt(**DINOV3, **ANNEALED)
        assert torch.equal(other(smooth()).masks_queries_logits, plain(smooth()).masks_queries_logits)
    assert "token_merging.py" in [path.name for path in code_files("segvit_eomt")]


def test_default_blocks_are_those_of_algm() -> None:
    assert EoMTConfig(num_hidden_layers=12, num_query_layers=3).merging_layers == (1, 5)
    assert EoMTConfig(num_hidden_layers=24).merging_layers == (1, 7)
    assert EoMTConfig(num_hidden_layers=40, num_query_layers=5).merging_layers == (1, 9)
    assert tiny_config().merging_layers == (1, 2)
    assert tiny_config(num_query_layers=3).merging_layers == (1,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0}, "token_merging_threshold=0 is a cosine similarity"),
        ({"threshold": 1.5}, "token_merging_threshold=1.5 is a cosine similarity"),
        ({"threshold": float("nan")}, "token_merging_threshold=nan is a cosine similarity"),
        ({"threshold": 0.9, "layers": [2, 1]}, r"token_merging_layers=\[2, 1\] must be one or two rising numbers"),
        ({"threshold": 0.9, "layers": [0]}, "from 1 to 2"),
        ({"threshold": 0.9, "layers": [1, 3]}, "from 1 to 2"),
        ({"threshold": 0.9, "layers": []}, r"token_merging_layers=\[\]"),
        ({"threshold": 0.9, "end": "masks"}, r"token_merging_end='masks' is not one of \('queries', 'upscaling'\)"),
        ({"threshold": 0.9, "batch": "mean"}, "token_merging_batch='mean' is not one of"),
    ],
)
def test_impossible_settings_are_refused_and_change_nothing(arguments, message) -> None:
    model = tiny_eomt(**ANNEALED)
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        model.merge_tokens(**arguments)
    assert model.config.to_dict() == before
    with pytest.raises(ValueError, match=message):
        tiny_config(**{f"token_merging_{name}": value for name, value in arguments.items()})


def test_settings_of_another_type_change_nothing() -> None:
    model = tiny_eomt(**ANNEALED)
    before = model.config.to_dict()
    with pytest.raises(Exception, match="token_merging_threshold"):
        model.merge_tokens("high")
    assert model.config.to_dict() == before


def test_queries_in_all_blocks_leave_no_room() -> None:
    with pytest.raises(ValueError, match="here they take part in all 4 blocks"):
        tiny_eomt(num_query_layers=4, **ANNEALED).merge_tokens(0.9)


def test_passes_that_cannot_merge_are_refused() -> None:
    model = tiny_eomt(**ANNEALED).merge_tokens(0.9)
    with pytest.raises(ValueError, match=r"48 x 64 pixels are 3 x 4 patches; use sides that are multiples of 32"):
        model(torch.zeros(1, 3, 48, 64))
    with pytest.raises(ValueError, match="merged tokens do not line up"):
        model(PIXELS, output_hidden_states=True)
    with pytest.raises(ValueError, match="token merging cannot be compiled or exported"):
        torch.export.export(model, (PIXELS,), strict=False)
    with pytest.raises(ValueError, match=r"token merging is for inference: call model.eval\(\), or, before training"):
        model.train()(PIXELS)
    compiled = tiny_eomt(**ANNEALED)
    compiled.eomt._compiled_call_impl = compiled.eomt.forward
    with pytest.raises(ValueError, match=r"is compiled, .*optimize_for_inference\(compile=False\) first"):
        compiled.merge_tokens(0.9)
    assert compiled.config.token_merging_threshold is None


def test_training_from_a_model_that_merges_is_refused_before_it_starts(tmp_path) -> None:
    settings = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_query_layers": 2}
    recipe = Recipe(
        name="merging",
        data="generated:easy?num_scenes=2",
        model_config={**settings, "token_merging_threshold": 0.9},
        image_size=64,
        steps=1,
        output=str(tmp_path),
    )
    task = EoMTTask(recipe)
    assert len(task.training_data) == 2
    with pytest.raises(ValueError, match=r"token merging is for inference; train with .*threshold=null"):
        task.build_model()


# Segmenter and commands


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_eomt(**DINOV3, **ANNEALED, id2label=GeneratedScenes(1).id2label).save_pretrained(folder)
    EoMTImageProcessor(size=64, task="semantic").save_pretrained(folder)
    return str(folder)


def test_the_segmenter_merges_tokens(checkpoint) -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = np.random.default_rng(0).integers(0, 256, (64, 32, 3))
    plain = Segmenter.from_pretrained(checkpoint)
    merging = Segmenter.from_pretrained(checkpoint, token_merging=0.9, optimize=True)
    assert merging.model.config.token_merging_threshold == 0.9
    assert token_counts(merging.model, torch.zeros(1, 3, 64, 64))[0] == merging.model.config.num_prefix_tokens + 4
    pixels = merging.processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = [each.model(pixels).masks_queries_logits for each in (plain, merging)]
    assert not torch.allclose(*logits, atol=1e-3)
    assert merging([image])[0].segment_map.shape == (64, 64)
    detailed = Segmenter.from_pretrained(checkpoint, token_merging={"threshold": 0.8, "batch": "per_image"})
    assert detailed.model.config.token_merging_batch == "per_image"
    merge_tokens(detailed.model, detailed.processor, False)
    with torch.no_grad():
        assert torch.equal(detailed.model(pixels).masks_queries_logits, logits[0])


def test_the_segmenter_says_what_cannot_be(checkpoint) -> None:
    with pytest.raises(ValueError, match="no argument 'layer'; did you mean layers"):
        Segmenter.from_pretrained(checkpoint, token_merging={"threshold": 0.9, "layer": [1]})
    with pytest.raises(ValueError, match="token_merging=True names no threshold"):
        Segmenter.from_pretrained(checkpoint, token_merging=True)
    with pytest.raises(ValueError, match="lacks the threshold"):
        Segmenter.from_pretrained(checkpoint, token_merging={"layers": [1]})
    model = tiny_eomt(**DINOV3, **ANNEALED)
    with pytest.raises(ValueError, match="80 x 80 pixels are 5 x 5 patches"):
        merge_tokens(model, EoMTImageProcessor(size=80), 0.9)
    with pytest.raises(ValueError, match="a Linear cannot merge tokens; leave it out"):
        merge_tokens(nn.Linear(1, 1), None, 0.9)
    merge_tokens(nn.Linear(1, 1), None, False)


def test_the_commands_merge_tokens(checkpoint, tmp_path, capsys) -> None:
    command = ["evaluate", "--model", checkpoint, "--data", "generated:easy", "--task", "semantic", "--limit", "3"]
    command += ["--device", "cpu", "--worst", "0", "--json", str(tmp_path / "n.json")]
    scores = []
    for options in ([], ["--token-merging", "0.2"], ["--token-merging", "off"]):
        assert main([*command, *options]) == 0
        content = json.loads((tmp_path / "n.json").read_text())
        scores.append((content["token_merging"], content["metrics"]["mean_iou"]))
    assert [setting for setting, _ in scores] == [None, 0.2, False]
    assert scores[0][1] == scores[2][1] != scores[1][1]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--token-merging", "2"])
    assert stopped.value.code == 2
    assert "'2' is neither off nor a cosine similarity" in capsys.readouterr().err
    assert main([*command[:5], "--task", "points", "--token-merging", "0.9"]) == 2
    assert "--token-merging is for segmentation with EoMT" in capsys.readouterr().err
    masked = tmp_path / "masked"
    tiny_eomt(token_merging_threshold=0.5, token_merging_end="upscaling").save_pretrained(masked)
    EoMTImageProcessor(size=64).save_pretrained(masked)
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64)).save(image)
    assert main(["segment", str(image), "--model", str(masked), "--output", str(tmp_path / "out")]) == 1
    assert "2 of 2 query layers mask it" in capsys.readouterr().err
    options = ["--token-merging", "0.9", "--optimize", "compile"]
    assert main(["segment", str(image), "--model", checkpoint, "--output", str(tmp_path / "out"), *options]) == 2
    assert "turn it off with --token-merging off, or leave compile out" in capsys.readouterr().err


@torch.no_grad()
def test_a_fused_model_merges_in_its_generator() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    classifier = ViTPForPointClassification(ViTPConfig(**sizes, image_size=56, num_labels=5)).eval()
    generator = tiny_eomt(**DINOV3, **ANNEALED)
    fused = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(generator, classifier)
    expected = generator(smooth()).masks_queries_logits
    merge_tokens(fused, EoMTImageProcessor(size=64), 0.9)
    merged = fused(pixel_values=smooth(), classifier_pixel_values=torch.zeros(2, 3, 56, 56)).masks_queries_logits
    assert not torch.allclose(merged, expected, atol=1e-3)
    assert torch.equal(merged, fused.generator(smooth()).masks_queries_logits)
    with pytest.raises(ValueError, match="a ViTPForPointClassification cannot merge tokens; leave it out"):
        merge_tokens(classifier, None, 0.9)


@torch.no_grad()
def test_half_precision_stays_near_full_precision() -> None:
    model = tiny_eomt(**DINOV3, **ANNEALED).merge_tokens(0.5, layers=[1])
    flat = smooth()
    expected = model(flat).class_queries_logits
    answer = model.bfloat16()(flat.bfloat16()).class_queries_logits
    assert answer.dtype == torch.bfloat16
    torch.testing.assert_close(answer.float(), expected, rtol=0.1, atol=0.1)
