"""Exports give PyTorch's answers at any size, are used like any other model, and are refused where damaged."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import pipeline

from hf_segvit import (
    EoMTForUniversalSegmentation,
    EoMTImageProcessor,
    Segmenter,
    ViTPFusionForUniversalSegmentation,
    ViTPFusionImageProcessor,
    ViTPImageProcessor,
    export_model,
)
from hf_segvit.cli import main
from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.hub.export_record import GraphRecord
from hf_segvit.hub.push import push_to_hub
from hf_segvit.inference.exported_models import ExportedEoMT, load_exported_model
from hf_segvit.inference.loading import load_segmentation_model
from hf_segvit.inference.point_classifier import PointClassifier
from hf_segvit.inference.runtimes import RuntimeSettings
from hf_segvit.models.position_resampling import antialiased_weights, official_weights, resample_by_products
from hf_segvit.models.prompt_layers import resample_as_official

from .hub_server import HubServer
from .tiny_generators import LABELS, noise_images, tiny_classifier, tiny_generator
from .tiny_models import FAMILIES, tiny_eomt

EXAMPLE = Path(__file__).parents[1] / "examples" / "onnx_only.py"
onnx_installed = pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="needs the extra onnx"
)
openvino_installed = pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxscript", "openvino"))), reason="needs the extra openvino"
)
# OpenVINO pins threads to cores. In a process that has also trained, starting another one afterwards can end it: the
# kernel sends SIGSEGV (Linux 6.18, seen five times).
runs_openvino = pytest.mark.own_process
executorch_installed = pytest.mark.skipif(find_spec("executorch") is None, reason="needs the extra executorch")
compiler_installed = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)
EVA = {"position_embedding_type": "learned_rope", "rope_reference_grid": 16, "mlp_type": "swiglu", "mlp_norm": True}
SIGLIP = {"use_cls_token": False, "num_register_tokens": 0, "layer_scale_init_value": None}


def unmasked(**overrides) -> EoMTForUniversalSegmentation:
    model = tiny_eomt(**overrides)
    model.set_masked_attention_probabilities(0)
    with torch.no_grad():
        model.class_predictor.weight *= 4  # several segments in each answer
    return model


def processor_of(task: str = "panoptic") -> EoMTImageProcessor:
    # Random masks overlap so much that none would keep 80 % of its own.
    return EoMTImageProcessor(
        task=task,
        size={"height": 64, "width": 64},
        stuff_classes=[4],
        threshold=0.3,
        overlap_mask_area_threshold=0.05,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny EoMT with a position table, whose exports have most to get wrong."""
    folder = tmp_path_factory.mktemp("source")
    labels = GeneratedScenes(1, "test").id2label  # so that it can be scored
    unmasked(num_hidden_layers=2, num_query_layers=1, id2label=labels).save_pretrained(folder)
    processor_of().save_pretrained(folder)
    (folder / "README.md").write_text("# A model\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def onnx_folder(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "onnx"
    assert main(["export", str(source), str(folder), "--semantic-map"]) == 0
    return folder


@pytest.fixture(scope="module")
def openvino_folder(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "openvino"
    export_model(str(source), folder, "openvino")
    return folder


@pytest.fixture
def damaged(onnx_folder, tmp_path) -> Path:
    """A copy of the ONNX export, to damage."""
    return Path(shutil.copytree(onnx_folder, tmp_path / "damaged"))


def same_answers(folder: Path, reference: Path, **settings) -> None:
    images = noise_images([(80, 50), (40, 90), (64, 64)])
    expected = Segmenter.from_pretrained(str(reference))(images)
    assert sum(len(answer.segments) for answer in expected) > 3
    for ours, theirs in zip(Segmenter.from_pretrained(str(folder), **settings)(images), expected, strict=True):
        assert (ours.segment_map != theirs.segment_map).mean() < 1e-3
        assert [s.label for s in ours.segments] == [s.label for s in theirs.segments]
        np.testing.assert_allclose([s.score for s in ours.segments], [s.score for s in theirs.segments], atol=1e-4)


@pytest.mark.parametrize("old", [(4, 4), (5, 7)])
@pytest.mark.parametrize("new", [(1, 1), (4, 4), (3, 9), (16, 5)])
def test_position_tables_are_resampled_by_products_as_by_pytorch(old, new):
    table = torch.randn(old[0] * old[1], 6)
    grid = table.reshape(1, *old, 6).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=new, mode="bicubic", antialias=True)[0].flatten(1).T
    torch.testing.assert_close(resample_by_products(table, old, new, antialiased_weights), expected, atol=1e-5, rtol=0)
    official = resample_by_products(table, old, new, official_weights)
    torch.testing.assert_close(official, resample_as_official(table, old, new), atol=1e-5, rtol=0)


@onnx_installed
def test_an_onnx_folder_holds_all_that_travels(onnx_folder, source):
    names = {"README.md", "config.json", "export.json", "model.onnx", "preprocessor_config.json"}
    assert {path.name for path in onnx_folder.iterdir()} == names
    record = json.loads((onnx_folder / "export.json").read_text())
    sizes = {(check["height"], check["width"]) for check in record["checks"]}
    assert len(sizes) == 3
    assert (64, 64) in sizes
    assert {check["batch"] for check in record["checks"]} == {1, 2}
    assert all(check["difference"] < record["tolerance"] == 1e-4 for check in record["checks"])
    config, original = (json.loads((f / "config.json").read_text()) for f in (onnx_folder, source))
    assert config.pop("exported") == "onnx"
    assert config == original
    card = (onnx_folder / "README.md").read_text()
    assert card.startswith("# A model\n")
    assert "Largest difference from PyTorch" in card
    assert str(source).encode() not in (onnx_folder / "model.onnx").read_bytes()
    assert b".py" not in (onnx_folder / "model.onnx").read_bytes(), "no paths of this machine"


@onnx_installed
@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 64, 64), (2, 32, 96), (1, 16, 48), (2, 160, 112)])
def test_one_onnx_file_takes_any_batch_and_size(onnx_folder, source, shape):
    batch, height, width = shape
    pixels = torch.randn(batch, 3, height, width)
    exported, (model, _) = load_exported_model(onnx_folder), load_segmentation_model(str(source))
    ours, theirs = exported(pixels), model(pixels)
    for name in ("class_queries_logits", "masks_queries_logits"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-4, rtol=1e-4)
    processor = processor_of()
    maps = processor.post_process_semantic_segmentation(theirs, target_sizes=[(height, width)] * batch, size=shape[1:])
    semantic = exported.semantic_map(pixels)
    assert semantic.dtype == torch.uint8
    assert (semantic != torch.stack(maps)).float().mean() < 1e-3


@onnx_installed
def test_an_onnx_folder_segments_like_pytorch(onnx_folder, source):
    same_answers(onnx_folder, source, threads=1)


@onnx_installed
@openvino_installed
@runs_openvino
def test_openvino_reads_its_own_and_onnx_files(onnx_folder, openvino_folder, source):
    same_answers(openvino_folder, source, threads=1)
    same_answers(onnx_folder, source, runtime="openvino")
    # Another precision is really used, and near.
    pixels = torch.randn(1, 3, 64, 64)
    exact, rough = (
        load_exported_model(openvino_folder, RuntimeSettings(dtype=dtype))(pixels).masks_queries_logits
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (exact - rough).abs().max() < 0.1 * exact.abs().max()


@onnx_installed
def test_the_pipeline_gives_the_same_masks(onnx_folder, source):
    (image,) = noise_images([(80, 50)])
    exported = Segmenter.from_pretrained(str(onnx_folder))
    settings = {"threshold": 0.3, "overlap_mask_area_threshold": 0.05}
    expected = pipeline("image-segmentation", model=str(source))(image, **settings)
    assert expected
    for ours in (
        pipeline("image-segmentation", model=exported.model, image_processor=exported.processor),
        pipeline("image-segmentation", model=str(onnx_folder), model_kwargs={"threads": 1}),
    ):
        assert isinstance(ours.model, ExportedEoMT)
        answers = ours(image, **settings)
        assert [row["label"] for row in answers] == [row["label"] for row in expected]
        for row, other in zip(answers, expected, strict=True):
            assert (np.asarray(row["mask"]) != np.asarray(other["mask"])).mean() < 1e-3
    # Weights of PyTorch are never expected in such a folder.
    with pytest.raises(ValueError, match="runtime='aotinductor' does not read onnx files"):
        EoMTForUniversalSegmentation.from_pretrained(onnx_folder, runtime="aotinductor")


@onnx_installed
def test_commands_take_an_exported_folder(onnx_folder, source, tmp_path, capsys):
    image = tmp_path / "image.png"
    noise_images([(80, 50)])[0].save(image)
    for name, folder in (("ours", onnx_folder), ("theirs", source)):
        command = ["segment", str(image), "--model", str(folder), "--output", str(tmp_path / name), "--threads", "1"]
        assert main(command) == 0
    assert "on cpu (onnxruntime, 1 thread)" in capsys.readouterr().err
    maps = [np.asarray(Image.open(tmp_path / name / "image.panoptic.png")) for name in ("ours", "theirs")]
    assert (maps[0] != maps[1]).mean() < 1e-3
    scores = []
    for name, folder in (("ours", onnx_folder), ("theirs", source)):
        data = ["--data", "generated:easy?num_scenes=4&size=48", "--task", "semantic"]
        assert main(["evaluate", "--model", str(folder), *data, "--json", str(tmp_path / f"{name}.json")]) == 0
        scores.append(json.loads((tmp_path / f"{name}.json").read_text())["metrics"]["mean_iou"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


BLOCKER = """
import runpy, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "transformers", "hf_segvit", "scipy"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
try:
    import torch
except ImportError:
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@onnx_installed
def test_the_example_without_pytorch_gives_the_same_segments(onnx_folder, source, tmp_path):
    assert len(EXAMPLE.read_text().splitlines()) <= 150
    segmenter = Segmenter.from_pretrained(str(source))
    for index, image in enumerate(noise_images([(80, 50), (40, 90)])):
        # Smooth, as Pillow and torchvision round resized noise differently.
        image = image.resize((9, 7)).resize(image.size, Image.Resampling.BICUBIC)
        file, result = tmp_path / f"{index}.png", tmp_path / f"{index}.map.png"
        image.save(file)
        command = [sys.executable, "-c", BLOCKER, str(EXAMPLE), str(onnx_folder), str(file), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (expected,) = segmenter([image])
        assert expected.segments
        ids = np.asarray(Image.open(result)).astype(int)  # void is 0 in a file
        assert (ids != np.maximum(expected.segment_map, 0)).mean() < 5e-3
        rows = [line.split() for line in done.stdout.splitlines()]
        assert [row[1] for row in rows] == [segment.label for segment in expected.segments]
        scores = [segment.score for segment in expected.segments]
        np.testing.assert_allclose([float(row[2]) for row in rows], scores, atol=2e-3)


def refused(code: str, *words: str, capsys) -> None:
    assert main(list(words)) == 2
    assert code in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--format", "onx"), "unknown format 'onx'; did you mean onnx?"),
        (("--size", "70x64"), "height=70 must be a multiple of patch_size=16; the nearest is 64"),
        (("--size", "64by64"), "size '64by64': give HEIGHTxWIDTH"),
        (("--opset", "9"), "opset=9 is for the formats onnx and openvino, from 18"),
        (("--format", "pt2", "--opset", "18"), "opset=18 is for the formats"),
        (("--batch", "0"), "--batch 0 must be at least 1"),
        (("--max-size", "64"), "max_size=(64, 64) is for executorch; in the format onnx a model takes any size"),
    ],
)
@onnx_installed
def test_wrong_options_write_nothing(words, message, source, tmp_path, capsys):
    refused(message, "export", str(source), str(tmp_path / "out"), *words, capsys=capsys)
    assert list(tmp_path.iterdir()) == []


@onnx_installed
def test_masked_and_unknown_models_are_refused(tmp_path, onnx_folder):
    with pytest.raises(ValueError, match=r"still masks its attention in query layers 0, 1 .*annealed"):
        export_model(tiny_eomt(), tmp_path / "out", processor=processor_of())
    with pytest.raises(ValueError, match="Linear cannot be exported"):
        export_model(torch.nn.Linear(1, 1), tmp_path / "out", processor=processor_of())
    mask2former = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(
        tiny_generator("mask2former"), tiny_classifier()
    )
    with pytest.raises(ValueError, match=r"generator .* is a Mask2Former.* of Transformers, .* fuse with an EoMT"):
        export_model(mask2former, tmp_path / "out", processor=processor_of())
    with pytest.raises(ValueError, match="a ViT-P classifies points"):
        export_model(tiny_classifier(), tmp_path / "out", processor=ViTPImageProcessor(), semantic_map=True)
    with pytest.raises(ValueError, match="exported to onnx, which has no weights for PyTorch"):
        load_segmentation_model(str(onnx_folder))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_names_the_command(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_segvit.export.formats.find_spec", lambda name: None)
    message = "needs onnx, onnxscript, openvino; install with `pip install 'hf-segvit[openvino]'`"
    refused(message, "export", str(source), str(tmp_path / "out"), "--format", "openvino", capsys=capsys)


@onnx_installed
def test_an_export_that_answers_otherwise_never_appears(source, tmp_path, monkeypatch):
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "config.json").write_text("{}")

    def lying(*args):
        return lambda inputs: [torch.zeros(1, 7, 7), torch.zeros(1, 7, 16, 16)]

    written = GraphRecord({"model.onnx": 1}, ["pixel_values"], ["class_queries_logits", "masks_queries_logits"], 16)
    monkeypatch.setattr("hf_segvit.export.export._write", lambda *args: written)
    monkeypatch.setattr("hf_segvit.export.export.open_graph", lying)
    with pytest.raises(ValueError, match="class_queries_logits differs from PyTorch's by"):
        export_model(str(source), tmp_path / "keep", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]
    assert (tmp_path / "keep" / "config.json").read_text() == "{}"


@onnx_installed
def test_sizes_that_do_not_fit_are_refused_at_run_time(onnx_folder):
    model = load_exported_model(onnx_folder)
    for shape, message in (
        ((1, 3, 70, 64), "70 x 64 pixels: both sides must be multiples of patch_size=16"),
        ((1, 4, 64, 64), r"must be \(batch, 3, height, width\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="mask_labels: an exported model has no loss"):
        model(torch.zeros(1, 3, 64, 64), mask_labels=[torch.zeros(1, 64, 64)])


def rewrite_record(folder: Path, **changes) -> None:
    record = json.loads((folder / "export.json").read_text())
    record["graphs"]["model"]["files"] = {"model.onnx": (folder / "model.onnx").stat().st_size}
    (folder / "export.json").write_text(json.dumps({**record, **changes}))


@onnx_installed
def test_damaged_folders_are_refused(damaged):
    content = (damaged / "model.onnx").read_bytes()

    def refuses(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Segmenter.from_pretrained(str(damaged))

    (damaged / "model.onnx").write_bytes(content[:1000])
    refuses("model.onnx has 1000 bytes instead of .* truncated")
    rewrite_record(damaged)
    refuses("ONNX Runtime .* cannot open .*model.onnx: .*damaged or of another kind")
    (damaged / "model.onnx").write_bytes(b"not a model at all")
    rewrite_record(damaged)
    refuses("damaged or of another kind")
    (damaged / "model.onnx").write_bytes(content)
    rewrite_record(damaged, version=99)
    refuses("version 99, but this hf-segvit reads up to 1; update")
    rewrite_record(damaged, version=1, format="exe")
    refuses("format 'exe' is not one of onnx")
    rewrite_record(damaged, format="onnx")
    record = json.loads((damaged / "export.json").read_text())
    record["graphs"]["model"]["files"] = {"../onnx/model.onnx": 1}
    (damaged / "export.json").write_text(json.dumps(record))
    refuses("'../onnx/model.onnx' is not in the folder itself")
    (damaged / "export.json").write_text('{"version": 1, "graphs"')
    refuses("export.json is damaged")
    (damaged / "export.json").write_text('{"version": 1, "format": "onnx"}')
    refuses("export.json is damaged: it lacks a field")
    (damaged / "export.json").unlink()
    refuses("an exported model without export.json")


@onnx_installed
def test_foreign_and_newer_onnx_files_are_refused(damaged, tmp_path):
    import onnx

    def refuses(proto, message: str) -> None:
        (damaged / "model.onnx").write_bytes(proto.SerializeToString())
        rewrite_record(damaged)
        with pytest.raises(ValueError, match=message):
            Segmenter.from_pretrained(str(damaged))

    original = onnx.load(damaged / "model.onnx")
    newer = onnx.load(damaged / "model.onnx")
    newer.ir_version = 99
    refuses(newer, "the file is newer than ONNX Runtime .*: update that, or export with a lower opset")
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    other = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
    refuses(other, "is another model: it takes x and gives y")
    graph.node[0].op_type, graph.node[0].domain = "Steal", "evil.ops"
    other = onnx.helper.make_model(graph, ir_version=10)
    other.opset_import.append(onnx.helper.make_opsetid("evil.ops", 1))
    refuses(other, "ONNX Runtime .* cannot open")
    # Weights in a file outside of the folder are never read.
    (tmp_path / "secret").write_bytes(bytes(4 * 4096))
    for name in ("../secret", str(tmp_path / "secret")):
        outside = onnx.ModelProto.FromString(original.SerializeToString())
        weight = max(outside.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        length = len(weight.raw_data)
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        for key, text in (("location", name), ("offset", "0"), ("length", str(length))):
            weight.external_data.add(key=key, value=text)
        (tmp_path / "secret").write_bytes(bytes(length))
        refuses(outside, "ONNX Runtime .* cannot open")


@onnx_installed
def test_unsuitable_settings_are_refused(onnx_folder, source, capsys, tmp_path):
    for settings, message in (
        ({"runtime": "aotinductor"}, "runtime='aotinductor' does not read onnx files; onnxruntime or openvino does"),
        ({"device": "tpu"}, "ONNX Runtime runs on cpu, cuda"),
        ({"device": "cuda"}, "this ONNX Runtime has no CUDA"),
        ({"dtype": torch.bfloat16}, "in float32; for dtype torch.bfloat16 use OpenVINO"),
        ({"threads": 0}, "threads=0 must be at least 1"),
        ({"alpha": 0.5}, "exported model, whose labels and alpha are fixed"),
    ):
        if settings.get("device") == "cuda":
            import onnxruntime

            if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
                continue
        with pytest.raises(ValueError, match=message):
            Segmenter.from_pretrained(str(onnx_folder), **settings)
    with pytest.raises(ValueError, match="has weights for PyTorch; export it"):
        Segmenter.from_pretrained(str(source), runtime="onnxruntime")


@openvino_installed
@runs_openvino
def test_damaged_openvino_files_are_refused(openvino_folder, tmp_path):
    folder = Path(shutil.copytree(openvino_folder, tmp_path / "copy"))
    xml = (folder / "model.xml").read_bytes()
    (folder / "model.xml").write_bytes(xml[: len(xml) // 2])
    with pytest.raises(ValueError, match=r"model.xml has .* truncated"):
        Segmenter.from_pretrained(str(folder))
    record = json.loads((folder / "export.json").read_text())
    record["graphs"]["model"]["files"]["model.xml"] = len(xml) // 2
    (folder / "export.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"OpenVINO .* cannot open .*model.xml"):
        Segmenter.from_pretrained(str(folder))


# From here on each test exports models of its own, which takes seconds.


@pytest.mark.slow
@onnx_installed
@openvino_installed
@runs_openvino
@pytest.mark.parametrize("family", [*FAMILIES, "eva", "siglip"])
def test_every_family_is_exported(family, tmp_path):
    settings = {**FAMILIES, "eva": EVA, "siglip": SIGLIP}[family]
    model = unmasked(num_hidden_layers=2, num_query_layers=1, **settings)
    record = export_model(model, tmp_path / "out", "onnx", processor_of())
    assert max(check["difference"] for check in record.checks) < 1e-5
    # The export compared ONNX Runtime with PyTorch; OpenVINO reads the same file.
    exported = load_exported_model(tmp_path / "out", RuntimeSettings(runtime="openvino"))
    for shape in ((1, 3, 64, 64), (2, 3, 32, 96)):
        pixels = torch.randn(shape)
        with torch.inference_mode():
            ours, theirs = exported(pixels), model(pixels)
        for name in ("class_queries_logits", "masks_queries_logits"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@onnx_installed
@pytest.mark.parametrize("settings", [{}, {"position_interpolation": "official"}, {"prompt_attention": "isolated"}])
def test_a_point_classifier_is_exported(settings, tmp_path):
    model = tiny_classifier(**settings)
    processor = ViTPImageProcessor(size={"height": 56, "width": 56})
    export_model(model, tmp_path / "out", "onnx", processor)
    exported, images = (
        PointClassifier.from_pretrained(str(tmp_path / "out"), threads=1),
        noise_images([(80, 50), (40, 90)]),
    )
    points = [torch.rand(300, 2), torch.rand(1, 2)]
    expected = PointClassifier(model, processor)(images, points)
    for ours, theirs in zip(exported(images, points), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="exported ViT-P, which classifies points"):
        Segmenter.from_pretrained(str(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file_format", "attention"),
    [
        pytest.param("onnx", "joint", marks=onnx_installed),
        pytest.param("openvino", "isolated", marks=[openvino_installed, runs_openvino]),
        pytest.param("executorch", "joint", marks=executorch_installed),
    ],
)
def test_a_fused_model_is_exported(file_format, attention, tmp_path):
    generator = unmasked(num_hidden_layers=2, num_query_layers=1, id2label=dict(LABELS))
    classifier = tiny_classifier(prompt_attention=attention)
    model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(generator, classifier)
    processor = ViTPFusionImageProcessor.from_generator_and_classifier(
        processor_of(), ViTPImageProcessor(size={"height": 56, "width": 56}), config=model.config
    )
    model.save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    export_model(str(tmp_path / "source"), tmp_path / "out", file_format)
    same_answers(tmp_path / "out", tmp_path / "source")
    images = noise_images([(80, 50)])
    for (before, after), (old_before, old_after) in zip(
        Segmenter.from_pretrained(str(tmp_path / "out")).compare(images),
        Segmenter.from_pretrained(str(tmp_path / "source")).compare(images),
        strict=True,
    ):
        assert [s.label for s in before.segments] == [s.label for s in old_before.segments]
        assert [s.label for s in after.segments] == [s.label for s in old_after.segments]


@pytest.mark.slow
@onnx_installed
@pytest.mark.parametrize("kind", ["eomt", "eomt_dinov3"])
def test_an_eomt_of_transformers_is_translated_for_the_export(kind, tmp_path):
    generator = tiny_generator(kind)
    generator.attn_mask_probs.zero_()
    model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(generator, tiny_classifier())
    processor = ViTPFusionImageProcessor.from_generator_and_classifier(
        processor_of(), ViTPImageProcessor(size={"height": 56, "width": 56}), config=model.config
    )
    export_model(model, tmp_path / "out", "onnx", processor)
    assert model.generator is generator, "the caller's own stays as it is"
    exported, inputs = load_exported_model(tmp_path / "out"), processor(noise_images([(80, 50)]))
    with torch.inference_mode():
        ours, theirs = exported(**inputs), model(**inputs)
    for name in ("generator_class_queries_logits", "masks_queries_logits", "class_queries_logits"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@onnx_installed
def test_fixed_sizes_take_nothing_else(source, tmp_path):
    out = tmp_path / "out"
    record = export_model(str(source), out, "onnx", size=(48, 96), batch=2, opset=18)
    assert {(check["batch"], check["height"], check["width"]) for check in record.checks} == {(2, 48, 96)}
    exported, processor = load_exported_model(out), EoMTImageProcessor.from_pretrained(out)
    assert dict(processor.size) == {"height": 48, "width": 96}
    pixels = torch.randn(3, 3, 48, 96)  # the last batch is filled up
    model, _ = load_segmentation_model(str(source))
    torch.testing.assert_close(
        exported(pixels).masks_queries_logits, model(pixels).masks_queries_logits, atol=1e-4, rtol=1e-4
    )
    with pytest.raises(ValueError, match="64 x 64 pixels, but the model was exported for 48 x 96 only"):
        exported(torch.randn(1, 3, 64, 64))
    assert isinstance(exported, ExportedEoMT)


@pytest.mark.slow
@pytest.mark.own_process  # a compiler and native code, beside the threads of the other runtimes
@compiler_installed
def test_native_code_runs_only_if_allowed(source, tmp_path, capsys):
    out = tmp_path / "out"
    export_model(str(source), out, "pt2")
    refused(
        "native code, which can do anything that you can; if you trust who made it, pass --allow-native-code",
        *("segment", str(EXAMPLE), "--model", str(out), "--output", str(tmp_path / "results")),
        capsys=capsys,
    )
    same_answers(out, source, allow_native_code=True)
    (out / "model.pt2").write_bytes((out / "model.pt2").read_bytes()[:5000])
    with pytest.raises(ValueError, match="truncated"):
        Segmenter.from_pretrained(str(out), allow_native_code=True)


@pytest.mark.slow
@executorch_installed
def test_an_executorch_program_takes_sizes_up_to_the_largest(source, tmp_path):
    record = export_model(str(source), tmp_path / "out", "executorch", max_size=(64, 96))
    assert record.graphs["model"].limits == {"height": 64, "width": 96}
    assert len({(check["height"], check["width"]) for check in record.checks}) == 3
    exported, (model, _) = load_exported_model(tmp_path / "out"), load_segmentation_model(str(source))
    for shape in ((1, 3, 64, 96), (3, 3, 16, 48), (1, 3, 64, 64)):  # images beyond one are run in turns
        pixels = torch.randn(shape)
        ours, theirs = exported(pixels).masks_queries_logits, model(pixels).masks_queries_logits
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"80 x 64 pixels, but memory was planned for 64 x 96 at most .* larger max_s"):
        exported(torch.randn(1, 3, 80, 64))
    same_answers(tmp_path / "out", source)


@pytest.mark.slow
@executorch_installed
@pytest.mark.parametrize("attention", ["joint", "isolated"])
def test_executorch_programs_classify_points(attention, tmp_path):
    model, processor = tiny_classifier(prompt_attention=attention), ViTPImageProcessor(size={"height": 56, "width": 56})
    export_model(model, tmp_path / "out", "executorch", processor)
    exported = load_exported_model(tmp_path / "out")
    for number in (1, 9, 512, 600):
        pixels, prompts = torch.randn(2, 3, 56, 56), torch.rand(2, number, 4)
        if number > 512 and attention == "joint":
            with pytest.raises(ValueError, match="600 prompts of an image, but memory was planned for 512 at most"):
                exported(pixels, prompts)
            continue
        torch.testing.assert_close(
            exported(pixels, prompts).logits, model(pixels, prompts).logits, atol=1e-4, rtol=1e-4
        )


SCORES = """
import json, sys
from pathlib import Path
from hf_segvit import EoMTImageProcessor, Segmenter, export_model
from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.demo import run_demo
from hf_segvit.evaluation import evaluate

root = Path(sys.argv[1])
run_demo(root, seed=0, steps=80, num_training_scenes=640, num_test_scenes=4)
scenes = GeneratedScenes(40, "test", seed=0, size=(64, 64))
stuff = EoMTImageProcessor.from_pretrained(root / "model").stuff_classes

def score(folder, **settings):
    values = []
    for task, name in (("panoptic", "pq"), ("semantic", "mean_iou")):
        segmenter = Segmenter.from_pretrained(str(folder), task=task, **settings)
        result = evaluate(segmenter, scenes, scenes.id2label, stuff_classes=stuff, batch_size=10)
        values.append(result.metrics[name])
    return values

scores = {"pytorch": score(root / "model")}
for file_format in sys.argv[2:]:
    try:
        export_model(str(root / "model"), root / file_format, file_format)
        native = {"allow_native_code": True} if file_format == "pt2" else {}
        scores[file_format] = score(root / file_format, **native)
    except Exception as error:
        scores[file_format] = repr(error)
(root / "scores.json").write_text(json.dumps(scores))
"""
# pt2 first: its compiler runs in processes of its own, which are not started from one with all runtimes' threads.
SCORED = {
    "pt2": compiler_installed,
    "executorch": executorch_installed,
    "onnx": onnx_installed,
    "openvino": openvino_installed,
}


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> dict[str, list[float]]:
    """PQ and mIoU of a trained model in PyTorch and in every format that is installed."""
    folder = tmp_path_factory.mktemp("trained")
    formats = [name for name, mark in SCORED.items() if not mark.args[0]]
    # A process of its own, as one that has trained and run every runtime does not start others safely.
    command = [sys.executable, "-c", SCORES, str(folder), *formats]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "scores.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("file_format", [pytest.param(name, marks=mark) for name, mark in SCORED.items()])
def test_pytorch_and_every_export_score_the_same(file_format, scores):
    assert min(scores["pytorch"]) > 0.05, "a model that finds nothing would score the same everywhere"
    assert scores[file_format] == pytest.approx(scores["pytorch"], abs=1e-3)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        server.stand_in(monkeypatch, tmp_path / "cache")
        yield server


USE_BY_NAME = """
import json
from pathlib import Path
from transformers import pipeline
from hf_segvit import Segmenter
from hf_segvit.cli import main

def labels(revision):
    segmenter = Segmenter.from_pretrained("tester/tiny-onnx" if revision is None else "tester/tiny", revision=revision)
    return [segment.label for segment in segmenter("image.png").segments]

answers = {"labels": labels(None), "branch": labels("onnx")}
answers["pipeline"] = type(pipeline("image-segmentation", model="tester/tiny-onnx").model).__name__ == "ExportedEoMT"
assert main(["segment", "image.png", "--model", "tester/tiny-onnx", "--output", "results"]) == 0
data = ["--data", "generated:easy?num_scenes=2&size=48", "--task", "semantic"]
assert main(["evaluate", "--model", "tester/tiny-onnx", *data, "--json", "scores.json"]) == 0
answers["mean_iou"] = json.loads(Path("scores.json").read_text())["metrics"]["mean_iou"]
Path("answers.json").write_text(json.dumps(answers))
"""


@onnx_installed
def test_an_export_is_published_and_used_by_its_name(onnx_folder, source, hub, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(onnx_folder, tmp_path / "folder"))
    (folder / "model.onnx.data").write_bytes(b"of an earlier export")
    assert main(["push", str(folder), "tester/tiny-onnx", "--dry-run"]) == 0
    assert hub.requests == []
    assert "left out: model.onnx.data" in capsys.readouterr().out
    assert main(["push", str(folder), "tester/tiny-onnx"]) == 0
    published = hub.files("tester/tiny-onnx")
    assert set(published) == {"README.md", "config.json", "export.json", "model.onnx", "preprocessor_config.json"}
    assert published["model.onnx"] == (folder / "model.onnx").read_bytes()
    assert b'Segmenter.from_pretrained("tester/tiny-onnx")' in published["README.md"]
    assert len([path for method, path in hub.requests if "/commit/" in path]) == 1
    # A later export of another format leaves nothing of the first.
    other = Path(shutil.copytree(onnx_folder, tmp_path / "other"))
    (other / "model.onnx").rename(other / "generator.onnx")
    record = json.loads((other / "export.json").read_text())
    record["graphs"]["model"]["files"] = {"generator.onnx": (other / "generator.onnx").stat().st_size}
    (other / "export.json").write_text(json.dumps(record))
    push_to_hub(other, "tester/tiny-onnx", revision="next")
    assert {name for name in hub.files("tester/tiny-onnx", "next") if "onnx" in name} == {"generator.onnx"}
    # Weights and exports do not replace one another on the main branch by mistake.
    push_to_hub(source, "tester/tiny")
    with pytest.raises(ValueError, match=r"tester/tiny holds weights for PyTorch.* such as tester/tiny-exported"):
        push_to_hub(folder, "tester/tiny")
    push_to_hub(folder, "tester/tiny", revision="onnx")
    assert "model.safetensors" not in hub.files("tester/tiny", "onnx")
    script = tmp_path / "use.py"
    noise_images([(80, 50)])[0].save(tmp_path / "image.png")
    script.write_text(USE_BY_NAME)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads((tmp_path / "answers.json").read_text())
    expected = Segmenter.from_pretrained(str(source))(tmp_path / "image.png")
    assert answers["labels"] == answers["branch"] == [segment.label for segment in expected.segments]
    assert answers["pipeline"]
    assert (tmp_path / "results" / "image.panoptic.png").is_file()
    assert 0 <= answers["mean_iou"] <= 1


@onnx_installed
def test_a_damaged_export_is_not_published(damaged, hub):
    def refuses(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            push_to_hub(damaged, "tester/tiny")
        assert hub.requests == []

    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({**config, "exported": "pt2"}))
    refuses("says that the model is exported to 'pt2', and export.json that it is onnx")
    (damaged / "config.json").write_text(json.dumps(config))
    record = json.loads((damaged / "export.json").read_text())
    for files, message in (
        ({"config.json": (damaged / "config.json").stat().st_size}, "'config.json', which is no file of an export"),
        ({"model.onnx": 5}, "instead of 5, so it is truncated"),
        ({"../model.onnx": 5}, "is not in the folder itself"),
    ):
        record["graphs"]["model"]["files"] = files
        (damaged / "export.json").write_text(json.dumps(record))
        refuses(message)
    record["graphs"] = {"generator": {**record["graphs"]["model"], "files": {}}}
    (damaged / "export.json").write_text(json.dumps(record))
    refuses(r"has the graphs \['generator'\], not \['model'\]")
    (damaged / "export.json").unlink()
    refuses("an exported model without export.json")


@openvino_installed
@pytest.mark.parametrize("action", ["open", pytest.param("export", marks=pytest.mark.slow)])
def test_openvino_reports_its_use_to_nobody(action, source, tmp_path):
    code = """
import os, sys
from hf_segvit import export_model
from hf_segvit.inference import runtimes
def refuse(event, arguments):
    if event in ("os.fork", "socket.connect", "socket.getaddrinfo"):
        os.write(2, f"{event} {arguments}".encode())
        os._exit(1)
sys.addaudithook(refuse)
if sys.argv[1] == "open":
    runtimes._import("openvino", "openvino")
else:
    export_model(sys.argv[2], sys.argv[3], "openvino")
print("CI" in os.environ, "openvino.tools.ovc" in sys.modules)
"""
    # Reports are sent by a forked process, and counted in a folder of the user's home.
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "NNCF_CI")}
    environment |= {"HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", code, action, str(source), str(tmp_path / "out")]
    (tmp_path / "home").mkdir()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[-2:]) == (0, ["False", "True"]), done.stderr[-2000:]
    assert not list((tmp_path / "home").iterdir())
