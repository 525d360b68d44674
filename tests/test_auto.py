"""Auto classes and the image-segmentation pipeline know our models after `import hf_segvit`, from a saved folder."""

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
    EoMTConfig,
    EoMTForUniversalSegmentation,
    EoMTImageProcessor,
    EoMTModel,
    PlainViTConfig,
    PlainViTModel,
)

from .tiny_models import tiny_eomt

LABELS = {0: "sky", 1: "grass", 2: "cat", 3: "dog", 4: "car"}


def confident_model() -> EoMTForUniversalSegmentation:
    """A model whose first queries claim fixed parts of the image: classes 0, 0 (stuff) and 2, 3 (things)."""
    model = tiny_eomt(id2label=LABELS)
    model.set_masked_attention_probabilities(0)
    claims = [(0, slice(0, 8), slice(0, 16)), (0, slice(8, 9), slice(0, 16)), (2, slice(9, 16), slice(0, 8))]
    claims.append((3, slice(9, 16), slice(8, 16)))

    def claim(module, args, kwargs, outputs):
        batch_size = outputs.class_queries_logits.shape[0]
        classes = torch.zeros(batch_size, 7, 6)
        classes[..., -1] = 20
        masks = torch.full((batch_size, 7, 16, 16), -10.0)
        for query, (label, rows, columns) in enumerate(claims):
            classes[:, query, label] = 40
            masks[:, query, rows, columns] = 10
        outputs["class_queries_logits"], outputs["masks_queries_logits"] = classes, masks
        return outputs

    model.register_forward_hook(claim, with_kwargs=True)
    return model


def save(folder, task: str) -> None:
    tiny_eomt(id2label=LABELS, masked_attention_probabilities=[0.0, 0.0]).save_pretrained(folder)
    EoMTImageProcessor(task=task, size={"height": 64, "width": 64}, stuff_classes=[0, 1]).save_pretrained(folder)


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def test_auto_classes_load_a_saved_folder(tmp_path, caplog) -> None:
    save(tmp_path, "panoptic")
    assert type(AutoConfig.from_pretrained(tmp_path)) is EoMTConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is EoMTModel
    assert type(AutoModelForUniversalSegmentation.from_pretrained(tmp_path)) is EoMTForUniversalSegmentation
    assert type(AutoModelForSemanticSegmentation.from_pretrained(tmp_path)) is EoMTForUniversalSegmentation
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is EoMTImageProcessor
    config = PlainViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config.save_pretrained(tmp_path / "vit")
    assert type(AutoModel.from_config(AutoConfig.from_pretrained(tmp_path / "vit"))) is PlainViTModel
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "WARNING")]


@pytest.mark.parametrize(
    ("task", "subtasks"),
    [("panoptic", ["panoptic", "instance", "semantic"]), ("semantic", ["semantic"]), ("instance", ["instance"])],
)
def test_pipeline_from_a_folder_serves_the_subtasks_of_the_checkpoint(tmp_path, image, capfd, task, subtasks) -> None:
    save(tmp_path, task)
    segmenter = pipeline("image-segmentation", model=str(tmp_path))
    segmenter.model.register_forward_hook(next(iter(confident_model()._forward_hooks.values())), with_kwargs=True)
    for subtask in (None, *subtasks):
        segments = segmenter(image, **({"subtask": subtask} if subtask else {}))
        answered = subtask or task
        labels = [segment["label"] for segment in segments]
        if answered == "panoptic":
            assert sorted(labels) == ["cat", "dog", "sky"]  # the two pieces of sky are one
            sky = next(s for s in segments if s["label"] == "sky")
            assert np.asarray(sky["mask"])[:34].min() == 255
        elif answered == "instance":
            assert {"cat", "dog"} <= set(labels)
        else:
            assert set(labels) == {"sky", "cat", "dog"}
            assert all(segment["score"] is None for segment in segments)
        assert all(segment["mask"].size == image.size for segment in segments)
    for subtask in {"panoptic", "instance", "semantic"} - set(subtasks):
        with pytest.raises(ValueError, match="not supported for model"):
            segmenter(image, subtask=subtask)
    assert "is not supported" not in capfd.readouterr().err


def test_the_pipeline_answers_as_post_processing_when_told_both_thresholds(tmp_path, image) -> None:
    """README says so; the pipeline's own are 0.9 for scores and 0.5 for the share of its mask that a segment keeps."""
    save(tmp_path, "panoptic")
    segmenter = pipeline("image-segmentation", model=str(tmp_path))

    def overlapping(module, args, kwargs, outputs):
        classes, masks = torch.zeros(1, 7, 6), torch.full((1, 7, 16, 16), -10.0)
        classes[..., -1] = 20
        classes[:, 0, 2], masks[:, 0] = 40, 1.0  # all 12 rows; the others leave it 7
        classes[:, 1, 3], masks[:, 1, :3] = 40, 10.0
        classes[:, 2, 4], masks[:, 2, 10:] = 22, 10.0  # probability 0.87
        outputs["class_queries_logits"], outputs["masks_queries_logits"] = classes, masks
        return outputs

    segmenter.model.register_forward_hook(overlapping, with_kwargs=True)
    processor = segmenter.image_processor
    with torch.no_grad():
        outputs = segmenter.model(**processor(image, return_tensors="pt"))
    (called,) = processor.post_process_panoptic_segmentation(outputs, target_sizes=[image.size[::-1]])
    names = [LABELS[row["label_id"]] for row in called["segments_info"]]
    assert len(names) == 2
    told = segmenter(image, threshold=0.8, overlap_mask_area_threshold=0.8)
    assert [segment["label"] for segment in told] == names
    for segment, row in zip(told, called["segments_info"], strict=True):
        assert np.array_equal(np.asarray(segment["mask"]) > 0, (called["segmentation"] == row["id"]).numpy())
    assert [segment["label"] for segment in segmenter(image)] != names


def test_pipeline_takes_lists_and_batches_and_refuses_batches_of_windows(tmp_path, image) -> None:
    save(tmp_path / "panoptic", "panoptic")
    images = [image, image.resize((100, 40)), image.rotate(90, expand=True)]
    segmenter = pipeline("image-segmentation", model=str(tmp_path / "panoptic"))
    single = [segmenter(p, threshold=0) for p in images]
    assert all(single)
    for batched in (segmenter(images, threshold=0), segmenter(images, threshold=0, batch_size=2)):
        assert [[s["label"] for s in answer] for answer in batched] == [[s["label"] for s in a] for a in single]
    save(tmp_path / "semantic", "semantic")
    segmenter = pipeline("image-segmentation", model=str(tmp_path / "semantic"))
    assert len(segmenter(images)) == 3
    with pytest.raises(ValueError, match="batch"):
        segmenter(images, batch_size=3)
