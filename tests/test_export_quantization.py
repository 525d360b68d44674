"""int8 exports answer nearly like PyTorch, say how nearly, and are refused where they cannot be made."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segvit import (
    Segmenter,
    ViTPFusionForUniversalSegmentation,
    ViTPFusionImageProcessor,
    ViTPImageProcessor,
    export_model,
)
from hf_segvit.cli import main
from hf_segvit.export.quantization import quantize_graph, read_calibration
from hf_segvit.inference.exported_models import load_exported_model
from hf_segvit.inference.loading import load_segmentation_model

from .test_export import processor_of, unmasked
from .tiny_generators import LABELS, noise_images, tiny_classifier

onnx_installed = pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="needs the extra onnx"
)
nncf_installed = pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxscript", "openvino", "nncf"))), reason="needs the extra int8"
)
SCENES = "generated:easy?num_scenes=12&size=64"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    unmasked(num_hidden_layers=2, num_query_layers=1).save_pretrained(folder)
    processor_of().save_pretrained(folder)
    return folder


def export_int8(source: Path, folder: Path, file_format: str, capsys) -> dict:
    words = ["--format", file_format, "--quantize", "int8", "--calibration", SCENES, "--calibration-images", "8"]
    words = ["export", str(source), str(folder), *words]
    if file_format == "onnx":
        assert main(words) == 0
        said = capsys.readouterr().out
    else:
        # In a process of its own: NNCF stays out of the one that runs the other tests.
        done = subprocess.run([sys.executable, "-m", "hf_segvit", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said = done.stdout
    assert "int8 differs from PyTorch by" in said
    return json.loads((folder / "export.json").read_text())["quantization"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "file_format",
    [
        pytest.param("onnx", marks=onnx_installed),
        pytest.param("openvino", marks=[nncf_installed, pytest.mark.own_process]),
    ],
)
def test_an_int8_export_answers_nearly_like_pytorch(file_format, source, tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    out = tmp_path / "out"
    said = export_int8(source, out, file_format, capsys)
    assert (said["calibration"], said["split"]) == ("generated:easy?num_scenes=12&size=64", "train")
    assert (said["calibration_images"], said["measured_images"], said["measured_on_calibration_images"]) == (
        8,
        4,
        False,
    )
    assert 1e-4 < said["difference"] < 0.3, "the answers of int8, neither of float32 nor of another model"
    assert said["changed_classes"] < 0.2
    assert "calibrated with 8 images" in (out / "README.md").read_text()
    # Any size still goes, and what was measured is what the folder gives.
    (model, _), exported = load_segmentation_model(str(source)), load_exported_model(out)
    # The weights alone: of so small a model the ONNX file is mostly its graph.
    if file_format == "onnx":
        weights = sum(len(array.raw_data) for array in onnx.load(out / "model.onnx").graph.initializer)
    else:
        weights = (out / "model.bin").stat().st_size
    assert weights < 0.7 * 4 * sum(weight.numel() for weight in model.parameters())
    pixels = torch.randn(2, 3, 48, 96)
    ours, theirs = exported(pixels).masks_queries_logits, model(pixels).masks_queries_logits
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < theirs.abs().max()
    held_out = read_calibration(SCENES, 8, processor_of()).held_out
    worst = 0.0
    for pixels in held_out:
        with torch.inference_mode():
            answers, expected = exported(pixels), model(pixels)
        for name in ("class_queries_logits", "masks_queries_logits"):
            logits = getattr(expected, name)
            difference = (getattr(answers, name) - logits).abs().max() / logits.abs().max().clamp(min=1)
            worst = max(worst, difference.item())
    assert worst == pytest.approx(said["difference"], rel=0.1)
    assert Segmenter.from_pretrained(str(out))(noise_images([(80, 50)]))[0].segment_map.shape == (50, 80)


@pytest.mark.slow
@onnx_installed
def test_of_a_fused_model_the_generator_is_quantised(tmp_path, capsys):
    model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(
        unmasked(num_hidden_layers=2, num_query_layers=1, id2label=dict(LABELS)), tiny_classifier()
    )
    processor = ViTPFusionImageProcessor.from_generator_and_classifier(
        processor_of(), ViTPImageProcessor(size={"height": 56, "width": 56}), config=model.config
    )
    model.save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    said = export_int8(tmp_path / "source", tmp_path / "out", "onnx", capsys)
    assert said["graph"] == "generator"
    inputs = processor(noise_images([(80, 50)]))
    with torch.inference_mode():
        ours, theirs = load_exported_model(tmp_path / "out")(**inputs), model(**inputs)
    difference = (ours.masks_queries_logits - theirs.masks_queries_logits).abs().max()
    assert 1e-4 < difference / theirs.masks_queries_logits.abs().max() < 0.3
    # The classifier is as it was.
    classifier = load_exported_model(tmp_path / "out").classifier
    prompts = torch.rand(1, 5, 4)
    images = inputs["classifier_pixel_values"]
    with torch.inference_mode():
        expected = model.classifier(images, prompts).logits
    torch.testing.assert_close(classifier(images, prompts).logits, expected, atol=1e-4, rtol=1e-4)


def test_calibration_images_are_drawn_once_and_others_are_held_out(tmp_path):
    for index in range(5):
        for kind, size in (("images", (40, 30)), ("masks", (40, 30))):
            folder = tmp_path / "set" / kind
            folder.mkdir(parents=True, exist_ok=True)
            content = np.full((*size[::-1], 3), 50 * index, np.uint8) if kind == "images" else np.ones(size[::-1], "u1")
            Image.fromarray(content).save(folder / f"{index}.png")
    (tmp_path / "set" / "classes.json").write_text(json.dumps({"1": "a"}))
    data = f"mask_folder:{tmp_path / 'set'}"
    some = read_calibration(data, 3, processor_of("semantic"))
    assert (len(some.inputs), len(some.held_out)) == (3, 2)
    values = sorted(round(float(x[0, 0, 0, 0]), 4) for x in (*some.inputs, *some.held_out))
    assert len(set(values)) == 5, "no image twice"
    everything = read_calibration(data, 99, processor_of("semantic"))
    assert len(everything.inputs) == 5
    assert everything.held_out[0] is everything.inputs[0]
    assert some.name == "mask_folder:set", "no folders of this machine"


@onnx_installed
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--quantize", "int4"), "--quantize 'int4' is not known; int8 is"),
        (("--quantize", "int8"), "--quantize 'int8' needs images to calibrate with: --calibration 'FORMAT:PATH'"),
        (("--calibration", SCENES), "is for a quantised export; add --quantize 'int8'"),
        (("--quantize", "int8", "--calibration", SCENES, "--format", "pt2"), "is for the formats onnx and openvino"),
        (("--quantize", "int8", "--calibration", "scenes"), "'scenes': give FORMAT:PATH"),
        (("--quantize", "int8", "--calibration", SCENES, "--calibration-images", "0"), "0 must be at least 1"),
        (("--quantize", "int8", "--calibration", "mask_folder:empty"), "no split of a mask_folder data set is there"),
    ],
)
def test_impossible_quantisations_write_nothing(words, message, source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / "images").mkdir(parents=True)
    (tmp_path / "empty" / "masks").mkdir()
    assert main(["export", str(source), "out", *words]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@onnx_installed
def test_a_point_classifier_is_not_quantised(tmp_path):
    model, processor = tiny_classifier(), ViTPImageProcessor(size={"height": 56, "width": 56})
    with pytest.raises(ValueError, match="a ViTPForPointClassification cannot be quantised, only an EoMT can"):
        export_model(model, tmp_path / "out", processor=processor, quantize="int8", calibration=SCENES)
    assert list(tmp_path.iterdir()) == []


def test_missing_nncf_names_the_command(source, tmp_path, capsys, monkeypatch):
    installed = lambda name: None if name == "nncf" else name  # noqa: E731
    monkeypatch.setattr("hf_segvit.export.formats.find_spec", installed)
    words = ["--format", "openvino", "--quantize", "int8", "--calibration", SCENES]
    assert main(["export", str(source), str(tmp_path / "out"), *words]) == 2
    assert "for openvino needs nncf; install it with `pip install 'hf-segvit[int8]'`" in capsys.readouterr().err


@onnx_installed
def test_a_failing_tool_leaves_nothing(source, tmp_path, monkeypatch):
    def fails(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(quantize_graph.__globals__["_TOOLS"], "onnx", fails)
    with pytest.raises(ValueError, match=r"model: the quantisation to int8 failed \(RuntimeError: no such kernel\)"):
        export_model(str(source), tmp_path / "out", quantize="int8", calibration=SCENES, calibration_images=2)
    assert list(tmp_path.iterdir()) == []
