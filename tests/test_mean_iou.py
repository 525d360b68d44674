"""Mean IoU: against the obvious loop, `evaluate`'s formula, and by hand; void, absent classes, merging, errors."""

import math

import numpy as np
import pytest
import torch

from hf_segvit.metrics.accumulation import merge_across_processes
from hf_segvit.metrics.mean_iou import MeanIoU, confusion_counts


def random_maps(seed: int, num_labels: int = 6, num_images: int = 4) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Predictions, some without a class, and references, some void; class 5 occurs in neither."""
    generator = np.random.default_rng(seed)
    predictions, references = [], []
    for _ in range(num_images):
        shape = tuple(generator.integers(1, 40, 2))
        references.append(generator.choice([*range(num_labels - 1), 255, -1], shape))
        guesses = generator.choice([*range(num_labels - 1), -1], shape)
        predictions.append(np.where(generator.random(shape) < 0.6, references[-1], guesses))
        predictions[-1][predictions[-1] == 255] = 0
    return predictions, references


def loop_iou(predictions, references, num_labels: int) -> list[float]:
    scores = []
    for label in range(num_labels):
        intersection = union = 0
        for prediction, reference in zip(predictions, references, strict=True):
            for guess, truth in zip(prediction.ravel().tolist(), reference.ravel().tolist(), strict=True):
                if truth in (255, -1):
                    continue
                intersection += guess == label and truth == label
                union += guess == label or truth == label
        scores.append(intersection / union if union else math.nan)
    return scores


def test_equals_the_obvious_loop():
    predictions, references = random_maps(0)
    metric = MeanIoU(num_labels=6)
    metric.add_batch(predictions=predictions[:1], references=references[:1])
    metric.add_batch(predictions=predictions[1:], references=[torch.from_numpy(r) for r in references[1:]])
    result = metric.compute()
    expected = loop_iou(predictions, references, 6)
    np.testing.assert_allclose([result["per_class"][label]["iou"] for label in range(6)], expected, rtol=1e-15)
    assert result["mean_iou"] == pytest.approx(np.nanmean(expected), rel=1e-15)
    assert result["num_classes"] == 5
    assert result["absent"] == "exclude"


def test_absent_classes_count_zero_by_choice():
    predictions, references = random_maps(0)
    results = {}
    for absent in ("exclude", "zero"):
        metric = MeanIoU(num_labels=6, absent=absent)
        metric.add_batch(predictions=predictions, references=references)
        results[absent] = metric.compute()
    assert results["zero"]["mean_iou"] == pytest.approx(results["exclude"]["mean_iou"] * 5 / 6, rel=1e-15)
    assert results["zero"]["mean_accuracy"] == pytest.approx(results["exclude"]["mean_accuracy"] * 5 / 6, rel=1e-15)
    assert results["zero"]["absent"] == "zero"
    assert results["zero"]["num_classes"] == 6


def test_equals_the_formula_of_evaluate():
    # The mean_iou of `evaluate`: histograms of agreeing, predicted and true labels, averaged with nanmean.
    predictions, references = random_maps(1)
    agreeing, predicted, true = (np.zeros(6) for _ in range(3))
    for prediction, reference in zip(predictions, references, strict=True):
        counted = (reference != 255) & (reference >= 0)
        prediction, reference = prediction[counted], reference[counted]
        bins = {"bins": 6, "range": (0, 5)}
        agreeing += np.histogram(prediction[prediction == reference], **bins)[0]
        predicted += np.histogram(prediction[prediction >= 0], **bins)[0]
        true += np.histogram(reference, **bins)[0]
    metric = MeanIoU(num_labels=6)
    metric.add_batch(predictions=predictions, references=references)
    result = metric.compute()
    with np.errstate(invalid="ignore"):
        assert result["mean_iou"] == pytest.approx(np.nanmean(agreeing / (true + predicted - agreeing)), rel=1e-14)
        assert result["mean_accuracy"] == pytest.approx(np.nanmean(agreeing / true), rel=1e-14)
    assert result["pixel_accuracy"] == pytest.approx(agreeing.sum() / true.sum(), rel=1e-14)


def test_a_case_counted_by_hand():
    metric = MeanIoU(num_labels=3)
    prediction = torch.tensor([[0, 0, 1], [1, 1, 2]])
    reference = torch.tensor([[0, 1, 1], [1, 255, 0]])
    metric.add_batch(predictions=[prediction], references=[reference])
    result = metric.compute()
    # Five pixels count. Class 0: 1 of 3; class 1: 2 of 3; class 2: predicted once, never true.
    assert [result["per_class"][label]["iou"] for label in range(3)] == [1 / 3, 2 / 3, 0]
    assert result["mean_iou"] == pytest.approx(1 / 3)
    assert result["pixel_accuracy"] == 3 / 5
    assert result["mean_accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert result["frequency_weighted_iou"] == pytest.approx(2 / 5 * 1 / 3 + 3 / 5 * 2 / 3)
    assert result["per_class"][1] == {
        "iou": 2 / 3,
        "accuracy": 2 / 3,
        "intersection": 2,
        "reference": 3,
        "prediction": 2,
    }


def test_no_class_is_wrong_but_counts_for_no_other_class():
    counts = confusion_counts(np.array([[-1, 9, 0]]), np.array([[0, 1, 0]]), 2)
    assert counts.tolist() == [[1, 0, 1], [0, 0, 1]]


def test_nothing_and_void_alone_give_nan():
    metric = MeanIoU(num_labels=2)
    assert math.isnan(metric.compute()["mean_iou"])
    metric.add_batch(predictions=[np.zeros((2, 2), int)], references=[np.full((2, 2), 255)])
    result = metric.compute()
    assert math.isnan(result["mean_iou"])
    assert math.isnan(result["pixel_accuracy"])
    assert metric.num_images == 1


def test_counts_beyond_what_a_float_holds():
    metric = MeanIoU(num_labels=2)
    metric.add_batch(predictions=[np.zeros((1, 1), int)], references=[np.zeros((1, 1), int)])
    state = metric.state_dict()
    state["counts"]["confusion"][0, 0] = 2**53
    other = MeanIoU(num_labels=2)
    other.merge(state)
    other.add_batch(predictions=[np.zeros((1, 1), np.uint8)], references=[np.zeros((1, 1), np.uint8)])
    assert int(other.counts["confusion"][0, 0]) == 2**53 + 1


def test_merging_equals_one_process():
    predictions, references = random_maps(2)
    whole, first, second = (MeanIoU(num_labels=6) for _ in range(3))
    whole.add_batch(predictions=predictions, references=references, image_ids=list("abcd"))
    first.add_batch(predictions=predictions[:3], references=references[:3], image_ids=list("abc"))
    second.add_batch(predictions=predictions[3:], references=references[3:], image_ids=["d"])
    first.merge(second.state_dict())
    np.testing.assert_array_equal(first.counts["confusion"], whole.counts["confusion"])
    assert first.num_images == 4
    with pytest.raises(ValueError, match=r"'d' was counted already"):
        first.merge(second)
    merge_across_processes(first)  # alone, it changes nothing
    np.testing.assert_array_equal(first.counts["confusion"], whole.counts["confusion"])
    with pytest.raises(ValueError, match="metrics differ"):
        first.merge(MeanIoU(num_labels=5))


def test_reset_forgets():
    metric = MeanIoU(num_labels=2)
    metric.add_batch(predictions=[np.zeros((1, 1), int)], references=[np.zeros((1, 1), int)], image_ids=[1])
    metric.reset()
    metric.add_batch(predictions=[np.ones((1, 1), int)], references=[np.zeros((1, 1), int)], image_ids=[1])
    assert metric.compute()["pixel_accuracy"] == 0


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), r"image 1 \(id 'b'\).*\(2, 3\).*\(3, 2\).*target_sizes"),
        (np.zeros((2, 2), int), np.full((2, 2), 7), r"labels \[7\], outside 0\.\.2"),
        (np.zeros((2, 2), int), np.full((2, 2), 3), r"labels \[3\], outside 0\.\.2"),
        (np.zeros((2, 2), int), np.full((2, 2), 0.5), "float64; it must hold integers"),
        (np.zeros((1, 2, 2), int), np.zeros((2, 2), int), r"the prediction has shape \(1, 2, 2\)"),
        (np.zeros((0, 2), int), np.zeros((0, 2), int), r"shape \(0, 2\)"),
    ],
)
def test_bad_maps_are_refused_and_the_batch_is_not_counted(prediction, reference, message):
    metric = MeanIoU(num_labels=3)
    good = np.zeros((2, 2), int)
    with pytest.raises(ValueError, match=message):
        metric.add_batch(predictions=[good, prediction], references=[good, reference], image_ids=["a", "b"])
    assert metric.counts["confusion"].sum() == 0
    assert metric.num_images == 0
    metric.add_batch(predictions=[good], references=[good], image_ids=["a"])


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="num_labels is 0"):
        MeanIoU(num_labels=0)
    with pytest.raises(ValueError, match=r"ignore_index 2 is one of the classes 0\.\.2"):
        MeanIoU(num_labels=3, ignore_index=2)
    with pytest.raises(ValueError, match="absent is 'nan'"):
        MeanIoU(num_labels=3, absent="nan")
    good = np.zeros((2, 2), int)
    with pytest.raises(ValueError, match="'predictions': 1, 'references': 2"):
        MeanIoU(num_labels=3).add_batch(predictions=[good], references=[good, good])
    with pytest.raises(ValueError, match="5 was counted already"):
        MeanIoU(num_labels=3).add_batch(predictions=[good] * 2, references=[good] * 2, image_ids=[5, 5])
