"""Mask2Former on a plain ViT wherever EoMT works: Auto classes, pipeline, commands, backbones, publishing, training."""

import json
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    pipeline,
)

from hf_segvit import (
    EoMTImageProcessor,
    Mask2FormerViTConfig,
    Mask2FormerViTForUniversalSegmentation,
    Mask2FormerViTModel,
    PlainViTConfig,
    PlainViTModel,
    Segmenter,
    ViTPFusionForUniversalSegmentation,
)
from hf_segvit.cli import main
from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.hub.check import check_checkpoint
from hf_segvit.hub.model_card import make_model_card
from hf_segvit.hub.remote_code import code_files
from hf_segvit.models.configuration_mask2former_vit import REMOVABLE_PARTS
from hf_segvit.training.optimizers import BACKBONE, REST, layer_of, parameter_role

from .test_remote_code import environment_without_package
from .tiny_generators import tiny_classifier
from .tiny_models import DINOV2_GIANT, DINOV3, save_with_code, tiny_mask2former_vit, tiny_mask2former_vit_config

LABELS = GeneratedScenes(1).id2label
LABELS_BACK = {label: number for number, label in LABELS.items()}
CHOICES = {"task": "panoptic", "size": 64, "stuff_classes": [1, 2, 4], "threshold": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_mask2former_vit(id2label=LABELS).save_pretrained(path)
    EoMTImageProcessor(**CHOICES).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 60, 3), dtype=np.uint8))


def test_auto_classes_load_it(folder, caplog):
    assert type(AutoConfig.from_pretrained(folder)) is Mask2FormerViTConfig
    base = AutoModel.from_pretrained(folder)
    assert type(base) is Mask2FormerViTModel
    pixels = torch.randn(1, 3, 64, 64)
    expected = tiny_mask2former_vit(id2label=LABELS)(pixels)
    for auto_class in (AutoModelForUniversalSegmentation, AutoModelForSemanticSegmentation):
        model = auto_class.from_pretrained(folder)
        assert type(model) is Mask2FormerViTForUniversalSegmentation
        assert torch.equal(model(pixels).masks_queries_logits, expected.masks_queries_logits)
    assert torch.equal(base(pixels).masks_queries_logits[-1], expected.masks_queries_logits)
    assert type(AutoImageProcessor.from_pretrained(folder)) is EoMTImageProcessor
    assert "not initialized" not in caplog.text


@pytest.mark.parametrize("subtask", ["panoptic", "instance", "semantic"])
def test_the_pipeline_serves_all_subtasks(folder, image, subtask):
    segments = pipeline("image-segmentation", model=str(folder))(image, subtask=subtask, threshold=0.05)
    assert len(segments) >= 1
    assert {segment["mask"].size for segment in segments} == {image.size}
    assert {segment["label"] for segment in segments} <= set(LABELS.values())


def test_segmenter_answers_as_post_processing_does_and_semantic_windows_cover_the_image(folder, image):
    model = Mask2FormerViTForUniversalSegmentation.from_pretrained(folder).eval()
    processor = EoMTImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"))
    expected = processor.post_process_panoptic_segmentation(outputs, target_sizes=[(48, 60)])[0]
    segmented = Segmenter.from_pretrained(str(folder), device="cpu")(image)
    classes = {segment["id"]: segment["label_id"] for segment in expected["segments_info"]}
    assert classes
    found = {segment.id: LABELS_BACK[segment.label] for segment in segmented.segments}
    ours, theirs = (
        np.vectorize(lambda segment, table=table: table.get(segment, -1))(segment_map)
        for table, segment_map in ((found, segmented.segment_map), (classes, expected["segmentation"].numpy()))
    )
    assert np.array_equal(ours, theirs)
    processor = EoMTImageProcessor(**CHOICES | {"task": "semantic", "stuff_classes": []})
    inputs = processor(images=image, return_tensors="pt")
    assert len(inputs["pixel_values"]) == 2
    with torch.no_grad():
        outputs = model(**inputs)
    (semantic,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(48, 60)])
    assert semantic.shape == (48, 60)
    assert np.array_equal(Segmenter(model, processor, device="cpu")(image).segment_map, semantic.numpy())


def test_commands_segment_evaluate_and_measure(folder, image, tmp_path, capsys):
    image.save(tmp_path / "photo.png")
    words = ["--model", str(folder), "--device", "cpu"]
    assert main(["segment", str(tmp_path / "photo.png"), *words, "--output", str(tmp_path / "out")]) == 0
    assert any((tmp_path / "out").rglob("*photo*"))
    data = ["--data", "generated:easy", "--limit", "2", "--json", str(tmp_path / "result.json")]
    assert main(["evaluate", *words, *data]) == 0
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    assert 0 <= metrics["pq"] <= 1
    capsys.readouterr()
    quick = ["--device", "cpu", "--dtype", "float32", "--repeats", "1", "--forward-only"]
    assert main(["benchmark", str(folder), *quick, "--optimize", "fuse-qkv"]) == 0
    # A folder with nothing but config.json: random weights.
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert main(["benchmark", str(tmp_path / "config.json"), *quick]) == 0
    assert "andom weights: " in capsys.readouterr().out
    assert main(["export", str(folder), str(tmp_path / "onnx"), "--format", "onnx"]) == 2
    assert "Mask2FormerViTForUniversalSegmentation cannot be exported" in capsys.readouterr().err


def test_optimised_it_answers_as_before(image):
    model = tiny_mask2former_vit()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(pixels)
        for switches in ({"fuse_qkv": True}, {"channels_last": True}):
            outputs = model.optimize_for_inference(**switches)(pixels)
            torch.testing.assert_close(
                outputs.masks_queries_logits, expected.masks_queries_logits, rtol=1e-4, atol=1e-3
            )
    assert model.state_dict().keys() == tiny_mask2former_vit().state_dict().keys()


@pytest.mark.slow
def test_compiled_without_a_break_it_answers_as_before():
    model = tiny_mask2former_vit(num_decoder_layers=1, num_pixel_decoder_layers=1)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(pixels)
        outputs = model.optimize_for_inference(compile=True)(pixels)
    torch.testing.assert_close(outputs.masks_queries_logits, expected.masks_queries_logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("removed", ["nothing", "multi_scale"])
@pytest.mark.parametrize("family", [{}, DINOV2_GIANT, DINOV3, {"use_cls_token": False, "num_register_tokens": 0}])
def test_any_backbone_starts_it(removed, family, tmp_path):
    config = tiny_mask2former_vit_config(**family)
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    fields = {name: getattr(config, name) for name in fields} | family
    torch.manual_seed(3)
    backbone = PlainViTModel(PlainViTConfig(**fields, image_size=56, patch_size=14))
    heads = {"decoder_hidden_size": 32, "num_decoder_layers": 1, "num_pixel_decoder_layers": 1}
    model = Mask2FormerViTForUniversalSegmentation.from_backbone(
        backbone, image_size=96, removed=removed, num_labels=3, num_queries=4, **heads
    )
    assert model.config.patch_size == 16
    assert model.config.image_size == 96
    for name in ("layers.3.mlp." + ("up_proj" if "mlp_type" in family else "fc1") + ".weight", "layers.0.norm1.weight"):
        assert torch.equal(model.mask2former.get_parameter(name), backbone.get_parameter(name))
    assert model(torch.randn(1, 3, 96, 96)).masks_queries_logits.shape == (1, 4, 24, 24)
    # Everything that a backbone has no weights for is initialised, and can be trained and saved.
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    model.save_pretrained(tmp_path)
    assert Mask2FormerViTForUniversalSegmentation.from_pretrained(tmp_path).config.removed == removed


def test_too_shallow_a_backbone_is_refused_by_name():
    backbone = PlainViTModel(PlainViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=64))
    with pytest.raises(
        ValueError, match=r"num_hidden_layers=3: the adapter interacts with 4 groups .* deeper backbone"
    ):
        Mask2FormerViTForUniversalSegmentation.from_backbone(backbone)


def test_a_new_label_set_resets_the_class_head_only(folder):
    with pytest.raises(ValueError, match="ignore_mismatched_sizes=True"):
        Mask2FormerViTForUniversalSegmentation.from_pretrained(folder, num_labels=2)
    model = Mask2FormerViTForUniversalSegmentation.from_pretrained(folder, num_labels=2, ignore_mismatched_sizes=True)
    before = tiny_mask2former_vit(id2label=LABELS)
    assert model.class_predictor.out_features == 3
    changed = [name for name, tensor in before.mask2former.state_dict().items()
               if not torch.equal(model.mask2former.state_dict()[name], tensor)]  # fmt: skip
    assert changed == []


def test_the_folder_can_be_published_and_its_card_says_what_it_is(folder):
    checkpoint = check_checkpoint(folder)
    card = make_model_card(checkpoint.config, checkpoint.processor, num_parameters=checkpoint.num_parameters)
    assert "A ViT-Adapter with Mask2Former" in card
    assert "7, in 3 layers of a transformer decoder" in card
    assert "mask2former" in card.split("---")[1]


def test_the_blocks_of_the_decoders_do_not_pass_for_those_of_the_vit():
    for removed in REMOVABLE_PARTS:
        model = tiny_mask2former_vit(removed)
        roles = {name: parameter_role(name) for name, _ in model.named_parameters()}
        vit = {f"mask2former.{name}" for name, _ in PlainViTModel(model.config).named_parameters()}
        backbone = {name for name, role in roles.items() if role == BACKBONE}
        # Where an adapter reads the stream itself, there is no final norm.
        assert backbone == vit - ({name for name in vit if ".layernorm." in name} if removed == "nothing" else set())
        assert set(roles.values()) == {BACKBONE, REST}
        assert layer_of("mask2former.transformer_module.decoder.layers.1.fc1.weight") is None
        assert layer_of("mask2former.layers.1.norm1.weight") == 1


def test_a_fused_model_refuses_a_classifier_of_other_classes(tmp_path, folder):
    classifier = tiny_classifier({0: "boat", 1: "tree"})
    with pytest.raises(ValueError, match=r"boat|sky"):
        ViTPFusionForUniversalSegmentation.from_generator_and_classifier(
            tiny_mask2former_vit(id2label=LABELS), classifier
        )
    fused = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(str(folder), tiny_classifier(LABELS))
    fused.save_pretrained(tmp_path)
    again = ViTPFusionForUniversalSegmentation.from_pretrained(tmp_path)
    assert type(again.generator) is Mask2FormerViTForUniversalSegmentation
    for name, tensor in again.generator.state_dict().items():
        assert torch.equal(tensor, fused.generator.state_dict()[name]), name


LOAD = """
import json, pathlib, sys
import torch
try:
    import hf_segvit
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("hf_segvit is in the environment that should lack it")
from PIL import Image
from transformers import AutoModel, AutoModelForUniversalSegmentation, pipeline

answers = {}
for folder in sys.argv[1:]:
    model = AutoModelForUniversalSegmentation.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        outputs = model(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64))
    segmenter = pipeline("image-segmentation", model=folder, trust_remote_code=True)
    segments = segmenter(Image.open("photo.png"), subtask="semantic")
    answers[folder] = {
        "base": type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__,
        "module": type(model).__module__,
        "classes": outputs.class_queries_logits.flatten().tolist(),
        "masks": outputs.masks_queries_logits.flatten().tolist(),
        "labels": [segment["label"] for segment in segments],
    }
pathlib.Path("answers.json").write_text(json.dumps(answers))
"""


@pytest.mark.slow
def test_checkpoints_load_without_the_package(tmp_path, image):
    image.save(tmp_path / "photo.png")
    models = {str(tmp_path / removed): tiny_mask2former_vit(removed) for removed in REMOVABLE_PARTS}
    for path, model in models.items():
        (tmp_path / path).mkdir()
        save_with_code(model, EoMTImageProcessor(size=64, stuff_classes=[3, 4], threshold=0.05), tmp_path / path)
        assert {file.name for file in code_files("segvit_mask2former_vit")} < {
            file.name for file in (tmp_path / path).iterdir()
        }
    process = subprocess.run(
        [environment_without_package(tmp_path / "env"), "-c", LOAD, *models],
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    answers = json.loads((tmp_path / "answers.json").read_text())
    for path, model in models.items():
        found = answers[path]
        assert found["base"] == "Mask2FormerViTModel"
        assert found["module"].startswith("transformers_modules.")
        assert found["labels"]
        with torch.no_grad():
            outputs = model(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64))
        # The same code; another process may use other threads and so another order of sums.
        torch.testing.assert_close(
            torch.tensor(found["classes"]), outputs.class_queries_logits.flatten(), atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(
            torch.tensor(found["masks"]), outputs.masks_queries_logits.flatten(), atol=1e-3, rtol=1e-4
        )
