"""Optimised models: the same answers, the same checkpoint, and refusals of what a machine or model cannot do."""

import copy
import hashlib

import pytest
import torch

from hf_segvit.models import cpu_kernels, inference_optimization
from hf_segvit.models.configuration_vit_p import ViTPConfig
from hf_segvit.models.image_post_processing import instance_segments, panoptic_segments
from hf_segvit.models.inference_optimization import compiler_problem, queries_to_decode
from hf_segvit.models.modeling_vit_p import ViTPForPointClassification
from hf_segvit.models.modeling_vit_p_fusion import ViTPFusionForUniversalSegmentation

from .tiny_models import FAMILIES, randomize, tiny_eomt

PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
ANNEALED = {"masked_attention": False}
OFF = {"fuse_qkv": False, "channels_last": False, "prune_masks": False, "compile": False}


def checksum(model, folder) -> str:
    model.save_pretrained(folder)
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("switch", ["fuse_qkv", "channels_last", "prune_masks"])
@torch.no_grad()
def test_each_switch_keeps_answers_and_checkpoint(switch, family, tmp_path) -> None:
    model = tiny_eomt(**FAMILIES[family], **ANNEALED)
    expected, before = model(PIXELS), checksum(model, tmp_path)
    keys = list(model.state_dict())
    assert model.train().optimize_for_inference(**{**OFF, switch: True}) is model
    assert not model.training
    answer = model(PIXELS)
    for name in ("class_queries_logits", "masks_queries_logits"):
        torch.testing.assert_close(answer[name], expected[name], rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == keys
    assert checksum(model, tmp_path) == before
    # A second call starts afresh.
    model.optimize_for_inference(**OFF)
    assert all(block.attention.fused is None for block in model.eomt.layers)
    assert torch.equal(model(PIXELS).masks_queries_logits, expected.masks_queries_logits)
    assert checksum(model, tmp_path) == before


@torch.no_grad()
def test_fused_projections_follow_their_parameters() -> None:
    model = tiny_eomt(**FAMILIES["dinov3"], **ANNEALED).optimize_for_inference(fuse_qkv=True)
    other = randomize(tiny_eomt(**FAMILIES["dinov3"], **ANNEALED), seed=5)
    attention = model.eomt.layers[0].attention
    assert attention._uses_fused
    copied = copy.deepcopy(model)
    for changed in (model, copied):
        changed.load_state_dict(other.state_dict())
        torch.testing.assert_close(changed(PIXELS).class_queries_logits, other(PIXELS).class_queries_logits)
    assert not copied.eomt.layers[0].attention._uses_fused
    model.double()
    assert attention._uses_fused
    assert attention.fused[0].dtype == torch.float64
    expected = other.double()(PIXELS.double()).class_queries_logits
    torch.testing.assert_close(model(PIXELS.double()).class_queries_logits, expected)


def test_an_optimised_model_can_still_be_trained() -> None:
    model, plain = tiny_eomt(**ANNEALED), tiny_eomt(**ANNEALED)
    model.optimize_for_inference(fuse_qkv=True)
    gradients = []
    for each in (model, plain):
        each(PIXELS).class_queries_logits.sum().backward()
        gradients.append(each.eomt.layers[1].attention.k_proj.weight.grad)
    torch.testing.assert_close(*gradients)


def test_fusion_helps_on_accelerators_and_in_bf16_with_instructions(monkeypatch) -> None:
    for types, dtype, fused in (
        ({torch.bfloat16, torch.float32}, torch.bfloat16, True),
        ({torch.bfloat16, torch.float32}, torch.float32, False),
        (set(), torch.bfloat16, False),
    ):
        kernels = cpu_kernels.CPUKernels(linear=frozenset(types))
        monkeypatch.setattr(inference_optimization, "KERNELS", kernels)
        assert inference_optimization.fuse_projections(tiny_eomt(**ANNEALED).to(dtype), None) is fused
    assert inference_optimization.fuse_projections(tiny_eomt(**ANNEALED).to("meta"), None)


@pytest.mark.parametrize("task", ["panoptic", "instance"])
@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.3, 0.9])
@torch.no_grad()
def test_pruned_masks_give_exactly_the_same_segments(task, threshold) -> None:
    model = tiny_eomt(num_queries=40, **ANNEALED)
    # Classes that differ between queries and images, some of them no-object.
    model.class_predictor.weight.normal_(std=1)
    full = model(PIXELS)
    pruned = model(PIXELS, task=task, pruning_threshold=threshold)
    geometry = {"target_sizes": [(48, 64), (64, 40)], "input_size": (64, 64), "threshold": threshold}
    geometry["content_sizes"] = [(48, 64), (64, 40)]
    if task == "panoptic":
        geometry["overlap_mask_area_threshold"] = 0.1  # the masks are random, so they overlap
    segments = panoptic_segments if task == "panoptic" else instance_segments
    answers = [
        segments(outputs.class_queries_logits, outputs.masks_queries_logits, **geometry) for outputs in (full, pruned)
    ]
    for expected, answer in zip(*answers, strict=True):
        assert answer["segments_info"] == expected["segments_info"]
        assert torch.equal(answer["segmentation"], expected["segmentation"])
    assert pruned.masks_queries_logits.shape[1] == pruned.kept_queries.shape[1]
    if threshold == 0.3:
        assert any(answer["segments_info"] for answer in answers[0])
        assert pruned.kept_queries.shape[1] < 40
    if threshold == 0.0 and task == "instance":
        assert pruned.kept_queries.shape[1] == 40


def test_the_queries_to_decode_are_those_that_post_processing_may_keep() -> None:
    probabilities = torch.tensor(
        [
            [[0.6, 0.1, 0.3], [0.3, 0.3, 0.4], [0.1, 0.1, 0.8], [0.1, 0.75, 0.15]],
            [[0.2, 0.1, 0.7], [0.3, 0.3, 0.4], [0.1, 0.7, 0.2], [0.2, 0.2, 0.6]],
        ]
    )
    logits = probabilities.log()
    # The second image is filled up with its first query.
    assert queries_to_decode(logits, "panoptic", 0.5).tolist() == [[0, 3], [0, 2]]
    # A score is at most the class probability, whatever no-object has.
    assert queries_to_decode(logits, "instance", 0.3).tolist() == [[0, 1, 3], [0, 1, 2]]
    assert queries_to_decode(logits, "instance", 0.99).tolist() == [[0], [0]]
    assert queries_to_decode(logits, "semantic", 0.5).tolist() == [[0, 1, 2, 3]] * 2


@torch.no_grad()
def test_semantic_segmentation_keeps_all_queries() -> None:
    model = tiny_eomt(**ANNEALED)
    outputs = model(PIXELS, task="semantic", pruning_threshold=0.5)
    assert outputs.kept_queries is None
    assert outputs.masks_queries_logits.shape[1] == 7


@torch.no_grad()
def test_a_task_or_threshold_by_which_nothing_can_be_pruned_is_refused() -> None:
    """A misspelt "semantic" would lose the masks of most queries."""
    model = tiny_eomt(**ANNEALED)
    with pytest.raises(ValueError, match="task='semantics'; it is one of 'panoptic', 'instance', 'semantic'"):
        model(PIXELS, task="semantics", pruning_threshold=0.5)
    with pytest.raises(ValueError, match="pruning_threshold=nan is not a number"):
        model(PIXELS, task="instance", pruning_threshold=float("nan"))


def test_a_model_that_masks_attention_is_refused_with_the_remedy() -> None:
    model = tiny_eomt(masked_attention=True)
    model.set_masked_attention_probabilities([0.2, 0.9])
    with pytest.raises(ValueError, match=r"1 of its 2 query layers .*set_masked_attention_probabilities\(0\)"):
        model.optimize_for_inference()
    model.set_masked_attention_probabilities([0.2, 0.0])  # inference masks none of them
    model.optimize_for_inference()
    assert model.config.masked_attention_probabilities == [0.2, 0.0]


def test_compilation_without_a_compiler_is_refused_or_a_named_fallback(monkeypatch, caplog) -> None:
    monkeypatch.setattr(inference_optimization.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    model = tiny_eomt(**ANNEALED)
    with pytest.raises(ValueError, match=r"compile=True: .*C\+\+ compiler, and none is on PATH; install one"):
        model.optimize_for_inference(compile=True)
    monkeypatch.setenv("CXX", "/nowhere/cxx")
    assert "CXX=/nowhere/cxx, which is not there" in compiler_problem(torch.device("cpu"))
    monkeypatch.setattr(inference_optimization, "find_spec", lambda name: None)
    assert "pip install triton" in compiler_problem(torch.device("cuda"))
    with pytest.raises(ValueError, match="cuda_graphs=True needs a model on a CUDA device"):
        model.optimize_for_inference(cuda_graphs=True)


def test_a_compiler_that_pytorch_would_not_use_is_a_problem(tmp_path, monkeypatch) -> None:
    def program(folder: str, name: str, status: int) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / folder))

    cpu = torch.device("cpu")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(inference_optimization.sys, "platform", "linux")
    monkeypatch.setattr(inference_optimization.sysconfig, "get_path", lambda name: str(tmp_path))
    program("other", "clang++", 0)
    assert compiler_problem(cpu).endswith("g++ is not on PATH; install it, or set the environment variable CXX=clang++")
    monkeypatch.setattr(inference_optimization, "find_spec", lambda name: True)
    assert compiler_problem(torch.device("cuda")) is None
    monkeypatch.setenv("CXX", "clang++ -O2")
    assert "CXX=clang++ -O2, which is not there; install one, such as g++, or name its path" in compiler_problem(cpu)
    monkeypatch.setenv("CXX", "clang++")
    assert f"needs Python's headers, and {tmp_path} has no Python.h" in compiler_problem(cpu)
    (tmp_path / "Python.h").write_text("")
    assert compiler_problem(cpu) is None
    monkeypatch.delenv("CXX")
    program("broken", "g++", 1)
    assert "`g++ --version` fails; repair it" in compiler_problem(cpu)
    with pytest.raises(ValueError, match=r"compile=True: .* fails; repair it"):
        tiny_eomt(**ANNEALED).optimize_for_inference(compile=True)


@torch.no_grad()
def test_the_compiled_part_has_one_graph_and_leaves_the_masks_outside(monkeypatch) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *args, **kwargs: compiled(*args, backend=backend, **kwargs))
    model = tiny_eomt(num_hidden_layers=2, num_query_layers=1, **ANNEALED)
    expected = model(PIXELS)
    model.optimize_for_inference(**{**OFF, "compile": True})
    torch.testing.assert_close(model(PIXELS).masks_queries_logits, expected.masks_queries_logits)
    assert len(graphs) == 1
    for threshold in (0.1, 0.2, 0.3, 0.4):  # numbers of masks that differ
        model(PIXELS, pruning_threshold=threshold)
    assert len(graphs) == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_compiled_answers_are_those_of_the_model(dtype) -> None:
    torch._dynamo.reset()
    model = tiny_eomt(num_hidden_layers=2, num_query_layers=1, **ANNEALED).to(dtype)
    pixels = PIXELS.to(dtype)
    expected = model(pixels, pruning_threshold=0.0)
    model.optimize_for_inference(fuse_qkv=True, compile=True)
    answer = model(pixels, pruning_threshold=0.0)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(
        answer.class_queries_logits, expected.class_queries_logits, rtol=tolerance, atol=tolerance
    )


@torch.no_grad()
def test_vit_p_and_fusion_are_optimised_part_by_part() -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    classifier = randomize(ViTPForPointClassification(ViTPConfig(**size, image_size=56, num_labels=5))).eval()
    prompts = torch.rand(2, 3, 4)
    pixels = PIXELS[..., :56, :56]
    expected = classifier(pixels, prompts).logits
    classifier.optimize_for_inference(fuse_qkv=True, channels_last=True)
    assert classifier.vit_p.layers[0].attention._uses_fused
    torch.testing.assert_close(classifier(pixels, prompts).logits, expected, rtol=1e-4, atol=1e-4)
    fused = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(tiny_eomt(**ANNEALED), classifier)
    inputs = {"pixel_values": PIXELS, "classifier_pixel_values": pixels}
    expected = fused(**inputs).class_queries_logits
    fused.optimize_for_inference(fuse_qkv=True)
    assert fused.generator.eomt.layers[0].attention._uses_fused
    assert not fused.generator.prunes_masks
    torch.testing.assert_close(fused(**inputs).class_queries_logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cuda_graphs", [False, True])
@torch.inference_mode()
def test_cuda_compiled_equals_plain(cuda_graphs):
    model = tiny_eomt(masked_attention=False).cuda()
    plain = copy.deepcopy(model)
    model.optimize_for_inference(compile=True, cuda_graphs=cuda_graphs)
    pixels = [torch.randn(2, 3, 64, 64, device="cuda") for _ in range(4)]
    # TF32, which convolutions use by default, depends on their layout.
    with torch.backends.cudnn.flags(allow_tf32=False):
        answers = [model(each) for each in pixels]  # all kept: a replay must not overwrite the answers before it
        wanted = [plain(each) for each in pixels]
    for expected, answer in zip(wanted, answers, strict=True):
        for name in ("class_queries_logits", "masks_queries_logits"):
            torch.testing.assert_close(answer[name], expected[name], rtol=1e-3, atol=1e-3)
