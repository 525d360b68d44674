"""Equal to Transformers' own EoMT with the same weights: forward, loss, gradients, and every kind of checkpoint."""

import copy
import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    EomtConfig,
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtForUniversalSegmentation,
)

from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation, EoMTModel

from ..tiny_models import randomize

SIZE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 96,
    "num_queries": 10,
    "num_blocks": 2,
    "num_labels": 5,
    "layerscale_value": 0.5,
    "train_num_points": 128,
}
UPSTREAM = {
    "dinov2": (EomtForUniversalSegmentation, EomtConfig, {}),
    "dinov2_giant": (EomtForUniversalSegmentation, EomtConfig, {"use_swiglu_ffn": True}),
    "dinov3": (EomtDinov3ForUniversalSegmentation, EomtDinov3Config, {"intermediate_size": 96}),
    "dinov3_gated": (
        EomtDinov3ForUniversalSegmentation,
        EomtDinov3Config,
        {"intermediate_size": 96, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
}
LOGITS = ("class_queries_logits", "masks_queries_logits", "last_hidden_state")


def upstream_model(family: str, probabilities=(1.0, 1.0), **fields):
    model_class, config_class, extra = UPSTREAM[family]
    torch.manual_seed(0)
    model = randomize(model_class(config_class(**{**SIZE, **extra, **fields}))).eval()
    model.attn_mask_probs.copy_(torch.tensor(probabilities))
    return model


def assert_equal_outputs(ours, theirs, pixels: torch.Tensor) -> None:
    with torch.no_grad():
        answer, reference = ours(pixels), theirs(pixels)
    for name in LOGITS:
        # 1e-5 of the largest value: the same sums, rounded in another order.
        scale = reference[name].abs().max().item()
        torch.testing.assert_close(answer[name], reference[name], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("family", UPSTREAM)
@pytest.mark.parametrize("probabilities", [(1.0, 1.0), (0.0, 1.0), (0.0, 0.0)])
def test_outputs_are_equal(family: str, probabilities: tuple[float, float], tmp_path) -> None:
    theirs = upstream_model(family, probabilities)
    theirs.save_pretrained(tmp_path)
    ours = EoMTForUniversalSegmentation.from_pretrained(tmp_path)
    assert ours.config.masked_attention_probabilities == list(probabilities)
    assert not ours.training
    assert_equal_outputs(ours, theirs, torch.randn(2, 3, 96, 96))


def fixed_points(*shape: int, rand=torch.rand, **kwargs) -> torch.Tensor:
    """Random points that depend on nothing but how many are asked for, in whatever batches."""
    points = rand(shape[-2:], generator=torch.Generator().manual_seed(shape[-2]))
    return points.expand(shape).clone()


@pytest.mark.parametrize("family", UPSTREAM)
@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0), (12, 1)])
def test_loss_and_gradients_are_equal_for_equal_random_numbers(
    family: str, counts: tuple[int, int], tmp_path, monkeypatch
) -> None:
    theirs = upstream_model(family, pos_embed_rescale=None) if "dinov3" in family else upstream_model(family)
    theirs.save_pretrained(tmp_path)
    ours = EoMTForUniversalSegmentation.from_pretrained(tmp_path)
    ours.train()
    theirs.train()
    pixels = torch.randn(2, 3, 96, 96)
    masks = [(torch.rand(n, 24, 24) > 0.6).float().repeat_interleave(4, -1).repeat_interleave(4, -2) for n in counts]
    classes = [torch.randint(0, 5, (n,)) for n in counts]
    monkeypatch.setattr(torch, "rand", fixed_points)
    labels = {"mask_labels": masks, "class_labels": classes}
    # The official code divides by matched pairs, as ours does; Transformers by objects, matched or not.
    matched = sum(min(n, SIZE["num_queries"]) for n in counts)
    class_weights = matched + 0.1 * (2 * SIZE["num_queries"] - matched)
    normalizers = torch.tensor([max(sum(counts), 1), class_weights])
    losses = []
    for model, extra in ((ours, {"loss_normalizers": normalizers}), (theirs, {})):
        loss = model(pixels, **copy.deepcopy(labels), **extra).loss
        loss.backward()
        losses.append(loss.item())
    # fp32 sums over thousands of points in another order.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    translated, _ = mask_free_translation({n: p.grad for n, p in theirs.named_parameters() if p.grad is not None})
    compared = 0
    for name, expected in translated.items():
        actual = gradients[name]
        if actual is None:  # no target anywhere: upstream spreads zeros where ours has no path
            assert expected.abs().max() == 0, name
            continue
        scale = max(expected.abs().max().item(), 1e-3)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4 * scale, msg=lambda m, n=name: f"{n}: {m}")
        compared += 1
    assert compared > 20


def mask_free_translation(state_dict: dict[str, torch.Tensor]):
    from hf_segvit.models.transformers_eomt import translate_state_dict

    return translate_state_dict({n: t for n, t in state_dict.items() if "mask_token" not in n})


def test_giant_checkpoints_with_the_old_swiglu_names_load(tmp_path) -> None:
    """Upstream renamed these keys without a conversion for this type and loads random MLPs."""
    theirs = upstream_model("dinov2_giant")
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if ".mlp.gate_proj." in name:
            other = weights[name.replace("gate_proj", "up_proj")]
            old[name.replace("gate_proj", "weights_in")] = torch.cat((tensor, other))
        elif ".mlp.down_proj." in name:
            old[name.replace("down_proj", "weights_out")] = tensor
        elif ".mlp.up_proj." not in name:
            old[name] = tensor
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_equal_outputs(EoMTForUniversalSegmentation.from_pretrained(tmp_path), theirs, torch.randn(1, 3, 96, 96))


def test_sharded_checkpoints_load_and_shards_stay_in_the_folder(tmp_path) -> None:
    theirs = upstream_model("dinov2")
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists()
    assert_equal_outputs(EoMTForUniversalSegmentation.from_pretrained(tmp_path), theirs, torch.randn(1, 3, 96, 96))
    contents = json.loads(index.read_text())
    contents["weight_map"]["query.weight"] = "../model.safetensors"
    index.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match="not a file beside it"):
        EoMTForUniversalSegmentation.from_pretrained(tmp_path)


def test_pickled_weights_are_not_read(tmp_path) -> None:
    theirs = upstream_model("dinov2")
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="hf-segvit convert"):
        EoMTForUniversalSegmentation.from_pretrained(tmp_path)


def test_loading_warns_of_nothing_and_what_is_saved_needs_no_mapping(tmp_path, caplog) -> None:
    theirs = upstream_model("dinov2", (0.0, 0.0))
    theirs.save_pretrained(tmp_path / "upstream")
    ours = EoMTForUniversalSegmentation.from_pretrained(tmp_path / "upstream")
    body = EoMTModel.from_pretrained(tmp_path / "upstream")
    assert not caplog.records
    pixels = torch.randn(1, 3, 96, 96)
    assert torch.equal(body(pixels).masks_queries_logits, ours(pixels).masks_queries_logits)
    ours.save_pretrained(tmp_path / "ours")
    names = load_file(tmp_path / "ours" / "model.safetensors").keys()
    assert set(names) == set(ours.state_dict())
    torch.save({"pixels": pixels, "expected": ours(pixels).masks_queries_logits.detach()}, tmp_path / "case.pt")
    script = f"""
        import logging, torch
        from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation
        case = torch.load({str(tmp_path / "case.pt")!r}, weights_only=True)
        model = EoMTForUniversalSegmentation.from_pretrained({str(tmp_path / "ours")!r})
        assert torch.equal(model(case["pixels"]).masks_queries_logits, case["expected"])
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "MISSING" not in run.stderr
    assert "UNEXPECTED" not in run.stderr


def test_config_fields_are_translated_and_overridable(tmp_path) -> None:
    config = EomtConfig(**{**SIZE, "num_labels": 3}, use_swiglu_ffn=True, mlp_ratio=4)
    config.id2label = {0: "sky", 1: "dog", 2: "cat"}
    config.save_pretrained(tmp_path)
    ours, unused = EoMTConfig.from_pretrained(tmp_path, num_queries=20, revision="main", return_unused_kwargs=True)
    assert ours.model_type == "segvit_eomt"
    assert ours.num_queries == 20
    assert ours.num_query_layers == 2
    assert ours.intermediate_size == 176  # two thirds of 256, rounded up to a multiple of 8
    assert ours.id2label == {0: "sky", 1: "dog", 2: "cat"}
    assert "revision" not in unused
    EomtDinov3Config(**SIZE, value_bias=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="value_bias=False"):
        EoMTConfig.from_pretrained(tmp_path)


def test_probabilities_given_by_the_caller_win(tmp_path) -> None:
    upstream_model("dinov2").save_pretrained(tmp_path)
    model = EoMTForUniversalSegmentation.from_pretrained(tmp_path, masked_attention_probabilities=[0.0, 0.0])
    assert model.config.masked_attention_probabilities == [0.0, 0.0]


def test_a_new_label_set_resets_the_class_head_only(tmp_path) -> None:
    theirs = upstream_model("dinov3")
    theirs.save_pretrained(tmp_path)
    labels = {0: "cat", 1: "dog"}
    with pytest.raises(ValueError, match="ignore_mismatched_sizes=True"):
        EoMTForUniversalSegmentation.from_pretrained(tmp_path, id2label=labels)
    model = EoMTForUniversalSegmentation.from_pretrained(tmp_path, id2label=labels, ignore_mismatched_sizes=True)
    assert model.class_predictor.weight.shape == (3, 64)
    complete = EoMTForUniversalSegmentation.from_pretrained(tmp_path).eomt.state_dict()
    for name, tensor in model.eomt.state_dict().items():
        assert torch.equal(tensor, complete[name]), name
    masks, classes = [torch.ones(1, 96, 96, dtype=torch.bool)], [torch.tensor([1])]
    loss = model.train()(torch.randn(1, 3, 96, 96), mask_labels=masks, class_labels=classes).loss
    loss.backward()
    assert loss.isfinite()
