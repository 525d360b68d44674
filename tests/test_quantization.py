"""Quantisation: which layers change and how little the answers do; every impossible request says what to use."""

import copy
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from hf_segvit import EoMTForUniversalSegmentation, EoMTImageProcessor
from hf_segvit.cli import main
from hf_segvit.data.reading import describe, load_segmentation_dataset
from hf_segvit.evaluation.identity import model_identity
from hf_segvit.inference import quantization
from hf_segvit.inference.loading import fingerprint
from hf_segvit.inference.measuring import relative_difference
from hf_segvit.inference.quantization import check_quantization, quantize_model
from hf_segvit.inference.segmenter import Segmenter

from .tiny_models import tiny_config, tiny_eomt

CPU = torch.device("cpu")
INT8 = ("int8", "int8-weight-only")
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
BLOCK_LAYERS = [f"attention.{name}_proj" for name in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]


def rounded_to_int8(weight: torch.Tensor) -> torch.Tensor:
    """Weights in 255 steps for each output channel, the largest of which is 127: the plain formula."""
    step = weight.abs().amax(1, keepdim=True) / 127.5
    return (weight / step).round().clamp(-128, 127) * step


@needs_torchao
@pytest.mark.parametrize("method", INT8)
def test_linear_layers_of_the_blocks_and_nothing_else(method):
    model = tiny_eomt()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert quantize_model(model, method) == 4 * len(BLOCK_LAYERS)
    quantised = {name for name, parameter in model.named_parameters() if type(parameter.data) is not torch.Tensor}
    assert quantised == {f"eomt.layers.{i}.{layer}.weight" for i in range(4) for layer in BLOCK_LAYERS}
    for name, parameter in model.named_parameters():
        if name in quantised:
            step = before[name].abs().amax(1, keepdim=True) / 127.5
            error = (parameter.dequantize() - before[name]).abs()
            assert (error <= 0.51 * step + 1e-7).all()  # rounding to the nearest of 256 steps
            assert error.max() > 0
        else:
            assert torch.equal(parameter, before[name])


@needs_torchao
@torch.inference_mode()
def test_weight_only_is_the_model_with_rounded_weights():
    model = tiny_eomt(masked_attention=False)
    plain = copy.deepcopy(model)
    for block in plain.eomt.layers:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(rounded_to_int8(module.weight))
    quantize_model(model, "int8-weight-only")
    pixels = torch.randn(2, 3, 64, 64)
    answer, expected = model(pixels), plain(pixels)
    # The step is a 127th or a 127.5th of the largest weight, by torchao's release.
    assert relative_difference(answer.class_queries_logits, expected.class_queries_logits) < 0.01
    assert relative_difference(answer.masks_queries_logits, expected.masks_queries_logits) < 0.01


@needs_torchao
@pytest.mark.parametrize("method", INT8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_answers_stay_close(method, dtype):
    model, pixels = tiny_eomt(masked_attention=False).to(dtype), torch.randn(2, 3, 64, 64, dtype=dtype)
    expected = model(pixels)
    quantize_model(model, method)
    answer = model(pixels)
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert answer[name].dtype == dtype
        assert 0 < relative_difference(answer[name], expected[name]) < 0.1


@needs_torchao
@torch.inference_mode()
def test_goes_together_with_fused_projections():
    model, pixels = tiny_eomt(masked_attention=False), torch.randn(1, 3, 64, 64)
    quantised = copy.deepcopy(model)
    quantize_model(quantised, "int8")
    expected = quantised(pixels).masks_queries_logits
    model.optimize_for_inference(fuse_qkv=True, compile=False)
    quantize_model(model, "int8")  # the fused tensor is let go, or the product would be of the weights before
    assert torch.equal(model(pixels).masks_queries_logits, expected)
    model.optimize_for_inference(fuse_qkv=True, compile=False)
    assert torch.equal(model(pixels).masks_queries_logits, expected)


@needs_torchao
@pytest.mark.slow
@torch.inference_mode()
def test_compiles():
    model = tiny_eomt(masked_attention=False, num_hidden_layers=1, num_query_layers=1, num_upscale_blocks=1)
    quantize_model(model, "int8")
    pixels = torch.randn(1, 3, 64, 64)
    expected = model(pixels)
    model.optimize_for_inference(compile=True)
    answer = model(pixels)
    # Compiled, a token's scale may round the other way, which moves an activation by one of 255 steps.
    assert relative_difference(answer.masks_queries_logits, expected.masks_queries_logits) < 0.01


@pytest.fixture
def checkpoint(tmp_path):
    tiny_eomt(num_queries=9).save_pretrained(tmp_path / "model")
    processor = EoMTImageProcessor(task="semantic", size={"height": 64, "width": 64})
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@needs_torchao
def test_segmenter_quantises_and_the_checkpoint_stays(checkpoint, tmp_path):
    before = (checkpoint / "model.safetensors").read_bytes()
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    plain = Segmenter.from_pretrained(str(checkpoint), device="cpu")([image])[0]
    segmenter = Segmenter.from_pretrained(str(checkpoint), device="cpu", quantization="int8", optimize=False)
    answer = segmenter([image])[0]
    assert (answer.segment_map == plain.segment_map).mean() > 0.9
    assert type(segmenter.model.eomt.layers[0].mlp.fc1.weight.data) is not torch.Tensor
    with pytest.raises(ValueError, match="save it before it is quantised"):
        segmenter.model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert (checkpoint / "model.safetensors").read_bytes() == before


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize("method", ["int8", "int8-weight-only"])
def test_segment_and_evaluate_take_it(method, checkpoint, tmp_path, monkeypatch):
    quantised = []

    def quantise(model, name):
        quantised.append((name, quantize_model(model, name)))

    monkeypatch.setattr("hf_segvit.inference.segmenter.quantize_model", quantise)
    data = load_segmentation_dataset("generated:easy", task="semantic")
    model = EoMTForUniversalSegmentation.from_pretrained(
        checkpoint, id2label=describe(data).id2label, ignore_mismatched_sizes=True
    )
    model.save_pretrained(checkpoint)
    words = ["--model", str(checkpoint), "--device", "cpu", "--task", "semantic", "--quantization", method]
    scored = ["--data", "generated:easy", "--limit", "1", "--output", str(tmp_path / "scores")]
    assert main(["evaluate", *words, *scored]) == 0
    assert (tmp_path / "scores" / "results.json").exists()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    written = ["--outputs", "semantic", "--output", str(tmp_path / "o")]
    assert main(["segment", str(tmp_path / "a.png"), *words, *written]) == 0
    layers = len(BLOCK_LAYERS) * model.config.num_hidden_layers
    assert quantised == [(method, layers)] * 2
    segmenter = Segmenter.from_pretrained(str(checkpoint), device="cpu", quantization=method)
    (semantic,) = (tmp_path / "o").rglob("*.semantic.png")
    assert np.array_equal(np.array(Image.open(semantic)), segmenter(image).segment_map)


@needs_torchao
def test_models_of_other_weights_have_other_hashes():
    """Jobs and evaluations that resume compare them."""

    def hashes(method=None, change=0.0):
        model = tiny_eomt()
        model.eomt.layers[0].mlp.fc1.weight.data[0, 0] += change
        if method is not None:
            quantize_model(model, method)
        return fingerprint(model, None), model_identity(model, SimpleNamespace())["weights"]

    for method in INT8:
        assert hashes(method) == hashes(method)
        kinds = [hashes(), hashes(change=5.0), hashes(method), hashes(method, change=5.0)]
        assert len({each[0] for each in kinds}) == len({each[1] for each in kinds}) == 4


@pytest.mark.parametrize(
    ("method", "device", "dtype", "message"),
    [
        ("int9", "cpu", torch.float32, "there is no quantization 'int9'; did you mean int8"),
        ("fp8", "cpu", torch.bfloat16, "has no fp8.*use quantization int8 or int8-weight-only"),
        ("fp8", "mps", torch.bfloat16, "has no fp8.*use dtype bfloat16 or float16"),
        ("int8", "mps", torch.float32, "mps has no fast int8 products.*use dtype float16 or auto"),
    ],
)
def test_impossible_requests(monkeypatch, method, device, dtype, message):
    monkeypatch.setattr(quantization, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match=message):
        check_quantization(method, torch.device(device), dtype)


@pytest.mark.parametrize(
    ("capability", "method", "dtype", "message"),
    [
        ((8, 0), "fp8", torch.bfloat16, "capability 8.9 on; use quantization int8"),
        ((9, 0), "fp8", torch.float32, "bfloat16, not in float32; use dtype bfloat16"),
        ((7, 5), "int8", torch.float16, "no fast int8 products"),
        ((9, 0), "fp8", torch.bfloat16, None),
        ((8, 0), "int8-weight-only", torch.float16, None),
    ],
)
def test_what_a_gpu_has_decides(monkeypatch, capability, method, dtype, message):
    monkeypatch.setattr(quantization, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(quantization, "describe_device", lambda device: "cuda:0 (a GPU)")
    if message is None:
        check_quantization(method, torch.device("cuda", 0), dtype)
        return
    with pytest.raises(ValueError, match=message):
        check_quantization(method, torch.device("cuda", 0), dtype)


def test_without_torchao_the_error_names_the_extra(monkeypatch, checkpoint):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "hf-segvit\[quantization\]"'):
        Segmenter.from_pretrained(str(checkpoint), device="cpu", quantization="int8")


def test_the_command_names_its_options(monkeypatch, checkpoint, tmp_path, capsys):
    monkeypatch.setattr(quantization, "find_spec", lambda name: object())
    from PIL import Image

    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    words = ["segment", str(tmp_path / "a.png"), "--model", str(checkpoint), "--output", str(tmp_path / "out")]
    assert main([*words, "--device", "cpu", "--quantization", "fp8"]) == 2
    assert "use --quantization int8 or int8-weight-only" in capsys.readouterr().err
    assert main(["evaluate", "--task", "points", "--data", "generated:easy", "--model", "x", "--quantization", "int8"])
    assert "--quantization is for segmentation" in capsys.readouterr().err


@needs_torchao
def test_models_without_layers_that_fit_are_refused():
    model = EoMTForUniversalSegmentation(tiny_config(hidden_size=24, intermediate_size=20))
    with pytest.raises(ValueError, match="EoMTForUniversalSegmentation cannot be quantised"):
        quantize_model(model, "int8")
    backbone = SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = Mask2FormerConfig(backbone_config=backbone, hidden_dim=32, feature_size=32, mask_feature_size=32)
    config.update({"num_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 3})
    model = Mask2FormerForUniversalSegmentation(config)
    with pytest.raises(ValueError, match="Mask2FormerForUniversalSegmentation cannot be quantised"):
        quantize_model(model, "int8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@needs_torchao
@pytest.mark.parametrize("method", ["int8", "int8-weight-only", "fp8"])
@torch.inference_mode()
def test_cuda_answers_stay_close(method):
    model = tiny_eomt(masked_attention=False, hidden_size=128, num_attention_heads=2, intermediate_size=256)
    model, pixels = model.to("cuda", torch.bfloat16), torch.randn(2, 3, 64, 64).to("cuda", torch.bfloat16)
    expected = model(pixels)
    quantize_model(model, method)
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert relative_difference(model(pixels)[name], expected[name]) < 0.2
