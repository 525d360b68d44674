"""Point accuracy: against plain loops over the definitions, by hand; ignored points, ties, merging, errors."""

import math

import numpy as np
import pytest
import torch

from hf_segvit.metrics.accumulation import merge_across_processes
from hf_segvit.metrics.point_accuracy import NUM_BINS, PointAccuracy


def random_batch(seed: int, num_labels: int = 8, num_images: int = 4):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(0, 30, num_images)
    logits = [generator.normal(0, 2, (size, num_labels)).astype(np.float32) for size in sizes]
    labels = [np.where(generator.random(size) < 0.2, -100, generator.integers(0, num_labels, size)) for size in sizes]
    return logits, labels


def plain_result(logits, labels, num_labels):
    """The definitions, point by point."""
    rows = []
    for scores, truth in zip(np.concatenate(logits), np.concatenate(labels), strict=True):
        if truth >= 0:
            order = sorted(range(num_labels), key=lambda label: (-scores[label], label))
            shares = [math.exp(score - max(scores)) for score in scores.astype(float)]
            rows.append((int(truth), order[0] == truth, int(truth) in order[:5], max(shares) / sum(shares)))
    classes = sorted({row[0] for row in rows})
    recalls = [np.mean([row[1] for row in rows if row[0] == label]) for label in classes]
    error = 0.0
    for number in range(NUM_BINS):
        inside = [row for row in rows if number / NUM_BINS < row[3] <= (number + 1) / NUM_BINS]
        if inside:
            gap = np.mean([row[1] for row in inside]) - np.mean([row[3] for row in inside])
            error += len(inside) / len(rows) * abs(gap)
    return {
        "top_1": np.mean([row[1] for row in rows]),
        "top_5": np.mean([row[2] for row in rows]),
        "class_balanced": np.mean(recalls),
        "expected_calibration_error": error,
        "mean_confidence": np.mean([row[3] for row in rows]),
        "num_points": len(rows),
        "num_classes": len(classes),
    }


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_definitions(seed):
    logits, labels = random_batch(seed)
    metric = PointAccuracy(8)
    metric.add_batch(predictions=[torch.from_numpy(rows) for rows in logits], references=labels)
    result = metric.compute()
    per_class = result.pop("per_class")
    # Sums in another order, in double precision.
    assert result == pytest.approx(plain_result(logits, labels, 8), abs=1e-9)
    truth, predicted = np.concatenate(labels), np.concatenate(logits).argmax(1)
    for label, row in per_class.items():
        is_class = truth == label
        assert row["points"] == is_class.sum()
        assert row["top_1"] == pytest.approx((predicted[is_class] == label).mean(), nan_ok=True)
        assert row["predicted"] == (predicted[truth >= 0] == label).sum()


def test_by_hand():
    metric = PointAccuracy(3, probabilities=True)
    predictions = [[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.2, 0.3, 0.5], [0.0, 1.0, 0.0]]
    metric.add_batch(predictions=[predictions], references=[np.array([0, 1, 2, 1])])
    result = metric.compute()
    assert result["top_1"] == 0.75
    assert result["top_5"] == 1.0  # there are but three classes
    assert result["class_balanced"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert result["mean_confidence"] == pytest.approx(0.75)
    # Every point in a bin of its own: |0.9 - 1|, |0.6 - 0|, |0.5 - 1|, |1 - 1|.
    assert result["expected_calibration_error"] == pytest.approx((0.1 + 0.6 + 0.5 + 0.0) / 4)


def test_of_equal_scores_the_lower_label_wins():
    metric = PointAccuracy(7)
    metric.add_batch(predictions=[torch.zeros(7, 7)], references=[torch.arange(7)])
    rows = metric.compute()["per_class"]
    assert [row["top_1"] for row in rows.values()] == [1, 0, 0, 0, 0, 0, 0]
    assert [row["top_5"] for row in rows.values()] == [1, 1, 1, 1, 1, 0, 0]


def test_logits_and_their_probabilities_count_alike():
    logits, labels = random_batch(5)
    plain, given = PointAccuracy(8), PointAccuracy(8, probabilities=True)
    plain.add_batch(predictions=logits, references=labels)
    given.add_batch(predictions=[torch.from_numpy(rows).double().softmax(-1) for rows in logits], references=labels)
    for name, value in plain.compute().items():
        if name != "per_class":
            # Probabilities arrive in single precision.
            assert given.compute()[name] == pytest.approx(value, abs=1e-6)


def test_processes_and_batches_add_up():
    batches = [random_batch(seed) for seed in range(3)]
    whole, first, second = PointAccuracy(8), PointAccuracy(8), PointAccuracy(8)
    for number, (logits, labels) in enumerate(batches):
        ids = [f"{number}/{index}" for index in range(4)]
        for metric in (whole, (first, second)[number % 2]):
            metric.add_batch(predictions=logits, references=labels, image_ids=ids)
    first.merge(second.state_dict())
    merge_across_processes(first)
    ours, theirs = first.compute(), whole.compute()
    # NaN, of classes that do not occur, is unequal to itself.
    rows = [[list(row.values()) for row in result.pop("per_class").values()] for result in (ours, theirs)]
    np.testing.assert_array_equal(*rows)
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert first.num_images == 12
    with pytest.raises(ValueError, match="'0/0' was counted already"):
        first.merge(second.state_dict() | {"image_ids": ["0/0"]})


def test_nothing_to_count():
    metric = PointAccuracy(4)
    metric.add_batch(predictions=[np.zeros((0, 4)), np.zeros((2, 4))], references=[np.zeros(0, int), [-100, -1]])
    result = metric.compute()
    assert math.isnan(result["top_1"])
    assert math.isnan(result["expected_calibration_error"])
    assert result["num_points"] == result["num_classes"] == 0


def test_half_precision_and_ignored_labels():
    metric = PointAccuracy(4, ignore_index=255)
    metric.add_batch(predictions=[torch.eye(4, dtype=torch.bfloat16)], references=[torch.tensor([0, 255, 2, 0])])
    assert metric.compute()["top_1"] == pytest.approx(2 / 3)


def test_bad_input_is_refused():
    metric = PointAccuracy(4)
    good = np.zeros((2, 4))
    for prediction, reference, message in (
        (np.zeros((2, 3)), [0, 1], r"image 0: predictions of shape \(2, 3\)"),
        (good, [0, 1, 2], r"references of \(3,\)"),
        (good, [0.5, 1.0], "references are float64"),
        (good, [0, 4], r"labels \[4\], outside 0..3"),
        (good * np.nan, [0, 1], "NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.add_batch(predictions=[prediction], references=[np.asarray(reference)])
    assert metric.num_images == 0
    with pytest.raises(ValueError, match="no probabilities"):
        PointAccuracy(4, probabilities=True).add_batch(predictions=[good], references=[[0, 1]])
    with pytest.raises(ValueError, match="num_labels is 0"):
        PointAccuracy(0)
    with pytest.raises(ValueError, match="ignore_index 3 is one of the classes"):
        PointAccuracy(4, ignore_index=3)
