"""Metrics of anomalies and confidence: against scikit-learn and plain loops; merging, coarse scores, bad input."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import ndimage

from hf_segvit.metrics.accumulation import merge_across_processes
from hf_segvit.metrics.anomaly_components import LIMITS, AnomalyComponents
from hf_segvit.metrics.anomaly_pixels import AnomalyPixels
from hf_segvit.metrics.bravo import (
    SUBSETS,
    BravoSubset,
    bravo_index,
    harmonic_mean,
    quantized_confidence,
    sampled_pixels,
)
from hf_segvit.metrics.calibration import Calibration

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is compared with")


def random_image(generator, size=(40, 50), ties=False, anomalies=0.1):
    labels = generator.choice([0, 1, 255], size, p=[0.9 - anomalies, anomalies, 0.1]).astype(np.uint8)
    scores = generator.normal(size=size) + (labels == 1)
    return (np.round(scores, 1) if ties else scores).astype(np.float32), labels


def fpr_by_sklearn(truth, scores):
    fpr, tpr, _ = sklearn_metrics.roc_curve(truth, scores, drop_intermediate=False)
    return fpr[np.argmax(tpr >= 0.95)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_pixels_equal_scikit_learn(seed, ties):
    generator = np.random.default_rng(seed)
    images = [random_image(generator, ties=ties, anomalies=(0.02, 0.3)[seed % 2]) for _ in range(3)]
    metric = AnomalyPixels()
    for number, (scores, labels) in enumerate(images):
        metric.update(torch.from_numpy(scores), labels, image_id=number)
    result = metric.compute()
    labels = np.concatenate([each.ravel() for _, each in images])
    scores = np.concatenate([each.ravel() for each, _ in images])[labels != 255]
    labels = labels[labels != 255]
    assert result["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=1e-9)
    assert result["auprc"] == pytest.approx(sklearn_metrics.average_precision_score(labels, scores), abs=1e-9)
    assert result["fpr95"] == pytest.approx(fpr_by_sklearn(labels, scores), abs=1e-9)
    precision, recall, thresholds = sklearn_metrics.precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    assert result["best_f1"] == pytest.approx(f1.max(), abs=1e-9)
    assert sklearn_metrics.f1_score(labels, scores >= np.float32(result["best_f1_threshold"])) == pytest.approx(
        f1.max()
    )
    assert result["best_f1_threshold"] in thresholds
    assert result["exact"]
    assert result["auroc_bound"] == result["auprc_bound"] == result["fpr95_bound"] == 0
    assert (result["anomaly_pixels"], result["known_pixels"]) == (labels.sum(), (labels == 0).sum())
    assert result["undefined"] is None


@pytest.mark.parametrize("max_distinct", [2, 50, 300, 3000])
def test_coarse_scores_stay_within_the_stated_bounds(max_distinct):
    generator = np.random.default_rng(7)
    exact, coarse = AnomalyPixels(max_distinct=None), AnomalyPixels(max_distinct=max_distinct)
    for _ in range(4):
        scores, labels = random_image(generator)
        # Of both signs, and over many orders of magnitude.
        scores = np.sign(scores) * np.exp(4 * np.abs(scores))
        exact.update(scores, labels)
        coarse.update(scores, labels)
    result, expected = coarse.compute(), exact.compute()
    assert not result["exact"]
    assert expected["exact"]
    assert len(coarse.counts["keys"]) <= max_distinct
    for name in ("auroc", "auprc", "fpr95"):
        assert abs(result[name] - expected[name]) <= result[f"{name}_bound"] + 1e-12
    if max_distinct == 3000:
        assert result["auroc_bound"] < 2e-3


def test_order_and_processes_do_not_matter():
    generator = np.random.default_rng(3)
    images = [random_image(generator) for _ in range(9)]
    whole = AnomalyPixels(max_distinct=500)
    whole.add_batch(predictions=[s for s, _ in images], references=[r for _, r in images], image_ids=list(range(9)))
    parts = [AnomalyPixels(max_distinct=500) for _ in range(3)]
    for number in (8, 3, 5, 1, 0, 2, 7, 4, 6):
        parts[number % 3].update(*images[number], image_id=number)
    parts[1].merge(parts[2])
    parts[0].merge(parts[1].state_dict())
    merge_across_processes(parts[0])
    for name, counts in whole.counts.items():
        np.testing.assert_array_equal(parts[0].counts[name], counts)
    assert parts[0].compute() == whole.compute()
    with pytest.raises(ValueError, match="image id 4 was counted already"):
        parts[0].update(*images[4], image_id=4)


def test_scores_of_other_types():
    scores = np.array([[-0.0, 0.0, 1.5, -2.0]])
    labels = np.array([[1, 0, 1, 0]])
    for values in (scores, torch.tensor(scores).bfloat16(), torch.tensor(scores).half(), scores.astype(np.float32)):
        metric = AnomalyPixels()
        metric.update(values, labels)
        # -0 and 0 are one score: 1.5 ranks before both, -2 behind.
        assert metric.compute()["auroc"] == pytest.approx((2 + 0.5 + 1) / 4)
    metric = AnomalyPixels()
    metric.update(np.array([[0, 65535, 3]], dtype=np.uint16), np.array([[0, 1, 0]]))
    assert metric.compute()["best_f1_threshold"] == 65535


def test_pixels_by_hand():
    metric = AnomalyPixels()
    metric.update(np.array([[0.9, 0.8, 0.8, 0.3, 0.1, 5.0]]), np.array([[1, 0, 1, 0, 1, 255]]))
    result = metric.compute()
    # Precision is 1 at the first anomaly, 2/3 at the tie, 3/5 at the last.
    assert result["auprc"] == pytest.approx(float((1 + Fraction(2, 3) + Fraction(3, 5)) / 3))
    assert result["auroc"] == pytest.approx((2 + 1.5 + 0) / 6)
    assert result["fpr95"] == 1
    assert result["best_f1"] == pytest.approx(6 / 8)  # 3 found, 2 false alarms, from 0.1 on


@pytest.mark.parametrize(
    ("value", "lacking"), [(0, "no anomalous pixel"), (1, "no known"), (255, "anomalous and no known")]
)
def test_undefined_pixels_are_said(value, lacking):
    metric = AnomalyPixels()
    metric.update(np.zeros((3, 4)), np.full((3, 4), value))
    result = metric.compute()
    assert lacking in result["undefined"]
    assert [result[name] for name in ("auroc", "auprc", "fpr95", "best_f1")] == [None] * 4


@pytest.mark.parametrize("metric", [AnomalyPixels(), AnomalyComponents(0.5), Calibration()])
def test_bad_input(metric):
    def add(scores, labels):
        metric.add_batch(predictions=[scores], references=[labels], image_ids=["a"])

    with pytest.raises(ValueError, match=r"image 0 \(id 'a'\): the reference holds the values \[2, 7\]"):
        add(np.zeros((2, 2)), np.array([[0, 2], [7, 255]]))
    with pytest.raises(ValueError, match="NaN"):
        add(np.array([[0.5, np.nan]]), np.array([[0, 1]]))
    with pytest.raises(ValueError, match=r"\(1, 2\) but the reference \(2, 1\)"):
        add(np.zeros((1, 2)), np.zeros((2, 1), int))
    add(np.array([[0.5, np.nan]]), np.array([[0, 255]]))  # nobody looks at void pixels
    assert metric.num_images == 1


def test_bad_settings():
    with pytest.raises(ValueError, match="max_distinct is 1"):
        AnomalyPixels(max_distinct=1)
    with pytest.raises(ValueError, match="num_bins is 0"):
        Calibration(num_bins=0)
    with pytest.raises(ValueError, match="track is 'road'"):
        AnomalyComponents(0.5, track="road")
    with pytest.raises(ValueError, match="threshold is nan"):
        AnomalyComponents(math.nan)
    with pytest.raises(ValueError, match=r"the confidence reaches from 0.2 to 1.5; .*clip it"):
        Calibration().update(np.array([0.2, 1.5]), np.array([True, False]))


def plain_ece(confidence, correct, num_bins=15):
    error = 0.0
    for number in range(num_bins):
        inside = (confidence > number / num_bins) & (confidence <= (number + 1) / num_bins)
        if number == 0:
            inside |= confidence == 0
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return error


@pytest.mark.parametrize("seed", range(4))
def test_calibration_equals_scikit_learn(seed):
    generator = np.random.default_rng(seed)
    confidence = generator.random((3, 30, 20)).astype(np.float32)
    if seed == 3:
        confidence = np.round(confidence * 15) / np.float32(15)  # on the edges of bins
    correct = generator.random(confidence.shape) < confidence**2
    void = generator.random(confidence.shape) < 0.2
    metric = Calibration()
    for number in range(3):
        metric.update(torch.from_numpy(confidence[number]), correct[number], void[number], image_id=number)
    result = metric.compute()
    known, right = confidence[~void].astype(np.float64), correct[~void]
    assert result["ece"] == pytest.approx(plain_ece(known, right), abs=1e-9)
    assert result["brier"] == pytest.approx(sklearn_metrics.brier_score_loss(right, known), abs=1e-9)
    assert result["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(right, known), abs=1e-9)
    assert result["fpr95"] == pytest.approx(fpr_by_sklearn(right, known), abs=1e-9)
    success = sklearn_metrics.average_precision_score(right, known)
    assert result["auprc_success"] == pytest.approx(success, abs=1e-9)
    assert result["auprc_error"] == pytest.approx(sklearn_metrics.average_precision_score(~right, -known), abs=1e-9)
    assert result["accuracy"] == pytest.approx(right.mean())
    assert result["mean_confidence"] == pytest.approx(known.mean())
    assert result["num_pixels"] == len(known)
    rows = result["reliability"]
    assert sum(row["count"] for row in rows) == len(known)
    inside = (known > 0.4) & (known <= 7 / 15)
    assert rows[6]["count"] == inside.sum()
    if inside.any():
        assert rows[6]["confidence"] == pytest.approx(known[inside].mean())
        assert rows[6]["accuracy"] == pytest.approx(right[inside].mean())
    assert (rows[6]["lower"], rows[6]["upper"]) == pytest.approx((0.4, 7 / 15))


def test_calibration_merges_and_says_what_is_undefined():
    generator = np.random.default_rng(0)
    confidence, correct = generator.random((4, 100)).astype(np.float32), generator.random((4, 100)) < 0.6
    whole, first, second = Calibration(), Calibration(), Calibration(max_distinct=64)
    whole.update(confidence, correct)
    for number in range(4):
        (first, second)[number % 2].update(confidence[number], correct[number], image_id=number)
    coarse = Calibration(max_distinct=64)
    coarse.update(confidence, correct)
    second.merge(first.state_dict())
    result, expected = second.compute(), coarse.compute()
    reliability, rows = result.pop("reliability"), expected.pop("reliability")
    assert result == pytest.approx(expected, abs=1e-12)
    assert [row["count"] for row in reliability] == [row["count"] for row in rows]
    exact = whole.compute()
    # Bins are kept apart from the scores that are merged.
    assert result["ece"] == pytest.approx(exact["ece"], abs=1e-12)
    for name in ("auprc_success", "auprc_error"):
        assert abs(result[name] - exact[name]) <= result["auprc_bound"]
    with pytest.raises(ValueError, match="the metrics differ"):
        Calibration(num_bins=10).merge(first.state_dict())
    right = Calibration()
    right.update(np.array([0.25, 0.75]), np.array([True, True]))
    result = right.compute()
    assert result["undefined"].startswith("all 2 answers are right")
    assert (result["ece"], result["brier"]) == pytest.approx((0.5, (0.75**2 + 0.25**2) / 2))
    assert result["auroc"] is None
    empty = Calibration()
    empty.update(np.zeros(0), np.zeros(0, bool))
    assert empty.compute()["ece"] is None
    assert "all are void" in empty.compute()["undefined"]


def plain_components(scores, labels, threshold, smallest_prediction, smallest_truth):
    """The benchmark's definitions, component by component, with sets of pixels."""

    def components(mask):
        numbered, count = ndimage.label(mask, np.ones((3, 3)))
        return [set(np.flatnonzero(numbered == number)) for number in range(1, count + 1)]

    truths = components(labels == 1)
    predictions = [
        each for each in components((scores >= threshold) & (labels != 255)) if len(each) >= smallest_prediction
    ]
    small = set().union(*(each for each in truths if len(each) < smallest_truth))
    truths = [each for each in truths if len(each) >= smallest_truth]
    predictions = [each - small for each in predictions if each - small]
    siou = []
    for truth in truths:
        touching = set().union(*(each for each in predictions if each & truth))
        others = set().union(*(each for each in truths if each is not truth))
        siou.append(len(touching & truth) / len((touching | truth) - (touching & others)))
    union = set().union(*truths)
    return siou, [len(each & union) / len(each) for each in predictions]


@pytest.mark.parametrize("seed", range(6))
def test_components_equal_the_definitions(seed):
    generator = np.random.default_rng(seed)
    metric = AnomalyComponents(0.1, smallest_prediction=6, smallest_truth=4)
    siou, ppv = [], []
    for number in range(3):
        truth = ndimage.gaussian_filter(generator.normal(size=(40, 50)), 2)
        labels = (truth > 0.15).astype(np.uint8)
        labels[ndimage.gaussian_filter(generator.normal(size=(40, 50)), 3) > 0.15] = 255
        scores = truth + ndimage.gaussian_filter(generator.normal(size=(40, 50)), 1) / 2
        metric.update(scores, labels, image_id=number)
        one, two = plain_components(scores, labels, 0.1, 6, 4)
        siou += one
        ppv += two
    result = metric.compute()
    assert len(siou) > 5
    assert result["siou"] == pytest.approx(np.mean(siou))
    assert result["ppv"] == pytest.approx(np.mean(ppv))
    f1 = []
    for limit in LIMITS:
        found, false = sum(value >= limit for value in siou), sum(value < limit for value in ppv)
        f1.append(2 * found / (2 * found + (len(siou) - found) + false))
    assert result["f1"] == pytest.approx(f1)
    assert result["mean_f1"] == pytest.approx(np.mean(f1))
    halves = [AnomalyComponents(0.1, smallest_prediction=6, smallest_truth=4) for _ in range(2)]
    halves[0].merge(metric.state_dict())
    assert halves[0].compute() == result


def test_components_by_hand():
    labels = np.zeros((10, 12), dtype=np.uint8)
    labels[1:5, 1:5] = 1  # 16 pixels
    labels[1:5, 7:11] = 1
    labels[8, 0:3] = 1  # too small: void
    scores = np.zeros((10, 12))
    scores[1:5, 3:9] = 1  # one prediction over halves of both
    scores[8, 0:3] = 1
    scores[7:10, 8:12] = 1  # a false alarm
    metric = AnomalyComponents(1.0, smallest_prediction=3, smallest_truth=4)
    metric.update(scores, labels)
    result = metric.compute()
    # Each truth: 8 found; the prediction has 24 pixels, of which 8 are on the other: 8 / (16 + 24 - 8 - 8).
    assert result["siou"] == pytest.approx(8 / 24)
    assert (result["true_components"], result["predicted_components"]) == (2, 2)
    assert result["ppv"] == pytest.approx((16 / 24 + 0) / 2)
    assert result["found"] == [2, 2] + [0] * 9
    assert result["false_alarms"] == [1] * 9 + [2] * 2
    assert LIMITS[:2] == (0.25, 0.3)


def test_speckles_need_no_table_of_all_pairs():
    scores = np.zeros((1000, 1000), dtype=np.float32)
    scores[::2, ::2] = 1
    labels = (scores == 1).astype(np.uint8)  # 250,000 anomalies of a pixel each: a table would have 500 GB
    labels[500:540, 500:540], scores[500:540, 500:540] = 1, 1
    metric = AnomalyComponents(0.5)
    metric.update(scores, labels)
    result = metric.compute()
    assert (result["true_components"], result["predicted_components"]) == (1, 1)
    assert result["siou"] == result["ppv"] == 1


def test_the_best_threshold_finds_what_it_was_made_of():
    scores = np.full((40, 40), 0.05)
    scores[10:20, 10:20] = 0.1  # in float32 it is larger
    labels = (scores == 0.1).astype(np.uint8)
    pixels = AnomalyPixels()
    pixels.update(scores, labels)
    components = AnomalyComponents(pixels.compute()["best_f1_threshold"], "obstacle")
    components.update(scores, labels)
    assert components.compute()["siou"] == 1


def test_components_have_sizes_of_tracks_and_say_what_is_undefined():
    assert (AnomalyComponents(0).smallest_prediction, AnomalyComponents(0).smallest_truth) == (500, 100)
    obstacle = AnomalyComponents(0, track="obstacle")
    assert (obstacle.smallest_prediction, obstacle.smallest_truth) == (50, 10)
    obstacle.update(np.zeros((5, 5)), np.eye(5, dtype=int))
    assert "no anomaly of at least 10 pixels" in obstacle.compute()["undefined"]
    assert obstacle.compute()["mean_f1"] is None
    blind = AnomalyComponents(1, track="obstacle")
    blind.update(np.zeros((5, 5)), np.ones((5, 5), int))
    assert (blind.compute()["mean_f1"], blind.compute()["ppv"]) == (0, None)
    assert "no predicted component" in blind.compute()["undefined"]


def random_bravo(generator, size=(30, 40)):
    labels = generator.integers(0, 19, size)
    classes = np.where(generator.random(size) < 0.3, generator.integers(0, 19, size), labels)
    labels[generator.random(size) < 0.2] = 255
    invalid = (generator.random(size) < 0.1).astype(np.uint8) * 255
    confidence = generator.random(size) * np.where(classes == labels, 1, 0.7) * np.where(invalid, 0.6, 1)
    return classes, labels, invalid, quantized_confidence(confidence)


def test_bravo_equals_its_rules():
    generator = np.random.default_rng(5)
    images = [random_bravo(generator) for _ in range(3)]
    samples = [sampled_pixels(labels, 300) for _, labels, _, _ in images]
    metric = BravoSubset("synobjs")
    for (classes, labels, invalid, confidence), chosen in zip(images, samples, strict=True):
        prediction = {"classes": classes, "confidence": confidence.ravel()[chosen]}
        reference = {"labels": labels, "invalid": invalid, "samples": chosen}
        metric.add_batch(predictions=[prediction], references=[reference])
    result = metric.compute()

    def pooled(index):
        return np.concatenate([image[index].ravel()[chosen] for image, chosen in zip(images, samples, strict=True)])

    classes, labels, invalid, levels = (pooled(index) for index in range(4))
    valid, right = invalid == 0, classes == labels
    assert len(labels) == 900
    confidence = (levels[valid] + 0.5) / 65536
    expected = {
        "auroc_valid": sklearn_metrics.roc_auc_score(right[valid], confidence),
        "fpr95_valid": fpr_by_sklearn(right[valid], confidence),
        "auprc_success_valid": sklearn_metrics.average_precision_score(right[valid], confidence),
        "auprc_error_valid": sklearn_metrics.average_precision_score(~right[valid], -confidence),
        "ece_valid": plain_ece(confidence, right[valid]),
        "auroc_ood": sklearn_metrics.roc_auc_score(~valid, 65535 - levels.astype(int)),
        "auprc_ood": sklearn_metrics.average_precision_score(~valid, 65535 - levels.astype(int)),
        "fpr95_ood": fpr_by_sklearn(~valid, 65535 - levels.astype(int)),
    }
    # Of all valid pixels, sampled or not.
    counted = [(labels != 255) & (invalid == 0) for _, labels, invalid, _ in images]
    truth, predicted = (
        np.concatenate([image[index][mask] for image, mask in zip(images, counted, strict=True)]) for index in (1, 0)
    )
    expected["miou_valid"] = sklearn_metrics.jaccard_score(truth, predicted, average="macro")
    higher = [1 - value if "ece" in name or "fpr" in name else value for name, value in expected.items()]
    expected["hmean"] = len(higher) / sum(1 / value for value in higher)
    assert result.pop("undefined") is None
    assert result == pytest.approx(expected, abs=1e-9)


def test_bravo_samples_and_merges():
    labels = np.zeros((400, 400), dtype=int)
    labels[0, :5] = 255
    chosen = sampled_pixels(labels)
    assert len(chosen) == 100_000
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] >= 5
    np.random.seed(1)
    np.testing.assert_array_equal(chosen, np.sort(np.random.choice(np.arange(5, 160_000), 100_000, replace=False)))
    assert sampled_pixels(labels[:2]).tolist() == list(range(5, 800))
    generator = np.random.default_rng(0)
    whole, half = BravoSubset("ACDCfog"), BravoSubset("ACDCfog")
    for number in range(2):
        classes, labels, invalid, confidence = random_bravo(generator)
        batch = {
            "predictions": [{"classes": classes, "confidence": confidence}],
            "references": [{"labels": labels, "invalid": invalid}],
            "image_ids": [number],
        }
        whole.add_batch(**batch)
        (half if number else (first := BravoSubset("ACDCfog"))).add_batch(**batch)
    half.merge(first.state_dict())
    assert half.compute() == whole.compute()
    assert set(whole.compute()) == {
        *(f"{name}_valid" for name in ("miou", "auroc", "fpr95", "auprc_success", "auprc_error", "ece")),
        "hmean",
        "undefined",
    }


def test_bravo_index():
    generator = np.random.default_rng(1)
    results, semantic, ood = {}, [], []
    for subset, (has_semantic, has_ood) in SUBSETS.items():
        metric = BravoSubset(subset)
        classes, labels, invalid, confidence = random_bravo(generator)
        if not has_semantic:
            labels = np.where(labels == 255, 255, 77)  # only says what is void
        prediction, reference = {"classes": classes, "confidence": confidence}, {"labels": labels, "invalid": invalid}
        metric.add_batch(predictions=[prediction], references=[reference])
        results[subset] = result = metric.compute()
        for name, value in result.items():
            value = 1 - value if name.startswith(("ece", "fpr95")) else value
            if name.endswith("_valid"):
                semantic.append(value)
            elif name.endswith("_ood"):
                ood.append(value)
        assert ("auroc_valid" in result, "auroc_ood" in result) == (has_semantic, has_ood)
    assert (len(semantic), len(ood)) == (48, 6)
    summary = bravo_index(results)
    one, two = 48 / sum(1 / value for value in semantic), 6 / sum(1 / value for value in ood)
    assert summary["semantic_hmean"] == pytest.approx(one)
    assert summary["ood_hmean"] == pytest.approx(two)
    assert summary["bravo_index"] == pytest.approx(2 * one * two / (one + two))
    assert summary["undefined"] is None
    results["SMIYC"]["fpr95_ood"] = 1.0
    assert bravo_index(results)["bravo_index"] == 0  # one value of 0 makes all 0
    del results["synrain"]
    partial = bravo_index(results)
    assert partial["semantic_hmean"] is None
    assert "no results of synrain" in partial["undefined"]
    assert harmonic_mean([]) is None


def test_bravo_refuses_bad_input():
    generator = np.random.default_rng(2)
    classes, labels, invalid, confidence = random_bravo(generator)

    def add(**changed):
        values = {"classes": classes, "confidence": confidence, "labels": labels, "invalid": invalid, **changed}
        BravoSubset("synobjs").add_batch(predictions=[values], references=[values], image_ids=["a"])

    add()
    with pytest.raises(ValueError, match=r"\(id 'a'\): the class map holds \[19\]"):
        add(classes=np.where(classes == 3, 19, classes))
    with pytest.raises(ValueError, match=r"the reference holds labels \[77\]"):
        add(labels=np.where(labels == 3, 77, labels))
    with pytest.raises(ValueError, match=r"whole levels 0\.\.65535, but is float64"):
        add(confidence=confidence / 65535)
    with pytest.raises(ValueError, match=r"3 confidences, but .* sampled pixels"):
        add(confidence=np.arange(3))
    with pytest.raises(ValueError, match=r"must ascend within 0\.\.1199"):
        add(samples=np.array([5, 4]))
    with pytest.raises(ValueError, match="1 sampled pixels are void"):
        add(samples=np.flatnonzero(labels == 255)[:1])
    with pytest.raises(ValueError, match="confidence is NaN at 1 pixels"):
        quantized_confidence([0.1, np.nan])
    assert quantized_confidence([-1, 0, 0.5, 1, 1.7]).tolist() == [0, 0, 32767, 65535, 65535]
    with pytest.raises(ValueError, match="subset is 'fog'"):
        BravoSubset("fog")
    empty = BravoSubset("SMIYC")
    empty.add_batch(
        predictions=[{"classes": classes, "confidence": confidence}],
        references=[{"labels": labels, "invalid": np.zeros_like(labels)}],
    )
    assert empty.compute()["auprc_ood"] is None
    assert "not both valid and invalid" in empty.compute()["undefined"]
