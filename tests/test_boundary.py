"""Boundary IoU and AP: against naive erosion and, where it is installed, faster-coco-eval; by hand; void."""

import contextlib
import io
import math

import numpy as np
import pytest

from hf_segvit.metrics.boundary import BoundaryAveragePrecision, BoundaryIoU, boundary_region
from hf_segvit.metrics.mask_average_precision import MaskAveragePrecision
from hf_segvit.metrics.mean_iou import MeanIoU
from tests.coco_instances import STATISTICS, metric_inputs
from tests.test_mask_average_precision import random_coco


def naive_region(mask: np.ndarray, distance: int) -> np.ndarray:
    height, width = mask.shape
    region = np.zeros_like(mask)
    for y, x in np.argwhere(mask):
        for dy in range(-distance, distance + 1):
            for dx in range(-distance, distance + 1):
                inside = 0 <= y + dy < height and 0 <= x + dx < width
                if not inside or not mask[y + dy, x + dx]:
                    region[y, x] = True
    return region


@pytest.mark.parametrize("ratio", [0.02, 0.05, 0.1])
def test_regions_equal_naive_erosion(ratio):
    generator = np.random.default_rng(0)
    for _ in range(8):
        height, width = generator.integers(1, 45, 2)
        mask = np.kron(generator.random((height // 9 + 1, width // 9 + 1)) < 0.7, np.ones((9, 9)))[:height, :width] > 0
        distance = max(1, round(ratio * math.hypot(height, width)))
        np.testing.assert_array_equal(boundary_region(mask, ratio), naive_region(mask, distance))
    assert not boundary_region(np.zeros((5, 5), bool)).any()


def test_a_square_counted_by_hand():
    # The diagonal is 50 pixels, so that regions are one pixel wide.
    truth, guess = np.zeros((30, 40), int), np.zeros((30, 40), int)
    truth[10:20, 10:20] = 1
    guess[10:20, 10:21] = 1
    metric = BoundaryIoU(num_labels=2)
    metric.add_batch(predictions=[guess], references=[truth])
    result = metric.compute()
    # Outlines have 36 and 38 pixels: top and bottom share 10 each, the left side 8 more, and the right sides none.
    assert result["per_class"][1]["iou"] == 28 / (36 + 38 - 28)
    area = MeanIoU(num_labels=2)
    area.add_batch(predictions=[guess], references=[truth])
    assert result["boundary_iou"] < area.compute()["mean_iou"]


def test_regions_of_label_maps_equal_naive_counts():
    generator = np.random.default_rng(1)
    truth, guess = (np.kron(generator.integers(0, 3, (6, 7)), np.ones((8, 8), int)) for _ in range(2))
    truth[20:30, 11:25] = 255
    guess[:3] = -1
    metric = BoundaryIoU(num_labels=4)
    metric.add_batch(predictions=[guess], references=[truth])
    distance = max(1, round(0.02 * math.hypot(*truth.shape)))
    for label in range(3):
        # Void belongs to no region, in the prediction neither.
        regions = [naive_region((labels == label) & (truth != 255), distance) for labels in (truth, guess)]
        expected = (regions[0] & regions[1]).sum() / (regions[0] | regions[1]).sum()
        assert metric.compute()["per_class"][label]["iou"] == pytest.approx(expected, rel=1e-15)
    assert math.isnan(metric.compute()["per_class"][3]["iou"])
    assert metric.compute()["num_classes"] == 3


def test_equal_maps_score_one_and_choices_hold():
    truth = np.kron(np.arange(6).reshape(2, 3), np.ones((9, 9), int))
    for absent, expected in (("exclude", 1.0), ("zero", 6 / 8)):
        metric = BoundaryIoU(num_labels=8, absent=absent)
        metric.add_batch(predictions=[truth], references=[truth], image_ids=[0])
        assert metric.compute()["boundary_iou"] == pytest.approx(expected)
        assert metric.compute()["absent"] == absent
        with pytest.raises(ValueError, match="0 was counted already"):
            metric.add_batch(predictions=[truth], references=[truth], image_ids=[0])


@pytest.mark.parametrize("seed", range(2))
def test_average_precision_equals_faster_coco_eval(seed):
    faster_coco_eval = pytest.importorskip("faster_coco_eval")
    annotations, rows = random_coco(seed, shift=2)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = faster_coco_eval.COCO(annotations)
        found = truth.loadRes([dict(row) for row in rows])
        evaluation = faster_coco_eval.COCOeval_faster(truth, found, iouType="boundary")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = np.where(np.array(evaluation.stats[:12]) < 0, np.nan, evaluation.stats[:12])
    metric = BoundaryAveragePrecision(num_labels=4)
    metric.add_batch(**metric_inputs(annotations, rows))
    result = metric.compute()
    np.testing.assert_allclose([result[name] for name in STATISTICS], expected, rtol=0, atol=1e-14)
    areas = MaskAveragePrecision(num_labels=4)
    areas.add_batch(**metric_inputs(annotations, rows))
    assert 0.05 < result["ap"] < areas.compute()["ap"]


def test_a_wide_region_is_the_mask():
    # Regions as wide as the image are the masks themselves.
    annotations, rows = random_coco(3)
    inputs = metric_inputs(annotations, rows)
    results = []
    for metric in (BoundaryAveragePrecision(4, dilation_ratio=1.0), MaskAveragePrecision(4)):
        metric.add_batch(**inputs)
        results.append(metric.compute())
    np.testing.assert_equal(*results)


def test_bad_arguments_are_refused():
    for build in (BoundaryIoU, BoundaryAveragePrecision):
        with pytest.raises(ValueError, match="dilation_ratio is 0"):
            build(3, dilation_ratio=0)
        with pytest.raises(ValueError, match="num_labels is 0"):
            build(0)


def test_counts_of_other_classes_are_not_merged():
    with pytest.raises(ValueError, match=r"cannot merge counts of shapes \{'boundary': \(4, 3\)\} into counts of"):
        BoundaryIoU(num_labels=3).merge(BoundaryIoU(num_labels=4))
