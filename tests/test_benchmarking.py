"""The harness behind `hf-segvit benchmark`: what is compared, to what ratios are, and which models a name finds."""

import math
from functools import partial

import pytest
import torch

from hf_segvit import EoMTImageProcessor
from hf_segvit.cli import main
from hf_segvit.cli.benchmark import find_source
from hf_segvit.conversion.official_catalogue import released_models
from hf_segvit.inference.benchmarking import Variant, benchmark, random_segmenter, variants_of
from hf_segvit.inference.measuring import peak_bf16, relative_difference, time_interleaved
from hf_segvit.models.configuration_eomt import EoMTConfig

from .tiny_models import tiny_config, tiny_eomt

CPU = torch.device("cpu")


def outputs(pixels: torch.Tensor, shift: float = 0.0, calls: list | None = None) -> dict[str, torch.Tensor]:
    if calls is not None:
        calls.append(len(pixels))
    classes = pixels.float().mean((1, 2, 3))[:, None, None] + torch.arange(3.0)
    masks = pixels.float().mean((1, 2, 3))[:, None, None, None].expand(-1, 3, 4, 4) + 1 + shift
    return {"class_queries_logits": classes, "masks_queries_logits": masks}


def variant(name, dtype=torch.float32, shift=0.0, peer=None, same_weights=True, calls=None, quantization=None):
    facts = {"attention": "sdpa", "compiled": None, "quantization": quantization, "peer": peer}
    return Variant(name, dtype, partial(outputs, shift=shift, calls=calls), None, 7, facts, same_weights)


def measured(*variants, **settings):
    return benchmark("model", variants, device=CPU, size=(8, 8), repeats=3, clock="cpu", **settings)


def test_functions_take_turns():
    order = []
    seconds = time_interleaved([lambda: order.append("a"), lambda: order.append("b")], repeats=3, warm_up=2)
    assert order == ["a", "a", "b", "b", *["a", "b"] * 3]
    assert [len(each) for each in seconds] == [3, 3]
    assert all(value >= 0 for each in seconds for value in each)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA T4", None),
    ],
)
def test_the_peak_is_the_data_sheets(name, peak):
    assert peak_bf16(name) == peak


def test_relative_difference():
    assert relative_difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, -4.0])) == 1.5
    assert math.isnan(relative_difference(torch.tensor([math.nan]), torch.tensor([1.0])))


def test_ratios_are_to_transformers_and_outputs_come_first():
    calls = []
    rows = measured(
        variant("as it is", calls=calls),
        variant("Transformers", peer="transformers"),
        batch_sizes=[1, 2],
        with_images=False,
    )
    assert [(row.variant, row.batch_size) for row in rows] == [
        ("as it is", 1),
        ("Transformers", 1),
        ("as it is", 2),
        ("Transformers", 2),
    ]
    assert {row.baseline for row in rows} == {"Transformers"}
    assert [row.forward_ratio for row in rows if row.variant == "Transformers"] == [1.0, 1.0]
    assert all(row.whole is None and row.difference == 0.0 and len(row.forward) == 3 for row in rows)
    # As the reference, compared, once to warm up, three times on the clock, and once for its memory.
    assert calls == [1] * 7 + [2] * 7


@pytest.mark.parametrize("shift", [0.1, math.nan])
def test_other_answers_stop_the_benchmark(shift):
    with pytest.raises(ValueError, match="optimised answers differently from the model"):
        measured(variant("as it is"), variant("optimised", shift=shift), with_images=False)


def test_rounding_is_allowed_where_there_is_some():
    rows = measured(variant("as it is"), variant("int8", shift=0.1, quantization="int8"), with_images=False)
    assert rows[1].difference == pytest.approx(0.1, rel=0.2)  # of a largest mask logit near 1
    with pytest.raises(ValueError, match="int8 answers differently"):
        measured(variant("as it is"), variant("int8", shift=0.5, quantization="int8"), with_images=False)


def test_a_peer_that_fails_is_a_row_and_a_foreign_model_is_not_compared():
    def broken(pixels):
        raise RuntimeError("takes only one image\nand more")

    bad = variant("exported", peer="exported")
    bad.forward = broken
    rows = measured(
        variant("as it is"), bad, variant("swin", peer="swin", shift=9, same_weights=False), with_images=False
    )
    assert [row.failure for row in rows] == [None, "takes only one image", None]
    assert rows[1].forward is None
    assert rows[1].images_per_second is None
    assert rows[2].difference is None
    own = variant("optimised")
    own.forward = broken
    with pytest.raises(RuntimeError, match="only one image"):  # of the model itself it is no matter of course
        measured(variant("as it is"), own, with_images=False)


def test_variants_are_every_combination_and_the_model_stays(monkeypatch):
    quantised = []
    monkeypatch.setattr("hf_segvit.inference.benchmarking.quantize_model", lambda model, how: quantised.append(model))
    segmenter = random_segmenter(tiny_config(), torch.float32, CPU)
    made = variants_of(segmenter, torch.float32, [{"fuse_qkv": True}, {}], ["int8"])
    names = ["as it is", "optimised, fuse qkv", "optimised", "int8", "int8; optimised, fuse qkv", "int8; optimised"]
    assert [each.name for each in made] == names
    assert segmenter.model not in quantised
    assert segmenter.model.eomt.layers[0].attention.fused is None
    assert {each.parameters for each in made} == {sum(p.numel() for p in segmenter.model.parameters())}


def test_random_weights_are_annealed_and_have_segments():
    segmenter = random_segmenter(tiny_config(num_queries=40), torch.float32, CPU)
    assert segmenter.model.config.masked_attention_probabilities == [0.0, 0.0]
    with torch.inference_mode():
        torch.manual_seed(0)
        scores = segmenter.model(torch.randn(8, 3, 64, 64)).class_queries_logits.softmax(-1)[..., :-1].amax(-1)
    assert 0 < (scores >= segmenter.threshold).float().mean() < 0.5


def test_released_models_have_the_published_shapes():
    models = released_models("eomt")
    large = EoMTConfig(**models["coco_panoptic_eomt_large_640"].config_fields)
    assert (large.hidden_size, large.num_hidden_layers, large.num_queries, large.num_labels) == (1024, 24, 200, 133)
    giant = EoMTConfig(**models["coco_panoptic_eomt_giant_1280"].config_fields)
    assert (giant.mlp_type, giant.intermediate_size, giant.num_attention_heads) == ("swiglu", 4096, 24)
    for model in models.values():
        if model.unsupported is None and not model.backbone.endswith("7b"):
            config = EoMTConfig(**model.config_fields)
            assert (config.position_embedding_type == "rope") == model.backbone.startswith("dinov3")
            assert model.disagreement(config.to_dict()) is None


def test_what_a_name_finds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_config().save_pretrained(tmp_path / "config_only")
    tiny_eomt().save_pretrained(tmp_path / "weights")
    assert find_source("config_only").random
    assert find_source("config_only/config.json").random
    assert not find_source("weights").random
    assert not find_source("owner/name").random
    for name in ("coco_panoptic_eomt_large_640", "tue-mps/coco_panoptic_eomt_large_640"):
        found = find_source(name)
        assert (found.name, found.random) == ("coco_panoptic_eomt_large_640", True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coco_panoptic_eomt_lage_640", "did you mean coco_panoptic_eomt_large_640"),
        ("./nowhere", "there is no such folder or config.json"),
        ("model_ADE20k_798_250point.pth", "is a ViT-P, which names points"),
        ("notes.txt", "is a file; name a config.json"),
        ("foreign.json", "no configuration of a model that segments: its type is 'bert'"),
    ],
)
def test_names_that_find_nothing(name, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "foreign.json").write_text('{"model_type": "bert"}')
    assert main(["benchmark", name, "--device", "cpu", "--dtype", "float32"]) == 2
    assert message in capsys.readouterr().err


def test_a_machine_without_a_compiler_is_an_error(tmp_path, monkeypatch, capsys):
    tiny_eomt(masked_attention=False).save_pretrained(tmp_path / "model")
    EoMTImageProcessor(size={"height": 64, "width": 64}, task="panoptic").save_pretrained(tmp_path / "model")
    monkeypatch.setenv("CXX", "no-such-compiler")
    words = ["--device", "cpu", "--dtype", "float32", "--optimize", "compile", "--repeats", "1"]
    assert main(["benchmark", str(tmp_path / "model"), *words]) == 2
    assert "--optimize compile: torch.compile needs a C++ compiler" in capsys.readouterr().err


def test_an_export_stands_beside_float32_only(tmp_path, capsys):
    tiny_eomt().save_pretrained(tmp_path / "model")
    words = ["benchmark", str(tmp_path / "model"), "--device", "cpu", "--dtype", "bfloat16", "--peer", str(tmp_path)]
    assert main(words) == 2
    assert "an exported model is measured in float32; add it to --dtype" in capsys.readouterr().err
