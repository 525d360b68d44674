"""Confidences against their formulas in NumPy and scipy, on whole maps; and temperature scaling of scores."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import entr, expit, logit, logsumexp, softmax
from torch.nn import functional as F

from hf_segvit.models import confidence, mask_resampling
from hf_segvit.models.confidence import Confidence, calibrated, confidence_maps, confidences_named, pixel_confidences
from hf_segvit.models.image_geometry import windowed_content_size, windows_of
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor
from hf_segvit.models.semantic_segments import (
    semantic_segments,
    semantic_segments_from_logits,
    semantic_segments_from_windows,
)

from .plain_post_processing import cases
from .tiny_models import tiny_eomt

NAMES = ["maxscore", "msp", "msp@0.1", "maxlogit", "entropy", "entropy@3", "energy", "energy@0.5", "rba"]
WANTED = confidences_named([*NAMES, "rejection"])


def plain(scores: np.ndarray, name: str, are_logits: bool = False) -> np.ndarray:
    """The formula of a confidence, from class scores (C, H, W)."""
    name, _, temperature = name.partition("@")
    temperature = float(temperature or 1)
    scores = scores.astype(np.float64)
    probabilities = softmax(scores / temperature, axis=0)
    return {
        "maxscore": (probabilities if are_logits else scores).max(0),
        "msp": probabilities.max(0),
        "maxlogit": scores.max(0),
        "entropy": -entr(probabilities).sum(0),
        "energy": temperature * logsumexp(scores / temperature, axis=0),
        "rba": np.tanh(scores).sum(0),
    }[name]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(kinds=["noise", "all low", "all high", "constant", "blobs"]), st.integers(3, 70))
def test_confidences_follow_their_formulas(case, tile_pixels):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_resampling, "TILE_PIXELS", tile_pixels)
        labels, scores, maps = semantic_segments(
            case.class_logits,
            case.mask_logits,
            [case.target_size],
            **case.geometry,
            return_segmentation_scores=True,
            confidences=WANTED,
        )[0]
        alone = semantic_segments(
            case.class_logits, case.mask_logits, [case.target_size], **case.geometry, confidences=WANTED
        )[0]
        without = semantic_segments(
            case.class_logits,
            case.mask_logits,
            [case.target_size],
            **case.geometry,
            return_segmentation_scores=True,
        )[0]
    assert list(maps) == [str(each) for each in WANTED]
    assert alone[1] is None
    assert torch.equal(labels, without[0])
    assert torch.equal(scores, without[1])
    assert torch.equal(labels, alone[0])
    for name in NAMES:
        assert torch.equal(maps[name], alone[2][name])
        assert maps[name].dtype == torch.float32
        # Scores of up to nine queries, divided by a temperature of 0.1 or multiplied by C classes.
        np.testing.assert_allclose(maps[name], plain(scores.numpy(), name), atol=2e-5, rtol=2e-5, err_msg=name)
    objects = 1 - case.class_logits[0].softmax(-1)[:, -1]
    height, width = case.content_size
    masks = F.interpolate(case.mask_logits, size=case.input_size, mode="bilinear").sigmoid()
    best = (objects[:, None, None] * masks[0]).amax(0)[None, None, :height, :width]
    expected = F.interpolate(best, size=case.target_size, mode="bilinear")[0, 0]
    torch.testing.assert_close(maps["rejection"], expected, atol=1e-4, rtol=0)


def test_confidences_of_windows_are_those_of_the_merged_scores():
    generator = torch.Generator().manual_seed(0)
    sizes = [(40, 100), (70, 33)]
    scaled = [windowed_content_size(size, (32, 32)) for size in sizes]
    windows = windows_of(scaled, (32, 32))
    logits = torch.randn(len(windows), 6, 4, generator=generator), torch.randn(len(windows), 6, 8, 8)
    results = semantic_segments_from_windows(
        *logits, windows, scaled, sizes, window_size=32, return_segmentation_scores=True, confidences=WANTED
    )
    for size, (labels, scores, maps) in zip(sizes, results, strict=True):
        assert torch.equal(labels, scores.argmax(0))
        assert all(values.shape == size for values in maps.values())
        for name in NAMES:
            np.testing.assert_allclose(maps[name], plain(scores.numpy(), name), atol=1e-5, rtol=1e-5)
        assert (maps["rejection"] > 0).all()
        assert (maps["rejection"] < 1).all()


def test_models_that_classify_pixels():
    logits = 4 * torch.randn(2, 5, 7, 9)
    sizes = [(30, 51), (61, 20)]
    wanted = confidences_named(NAMES)
    results = semantic_segments_from_logits(logits, sizes, wanted)
    for image, size, (labels, maps) in zip(logits, sizes, results, strict=True):
        upsampled = F.interpolate(image[None], size=size, mode="bilinear")[0]
        assert (upsampled.gather(0, labels[None])[0] >= upsampled.amax(0) - 1e-5).all()
        for name in NAMES:
            expected = plain(upsampled.numpy(), name, are_logits=True)
            np.testing.assert_allclose(maps[name], expected, atol=1e-4, rtol=1e-4, err_msg=name)
    assert torch.equal(semantic_segments_from_logits(logits)[0], logits[0].argmax(0))
    with pytest.raises(ValueError, match="rejection is about queries"):
        semantic_segments_from_logits(logits, sizes, confidences_named("rejection"))


def test_whole_maps_are_worked_on_in_bands(monkeypatch):
    scores = torch.rand(6, 23, 11)
    whole = pixel_confidences(scores, confidences_named(NAMES))
    monkeypatch.setattr(confidence, "_BAND_VALUES", 200)
    for name, values in confidence_maps(scores, confidences_named(NAMES)).items():
        torch.testing.assert_close(values, whole[name], atol=1e-6, rtol=1e-6)


def test_excluded_classes_have_no_entropy():
    scores = torch.tensor([[1.0], [-torch.inf], [2.0]])[..., None]
    found = pixel_confidences(scores, confidences_named(["entropy", "energy", "msp"]))
    kept = plain(np.array([[[1.0]], [[2.0]]]), "entropy")
    np.testing.assert_allclose(found["entropy"], kept, rtol=1e-6)
    assert found["energy"].item() == pytest.approx(math.log(math.e + math.e**2))


def test_bounds_are_those_of_no_class_and_of_one():
    assert Confidence("maxscore").bounds(19) == (0, 1)
    assert Confidence("rejection").bounds(19) == (0, 1)
    assert Confidence("msp").bounds(3) == pytest.approx((1 / 3, math.e / (math.e + 2)))
    assert Confidence("energy", 0.5).bounds(3) == pytest.approx((0.5 * math.log(3), 0.5 * math.log(math.e**2 + 2)))
    assert Confidence("rba").bounds(3) == pytest.approx((0, math.tanh(1)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("rbaa", "there is no confidence 'rbaa'; it is one of maxscore, msp"),
        ([], "no confidence is named"),
        (["msp", "msp"], "the confidence msp is named twice"),
        ("rba@2", "rba@2: rba has no temperature"),
        ("msp@0", "msp@0: temperature=0.0 must be a positive number"),
        ("msp@nan", "msp@nan: temperature=nan must be a positive number"),
        ("msp@warm", "'warm' is no temperature"),
        (3, "3 is no confidence; name one or several of maxscore, msp"),
        (["msp", None], "None is no confidence; name one or several"),
    ],
)
def test_names_that_mean_nothing(given, message):
    with pytest.raises(ValueError, match=message):
        confidences_named(given)


def test_names_keep_every_digit_of_a_temperature():
    close = confidences_named(["msp@0.5", "msp@0.50000001", "msp@2", "msp@1e-05", "msp@1"])
    assert [str(each) for each in close] == ["msp@0.5", "msp@0.50000001", "msp@2", "msp@1e-05", "msp"]
    assert len(pixel_confidences(torch.randn(3, 2, 2), close)) == 5
    assert confidences_named([str(each) for each in close]) == close


def test_logits_that_are_not_numbers():
    masks = torch.zeros(1, 3, 4, 4)
    masks[0, 1, 2, 2] = torch.nan
    with pytest.raises(ValueError, match="the confidence is NaN somewhere"):
        semantic_segments(torch.zeros(1, 3, 4), masks, [(9, 9)], confidences=confidences_named("rba"))
    with pytest.raises(ValueError, match="the confidence is NaN somewhere"):
        semantic_segments_from_logits(torch.full((1, 3, 4, 4), torch.nan), None, confidences_named("entropy"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 20, 20, generator=generator), 5 * torch.randn(2, 20, 32, 32, generator=generator)
    arguments = [(0, 0, 128), (0, 60, 188)], [(128, 188)], [(256, 376)]
    results = [
        semantic_segments_from_windows(
            *(each.to(device) for each in logits), *arguments, window_size=128, confidences=WANTED
        )[0][2]
        for device in ("cpu", "cuda")
    ]
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name].cpu(), expected, atol=1e-4, rtol=1e-4)


# --- calibrated scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_calibration_scales_the_logit(temperature):
    scores = torch.linspace(0.01, 0.99, 50)
    expected = expit(logit(scores.double().numpy()) / temperature)
    np.testing.assert_allclose(calibrated(scores, temperature), expected, rtol=1e-5)
    extremes = calibrated(torch.tensor([0.0, 1.0, 1.3]), temperature).tolist()
    surest = expit(logit(1 - 1e-6) / temperature)  # in float32 1 - 1e-6 is rounded by 1 %
    assert extremes == pytest.approx([1 - surest, surest, surest], rel=0.05, abs=1e-7)
    assert torch.equal(calibrated(scores, None), scores)


def outputs_of(model, processor, images):
    with torch.inference_mode():
        return model(**processor(images, return_tensors="pt"))


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_a_temperature_changes_scores_and_no_segment(task):
    model = tiny_eomt()
    settings = {"size": 64, "threshold": 0.1, "instance_threshold": 0.0, "overlap_mask_area_threshold": 0.0}
    plain_processor = EoMTImageProcessor(task=task, **settings)
    warm = EoMTImageProcessor(task=task, temperature=2.0, **settings)
    outputs = outputs_of(model, plain_processor, [np.full((40, 60, 3), 90, np.uint8)])
    before, after = (
        getattr(each, f"post_process_{task}_segmentation")(outputs, target_sizes=[(40, 60)])[0]
        for each in (plain_processor, warm)
    )
    assert len(before["segments_info"]) > 0
    assert torch.equal(before["segmentation"], after["segmentation"])
    for old, new in zip(before["segments_info"], after["segments_info"], strict=True):
        assert {**old, "score": None} == {**new, "score": None}
        assert new["score"] == pytest.approx(expit(logit(old["score"]) / 2), abs=2e-6)


def test_the_processor_gives_confidences():
    model, processor = tiny_eomt(), EoMTImageProcessor(task="semantic", size=64, num_labels=5)
    images = [np.full((40, 90, 3), 90, np.uint8), np.full((64, 64, 3), 20, np.uint8)]
    outputs, sizes = outputs_of(model, processor, images), [(40, 90), (64, 64)]
    labels = processor.post_process_semantic_segmentation(outputs, sizes)
    ours = processor.post_process_semantic_segmentation(outputs, sizes, return_confidence="rba")
    several = processor.post_process_semantic_segmentation(
        outputs, sizes, return_segmentation_scores=True, return_confidence=["rba", "msp@0.5", "maxscore"]
    )
    for label_map, one, more in zip(labels, ours, several, strict=True):
        assert torch.equal(one.segmentation, more.segmentation)
        assert (more.segmentation_scores.gather(0, label_map[None]) >= more.segmentation_scores.amax(0) - 1e-5).all()
        assert "segmentation_scores" not in one
        assert torch.equal(one.confidence, more.confidence["rba"])
        assert list(more.confidence) == ["rba", "msp@0.5", "maxscore"]
        np.testing.assert_allclose(one.confidence, plain(more.segmentation_scores.numpy(), "rba"), atol=1e-5)
    processor.temperature = 0.5
    warm = processor.post_process_semantic_segmentation(outputs, sizes, return_confidence="maxscore")
    for old, new in zip(several, warm, strict=True):
        assert torch.equal(old.segmentation, new.segmentation)
        torch.testing.assert_close(new.confidence, calibrated(old.confidence["maxscore"], 0.5))
    with pytest.raises(ValueError, match="there is no confidence 'rbb'"):
        processor.post_process_semantic_segmentation(outputs, sizes, return_confidence="rbb")


def test_points_are_divided_by_the_temperature():
    logits = torch.randn(1, 3, 4)
    outputs = type("Outputs", (), {"logits": logits, "prompt_mask": None})()
    answer = ViTPImageProcessor(temperature=3.0).post_process_point_classification(outputs, top_k=4)[0]
    torch.testing.assert_close(answer["scores"], (logits[0] / 3).softmax(-1).sort(descending=True).values)


@pytest.mark.parametrize("cls", [EoMTImageProcessor, ViTPImageProcessor])
def test_the_temperature_is_saved_with_the_processor(cls, tmp_path):
    cls().save_pretrained(tmp_path)
    assert "temperature" not in (tmp_path / "preprocessor_config.json").read_text()
    assert cls.from_pretrained(tmp_path).temperature is None
    cls(temperature=1.5).save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).temperature == 1.5
    with pytest.raises(ValueError, match="temperature"):
        cls(temperature=-1.0)
