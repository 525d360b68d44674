"""Confidence maps of a `Segmenter` and of `hf-segvit segment`: values, files, overlays, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    SwinConfig,
)

from hf_segvit import EoMTImageProcessor, Segmenter
from hf_segvit.cli import main
from hf_segvit.cli.model_options import CONFIDENCES as OFFERED
from hf_segvit.drawing.segments import draw_segments
from hf_segvit.inference import segmented_image
from hf_segvit.inference.segmented_image import SegmentedImage
from hf_segvit.inference.views import Views
from hf_segvit.models.confidence import CONFIDENCES, Confidence

from .test_confidence import plain
from .tiny_models import tiny_eomt

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)


def test_the_command_offers_what_there_is():
    assert OFFERED == CONFIDENCES


@pytest.fixture(scope="module")
def model():
    model = tiny_eomt(num_queries=9)
    with torch.no_grad():
        model.class_predictor.weight *= 4
    return model


@pytest.fixture
def processor() -> EoMTImageProcessor:
    return EoMTImageProcessor(task="semantic", size={"height": 64, "width": 64})


def scores_of(model, processor, size) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        outputs = model(**processor([PIXELS], return_tensors="pt"))
    answer = processor.post_process_semantic_segmentation(outputs, [size], return_segmentation_scores=True)[0]
    return answer["segmentation"], answer["segmentation_scores"]


def test_answers_have_the_confidence(model, processor):
    labels, scores = scores_of(model, processor, (48, 72))
    segmenter = Segmenter(model, processor, device="cpu", confidence="entropy@0.5")
    answer = segmenter(PIXELS)
    assert np.array_equal(answer.segment_map, labels.numpy())
    assert answer.segments == Segmenter(model, processor, device="cpu")(PIXELS).segments
    assert answer.confidence.dtype == np.float32
    np.testing.assert_allclose(answer.confidence, plain(scores.numpy(), "entropy@0.5"), atol=1e-5)
    assert Segmenter(model, processor, device="cpu")(PIXELS).confidence is None
    pair = segmenter.confidences([PIXELS], ["msp", "rba"])[0]
    assert torch.equal(pair[0], labels)
    np.testing.assert_allclose(pair[1]["rba"], plain(scores.numpy(), "rba"), atol=1e-5)


def test_views_are_averaged_before_the_confidence(model, processor):
    segmenter = Segmenter(model, processor, device="cpu", confidence="rba", views=Views((1.0,), flip=True))
    answer = segmenter(PIXELS)
    mirrored = Segmenter(model, processor, device="cpu")
    with torch.inference_mode():
        total = 0
        for pixels, flipped in ((PIXELS, False), (PIXELS[:, ::-1].copy(), True)):
            outputs = model(**mirrored.processor([pixels], return_tensors="pt"))
            scores = processor.post_process_semantic_segmentation(outputs, [(48, 72)], return_segmentation_scores=True)[
                0
            ]["segmentation_scores"]
            total = total + (scores.flip(-1) if flipped else scores)
    np.testing.assert_allclose(answer.confidence, plain((total / 2).numpy(), "rba"), atol=1e-5)
    with pytest.raises(ValueError, match="rejection' is about queries"):
        Segmenter(model, processor, confidence="rejection", views=Views((1.0,), flip=True))


BACKBONE = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2], "window_size": 4}


def mask2former():
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(**BACKBONE, out_features=["stage1", "stage2", "stage3", "stage4"]),
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        num_queries=7,
        num_labels=4,
        decoder_layers=2,
        encoder_layers=1,
        num_attention_heads=2,
        dim_feedforward=32,
        encoder_feedforward_dim=32,
    )
    size = {"height": 64, "width": 64}
    return Mask2FormerForUniversalSegmentation(config), Mask2FormerImageProcessor(size=size, num_labels=4)


def maskformer():
    config = MaskFormerConfig(
        backbone_config=SwinConfig(**BACKBONE, out_features=["stage1", "stage2", "stage3", "stage4"]),
        num_labels=4,
        fpn_feature_size=32,
        mask_feature_size=32,
    )
    return MaskFormerForInstanceSegmentation(config), MaskFormerImageProcessor(size={"height": 64, "width": 64})


@pytest.mark.parametrize("build", [mask2former, maskformer])
def test_transformers_models(build):
    torch.manual_seed(0)
    model, processor = build()
    segmenter = Segmenter(model, processor, task="semantic", device="cpu", confidence="maxscore")
    answer = segmenter(PIXELS)
    with torch.inference_mode():
        outputs = model(**processor([PIXELS], return_tensors="pt"))
    theirs = processor.post_process_semantic_segmentation(outputs, [(48, 72)], return_segmentation_scores=True)[0]
    assert np.array_equal(answer.segment_map, theirs["segmentation"].numpy())
    np.testing.assert_allclose(answer.confidence, theirs["segmentation_scores"].amax(0), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "panoptic", "confidence": "rba"}, "is that of semantic segmentation, not of panoptic"),
        ({"task": "semantic", "confidence": "rbb"}, "there is no confidence 'rbb'"),
        ({"task": "semantic", "confidence": ["rba", "msp"]}, "an answer has one confidence; Segmenter.confidences"),
        ({"task": "semantic", "confidence": 0.5}, "0.5 is no confidence; name one or several of"),
    ],
)
def test_confidences_that_cannot_be_had(model, settings, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(model, EoMTImageProcessor(task="panoptic", size=64), **settings)


def test_a_model_without_semantic_task_says_so(model):
    with pytest.raises(ValueError, match="cannot do task 'semantic'"):
        Segmenter(model, EoMTImageProcessor(task="instance", size=64), task="semantic", confidence="rba")


def answer_with(confidence: list[list[float]], name: str = "maxscore") -> SegmentedImage:
    values = np.array(confidence, dtype=np.float32)
    return SegmentedImage(
        "semantic",
        np.zeros(values.shape, np.int32),
        [],
        id2label={0: "a", 1: "b", 2: "c"},
        confidence=values,
        confidence_score=Confidence(name),
    )


def test_a_png_is_clipped_and_that_is_said_once(monkeypatch):
    said = []
    monkeypatch.setattr(segmented_image.logger, "warning_once", said.append)
    levels = np.asarray(answer_with([[0, 0.5, 1.0, 1.2]]).confidence_image())
    assert levels.dtype == np.uint16
    assert levels.tolist() == [[0, 32768, 65535, 65535]]
    assert len(said) == 1
    assert "maxscore beyond the range of a 16-bit PNG are clipped" in said[0]
    answer_with([[0.1, 1.0]]).confidence_image()
    answer_with([[0.3, 1.7]]).confidence_image()
    assert said[0] == said[-1]  # one text, which is said once
    low, high = Confidence("energy").bounds(3)
    assert np.asarray(answer_with([[low, high]], "energy").confidence_image()).tolist() == [[0, 65535]]


def test_overlays_fade_where_the_model_is_unsure():
    image = np.full((4, 6, 3), 200, np.uint8)
    rows = [{"id": 0, "label_id": 0, "score": None}]
    strength = np.repeat(np.linspace(0, 1, 6)[None], 4, 0)
    full, faded = (
        np.asarray(draw_segments(image, np.zeros((4, 6), int), rows, {0: "a"}, labels=False, strength=each)).astype(int)
        for each in (None, strength)
    )
    assert np.array_equal(faded[:, 0], image[:, 0])
    assert np.array_equal(faded[:, -1], full[:, -1])
    expected = 200 + (full - 200) * strength[..., None]
    assert np.abs(faded - expected).max() <= 1


def test_the_command_writes_maps_and_resumes(model, processor, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    Image.fromarray(PIXELS).save(tmp_path / "images" / "a.png")
    words = ["segment", str(tmp_path / "images"), "--model", str(tmp_path / "model"), "--device", "cpu"]
    words += ["--output", str(tmp_path / "out")]
    assert main([*words, "--confidence", "rba"]) == 0
    expected = Segmenter(model, processor, device="cpu", confidence="rba")(PIXELS)
    assert np.array_equal(np.load(tmp_path / "out" / "a.confidence.npy"), expected.confidence)
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "out" / "a.overlay.png")), np.asarray(expected.plot(legend=True))
    )
    description = json.loads((tmp_path / "out" / "a.segments.json").read_text())
    assert description["confidence"] == "rba"
    assert not (tmp_path / "out" / "a.confidence.png").exists()
    assert main([*words, "--confidence", "rba"]) == 0
    assert "1 of 1 images segmented (1 of them before)" in capsys.readouterr().out
    assert main([*words, "--confidence", "msp"]) == 2
    assert "confidence was rba, is msp" in capsys.readouterr().err
    words[-1] = str(tmp_path / "png")
    assert main([*words, "--confidence", "rba", "--outputs", "confidence-png"]) == 0
    stored = Image.open(tmp_path / "png" / "a.confidence.png")
    assert np.array_equal(np.asarray(stored), np.asarray(expected.confidence_image()))
    assert sorted(path.name for path in (tmp_path / "png").glob("a.*")) == ["a.confidence.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--outputs", "confidence"], "--outputs confidence needs --confidence NAME"),
        (["--confidence", "rbb"], "there is no confidence 'rbb'"),
        (["--confidence", "rejection", "--tta-flip"], "--confidence 'rejection' is about queries"),
    ],
)
def test_wrong_options_end_in_one_line(options, message, model, processor, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    words = ["segment", str(tmp_path / "a.png"), "--model", str(tmp_path / "model"), "--device", "cpu"]
    assert main([*words, "--output", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
