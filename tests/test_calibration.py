"""Calibration of every task: temperatures against independent fits, errors against the definition, and the command."""

import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, logit

from hf_segvit.cli import main
from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.evaluation import evaluate
from hf_segvit.evaluation.calibration import (
    CalibrationResult,
    HeldOutCalibration,
    PointCalibration,
    RightAnswers,
    calibration_lines,
    fitted_temperature,
    is_measured,
    plot_reliability,
)
from hf_segvit.evaluation.report import result_content, result_text
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.metrics.panoptic_quality import panoptic_counts, right_segments
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor

from .test_cli_evaluate_points import DATA as POINTS_DATA
from .test_cli_evaluate_points import folder as points_folder  # noqa: F401 - a fixture
from .tiny_models import tiny_eomt


def overconfident(count: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores whose logits are `temperature` times too large, and what is right."""
    rng = np.random.default_rng(seed)
    true = expit(2 * rng.standard_normal(count) + 1)
    return expit(temperature * logit(true)).astype(np.float32), rng.random(count) < true


def plain_ece(scores: np.ndarray, right: np.ndarray) -> float:
    """The definition, bin by bin."""
    total = 0.0
    for index in range(15):
        inside = (scores > index / 15) & (scores <= (index + 1) / 15)
        if inside.any():
            total += inside.sum() * abs(scores[inside].mean() - right[inside].mean())
    return total / len(scores)


def counted(scores: np.ndarray, right: np.ndarray, images: int, void=None) -> HeldOutCalibration:
    metric = HeldOutCalibration(lambda prediction, reference, name: RightAnswers(*prediction))
    void = np.zeros(len(scores), bool) if void is None else void
    for index, part in enumerate(np.array_split(np.arange(len(scores)), images)):
        answers = (scores[part], right[part], void[part])
        metric.add_batch(predictions=[answers], references=[None], image_ids=[f"image {index}"])
    return metric


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found_and_the_error_falls(temperature):
    scores, right = overconfident(40_000, temperature)
    result = counted(scores, right, 80).compute()["result"]
    halves = np.array([is_measured(f"image {index}") for index in range(80)])
    assert 25 < halves.sum() < 55
    measured = np.concatenate(
        [np.full(len(part), half) for part, half in zip(np.array_split(scores, 80), halves, strict=True)]
    )
    logits = logit(np.clip(scores[~measured].astype(float), 1e-6, 1 - 1e-6))

    def loss(value):
        return np.square(expit(logits / value[0]) - right[~measured]).mean()

    expected = minimize(loss, [1.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12}).x[0]
    assert result.temperature == pytest.approx(expected, rel=1e-3)
    assert result.temperature == pytest.approx(temperature, rel=0.1)
    assert result.ece == pytest.approx(plain_ece(scores[measured], right[measured]), abs=1e-6)
    after = expit(logit(np.clip(scores[measured].astype(float), 1e-6, 1 - 1e-6)) / result.temperature)
    assert result.ece_calibrated == pytest.approx(plain_ece(after, right[measured]), abs=1e-3)
    assert result.ece_calibrated < 0.02
    assert (result.fitted, result.measured) == ((~measured).sum(), measured.sum())
    assert sum(row["count"] for row in result.reliability_calibrated) == result.measured


def test_a_few_wrong_answers_with_a_score_of_one_do_not_decide():
    """Summed scores of queries that overlap are cut at 1, also where they are wrong."""
    scores, right = overconfident(40_000, 1.0)
    cut = np.random.default_rng(1).random(len(scores)) < 0.05
    scores[cut], right[cut] = 1.0, np.arange(cut.sum()) % 2 == 0
    result = counted(scores, right, 80).compute()["result"]
    assert result.temperature == pytest.approx(1.0, abs=0.15)  # the likelihood's would be 3.2
    assert result.ece_calibrated < result.ece + 0.01


def test_void_answers_do_not_count_and_parts_of_processes_add_up():
    scores, right = overconfident(2000, 2.0)
    void = np.random.default_rng(1).random(2000) < 0.3
    whole = counted(scores, right, 20, void)
    merged = HeldOutCalibration(lambda *_: None)
    merged.merge(whole.state_dict())
    assert merged.compute() == whole.compute()
    result = whole.compute()["result"]
    assert result.fitted + result.measured == (~void).sum()
    whole.reset()
    assert whole.compute()["result"].measured == 0


@pytest.mark.parametrize(
    ("right", "images", "reason"),
    [(np.ones(50, bool), 20, "answers of the first half are right"), (np.ones(1, bool), 1, "too few images")],
)
def test_without_both_kinds_there_is_no_temperature(right, images, reason):
    result = counted(np.full(len(right), 0.7, np.float32), right, images).compute()["result"]
    assert result.temperature is None
    assert reason in result.undefined
    assert f"no temperature: {result.undefined}" in "\n".join(calibration_lines(result))


def test_a_temperature_of_counts_is_that_of_single_answers():
    scores, right = overconfident(500, 2.0)
    levels, place = np.unique(scores, return_inverse=True)
    counts = [np.bincount(place, side, minlength=len(levels)) for side in (right, ~right)]
    assert fitted_temperature(levels, *counts) == pytest.approx(fitted_temperature(scores, right, ~right), rel=1e-4)


def test_points_are_fitted_on_their_logits():
    rng = np.random.default_rng(0)
    true_logits = 2 * rng.standard_normal((60, 40, 5))
    labels = np.array([[rng.choice(5, p=np.exp(log_softmax(row))) for row in image] for image in true_logits])
    labels[:, -3:] = -100
    metric = PointCalibration(5)
    for index in range(60):
        image = torch.from_numpy(2.5 * true_logits[index])
        metric.add_batch(predictions=[image], references=[labels[index]], image_ids=[index])
    result = metric.compute()["result"]
    measured = np.array([is_measured(index) for index in range(60)])
    logits, own = 2.5 * true_logits[~measured][:, :-3].reshape(-1, 5), labels[~measured][:, :-3].ravel()
    expected = minimize(
        lambda value: -log_softmax(logits / value[0], 1)[np.arange(len(own)), own].mean(), [1.0], method="Nelder-Mead"
    ).x[0]
    assert result.temperature == pytest.approx(expected, rel=1e-3)
    assert result.temperature == pytest.approx(2.5, rel=0.15)
    assert result.ece_calibrated < result.ece / 2
    assert (result.fitted, result.measured) == (37 * (~measured).sum(), 37 * measured.sum())


def test_right_segments_are_the_true_positives_of_panoptic_quality():
    rng = np.random.default_rng(3)
    for _ in range(30):
        true, predicted = (rng.integers(0, 4, (3, 4)).repeat(4, 0).repeat(4, 1) for _ in range(2))
        predicted[rng.random(predicted.shape) < 0.6] = 0
        predicted = np.where(rng.random(predicted.shape) < 0.5, true, predicted)
        sides = []
        for ids in (predicted, true):
            rows = [{"id": int(id_), "label_id": int(id_) % 2, "score": 0.5} for id_ in np.unique(ids)]
            sides.append({"segmentation": ids, "segments_info": rows})
        sides[1]["segments_info"] = [row for row in sides[1]["segments_info"] if row["id"] != 3]  # void
        sides[1]["segmentation"] = np.where(true == 3, -1, true)
        right, counts = right_segments(*sides, 2)
        tp, fp, _, _ = panoptic_counts(*sides, 2).sum(0)
        assert right.sum() == tp
        assert (counts & ~right).sum() == fp


SCENES = GeneratedScenes(14, "val", size=(64, 64), seed=5)


def segmenter_for(task: str, temperature: float | None = None) -> Segmenter:
    model = tiny_eomt(num_queries=9, id2label=dict(SCENES.id2label))
    with torch.no_grad():
        model.class_predictor.weight *= 4
    processor = EoMTImageProcessor(
        task=task, size=64, threshold=0.1, overlap_mask_area_threshold=0.0, temperature=temperature
    )
    return Segmenter(model, processor, device="cpu")


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_every_task_is_calibrated_and_nothing_else_changes(task, tmp_path):
    settings = {"stuff_classes": SCENES.stuff_classes}
    plain = evaluate(segmenter_for(task), SCENES, SCENES.id2label, **settings)
    result = evaluate(segmenter_for(task), SCENES, SCENES.id2label, more_metrics=["calibration"], **settings)
    stored = evaluate(segmenter_for(task, 3.0), SCENES, SCENES.id2label, more_metrics=["calibration"], **settings)
    assert plain.calibration is None
    # As text, since NaN is unequal to itself.
    assert str((result.metrics, result.classes, result.images)) == str((plain.metrics, plain.classes, plain.images))
    # A temperature that the processor has already is left out of the search for another one.
    assert stored.calibration == result.calibration
    calibration = result.calibration
    if task == "semantic":
        assert calibration.fitted + calibration.measured == 14 * 64 * 64
    assert calibration.measured > 0
    assert f"ECE {100 * calibration.ece:.2f} %" in result_text(result)
    assert result_content(result)["calibration"]["temperature"] == calibration.temperature
    plot_reliability(tmp_path / "reliability.png", calibration)
    assert (tmp_path / "reliability.png").stat().st_size > 5000


@pytest.mark.parametrize(("before", "after", "worse"), [(0.02, 0.04, True), (0.04, 0.02, False)])
def test_a_temperature_that_does_harm_is_called_so(before, after, worse):
    result = CalibrationResult(1.5, before, after, 100, 200, [], [])
    assert ("the temperature made it worse" in "\n".join(calibration_lines(result))) is worse


def test_semantic_calibration_is_about_the_largest_class_score():
    segmenter = segmenter_for("semantic")
    result = evaluate(segmenter, SCENES, SCENES.id2label, more_metrics=["calibration"]).calibration
    scores, right = [], []
    for index in range(len(SCENES)):
        entry = SCENES[index]
        if is_measured(entry["image_id"]):
            ((labels, maps),) = segmenter.confidences([entry["image"]], "maxscore")
            classes = {row["id"]: row["label_id"] for row in entry["segments"]}
            truth = np.vectorize(classes.get)(np.asarray(entry["segment_map"]))
            scores.append(np.clip(maps["maxscore"].numpy().ravel(), 0, 1))
            right.append((labels.numpy() == truth).ravel())
    assert result.ece == pytest.approx(plain_ece(np.concatenate(scores), np.concatenate(right)), abs=1e-6)


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_the_command_saves_the_temperature(task, tmp_path, capsys):
    segmenter = segmenter_for(task)
    segmenter.model.save_pretrained(tmp_path / "model")
    segmenter.processor.save_pretrained(tmp_path / "model")
    words = ["evaluate", "--model", str(tmp_path / "model"), "--data", "generated:easy?num_scenes=14&size=64&seed=5"]
    words += ["--device", "cpu", "--output", str(tmp_path / "out"), "--split", "val", "--task", task, "--calibration"]
    assert main([*words, "--save-temperature"]) == 0
    captured = capsys.readouterr()
    found = json.loads((tmp_path / "out" / "results.json").read_text())["calibration"]
    assert (tmp_path / "out" / "reliability.png").is_file()
    assert "Calibration: ECE" in captured.out
    saved = EoMTImageProcessor.from_pretrained(tmp_path / "model")
    assert saved.temperature == found["temperature"]
    if task == "panoptic":  # a model of random weights finds no segment
        assert saved.temperature is None
        assert "no temperature is saved: all" in captured.err
    else:
        assert f"temperature {found['temperature']:g} saved in" in captured.err
    assert {**saved.to_dict(), "temperature": None} == {**segmenter.processor.to_dict(), "temperature": None}


def test_the_temperature_of_points_is_saved_too(points_folder, capsys):  # noqa: F811
    words = ["evaluate", "--model", str(points_folder / "model"), *POINTS_DATA, "--calibration"]
    words[words.index("generated:easy?num_scenes=3&size=48")] = "generated:easy?num_scenes=9&size=48"
    assert main([*words, "--save-temperature", "--json", str(points_folder / "r.json")]) == 0
    found = json.loads((points_folder / "r.json").read_text())["calibration"]["temperature"]
    assert ViTPImageProcessor.from_pretrained(points_folder / "model").temperature == found is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--save-temperature"], "--save-temperature needs --calibration"),
        (["--calibration", "--sweep-alpha"], "--calibration is for one answer to each image"),
        (["--calibration", "--save-temperature", "no_such_folder"], "no_such_folder has no preprocessor_config.json"),
    ],
)
def test_options_that_do_not_go_together(options, message, tmp_path, capsys):
    segmenter = segmenter_for("semantic")
    segmenter.model.save_pretrained(tmp_path / "model")
    segmenter.processor.save_pretrained(tmp_path / "model")
    words = ["evaluate", "--model", str(tmp_path / "model"), "--data", "generated:easy?num_scenes=2&size=64"]
    assert main([*words, "--device", "cpu", "--task", "semantic", *options]) == 2
    assert message in capsys.readouterr().err
