"""Scores over alpha: each as if it were the only one, parts asked once, gaps to the oracle, resuming, the command."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segvit import (
    EoMTImageProcessor,
    ViTPFusionForUniversalSegmentation,
    ViTPFusionImageProcessor,
    ViTPImageProcessor,
)
from hf_segvit.cli import main
from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.evaluation import EvaluationResult, evaluate
from hf_segvit.evaluation.alpha_sweep import AlphaSweep, plot_sweep, sweep_alphas, sweep_content, sweep_text
from hf_segvit.evaluation.counts import delete_partial_results
from hf_segvit.evaluation.evaluate import variant_answers
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.inference.views import Views

from .test_evaluate import HEADLINES, TASKS, dataset_for
from .tiny_generators import tiny_classifier
from .tiny_models import tiny_eomt

ALPHAS = [0.0, 0.4, 1.0]


@pytest.fixture(scope="module")
def scenes():
    return GeneratedScenes(5, size=(48, 64))


def fused_predictor(scenes, task, *, isolated=False, views=None):
    generator = tiny_eomt(id2label=scenes.id2label, num_queries=12)
    with torch.no_grad():
        generator.class_predictor.weight *= 3
    attention = "isolated" if isolated else "joint"
    classifier = tiny_classifier(scenes.id2label, prompt_attention=attention)
    model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(generator, classifier)
    thresholds = {"threshold": 0.2, "overlap_mask_area_threshold": 0.1}
    processor = ViTPFusionImageProcessor.from_generator_and_classifier(
        EoMTImageProcessor(size=64, stuff_classes=scenes.stuff_classes, **thresholds),
        ViTPImageProcessor(size={"height": 56, "width": 56}),
        config=model.config,
    )
    return Segmenter(model, processor, task=task, **({} if views is None else {"views": views}))


def plain(value):
    """Answers as lists and numbers, which `==` compares; without scores, whose last digit depends on the batch."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items() if key != "score"}
    if isinstance(value, list | tuple):
        return [*map(plain, value)]
    return value.tolist() if hasattr(value, "tolist") else value


def scores_of(answers):
    """The scores that `plain` leaves out."""
    return [row["score"] for answer in answers if isinstance(answer, dict) for row in answer["segments_info"]]


def count_calls(model):
    calls = {"generator": 0, "classifier": 0}
    for name in calls:
        part = getattr(model, name)
        part.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    return calls


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_every_alpha_scores_as_if_it_were_the_only_one(task, isolated, scenes):
    predictor = fused_predictor(scenes, task, isolated=isolated)
    dataset = dataset_for(task, scenes)
    calls = count_calls(predictor.model)
    settings = {"stuff_classes": scenes.stuff_classes, "more_metrics": ["oracle"]}
    sweep = sweep_alphas(predictor, ALPHAS, dataset, scenes.id2label, batch_size=2, **settings)
    assert calls == {"generator": 3, "classifier": 3}  # batches of 2, 2 and 1
    assert sweep.headline == HEADLINES[task]
    images = [Image.fromarray(scenes[index]["image"]) for index in range(2)]
    columns = list(zip(*variant_answers(predictor, images, ALPHAS), strict=True))
    assert len({str((plain(answers), scores_of(answers))) for answers in columns}) == 3  # or nothing is compared
    scores = []
    for alpha, answers in zip(ALPHAS, columns, strict=True):
        predictor.model.config.alpha = alpha
        expected = predictor.answers(images)
        assert plain(answers) == plain(expected)
        assert scores_of(answers) == pytest.approx(scores_of(expected), abs=2e-6)  # rounded to six digits
        alone = evaluate(predictor, dataset, scenes.id2label, batch_size=2, **settings)
        # With isolated prompts a panoptic predictor leaves queries out, which changes no answer.
        np.testing.assert_equal(vars(sweep.results[alpha]), vars(alone))
        scores.append(alone.metrics[HEADLINES[task]])
    assert [sweep.score(alpha) for alpha in ALPHAS] == scores
    assert sweep.oracle == sweep.results[0.0].metrics[f"oracle_{HEADLINES[task]}"] >= scores[0]


def test_alpha_0_is_the_generator_alone(scenes):
    predictor = fused_predictor(scenes, "panoptic")
    images = [Image.fromarray(scenes[index]["image"]) for index in range(3)]
    alone = Segmenter(predictor.model.generator, predictor.processor.generator, task="panoptic")
    for answers, expected in zip(variant_answers(predictor, images, ALPHAS), alone.answers(images), strict=True):
        assert torch.equal(answers[0]["segmentation"], expected["segmentation"])
        assert answers[0]["segments_info"] == expected["segments_info"]


def test_views_are_kept_in_a_sweep(scenes):
    predictor = fused_predictor(scenes, "semantic", views=Views((1.0, 1.5), flip=True))
    calls = count_calls(predictor.model)
    rows = variant_answers(predictor, [Image.fromarray(scenes[0]["image"])], ALPHAS)
    assert calls == {"generator": 4, "classifier": 4}
    predictor.model.config.alpha = 0.4
    assert torch.equal(rows[0][1], predictor.answers([Image.fromarray(scenes[0]["image"])])[0])


def test_an_interrupted_sweep_goes_on(scenes, tmp_path):
    predictor = fused_predictor(scenes, "semantic")
    settings = {"partial_folder": tmp_path / "partial", "chunk_size": 2, "more_metrics": ["oracle"]}
    whole = sweep_alphas(predictor, ALPHAS, scenes, scenes.id2label, more_metrics=["oracle"])

    class Breaking(Segmenter):
        images = 0

        def ask(self, images, *settings, **more):
            self.images += len(images)
            if self.images > 3:
                raise RuntimeError("out of memory")
            return super().ask(images, *settings, **more)

    with pytest.raises(RuntimeError, match="out of memory"):
        sweep_alphas(
            Breaking(predictor.model, predictor.processor, task="semantic"), ALPHAS, scenes, scenes.id2label, **settings
        )
    calls = count_calls(predictor.model)
    again = sweep_alphas(predictor, ALPHAS, scenes, scenes.id2label, **settings)
    assert calls["generator"] == 3  # two of five were counted
    np.testing.assert_equal(sweep_content(again), sweep_content(whole))
    with pytest.raises(ValueError, match=r"another evaluation \(variants"):
        sweep_alphas(predictor, [0.0, 0.5], scenes, scenes.id2label, **settings)
    delete_partial_results(tmp_path / "partial")


def made_up(scores, oracle=None, classes=None):
    """A sweep of given headline scores by alpha."""
    results = {}
    for alpha, score in scores.items():
        metrics = {"mean_iou": score, "pixel_accuracy": 0.5} | ({} if oracle is None else {"oracle_mean_iou": oracle})
        rows = [{"label": name, "iou": values[alpha]} for name, values in (classes or {}).items() if alpha in values]
        results[alpha] = EvaluationResult("semantic", 4, metrics, rows, [])
    return AlphaSweep("mean_iou", "iou", results)


def test_gaps_and_the_best_alpha():
    sweep = made_up({0.0: 0.4, 0.5: 0.5, 1.0: 0.3}, oracle=0.6)
    assert sweep.best_alpha == 0.5
    assert [sweep.gap_closed(alpha) for alpha in (0.0, 0.5, 1.0)] == pytest.approx([0, 0.5, -0.5])
    assert made_up({0.0: 0.4, 1.0: 0.4}).best_alpha == 0.0
    assert made_up({0.0: 0.4, 1.0: 0.5}).gap_closed(1.0) is None
    assert made_up({0.0: 0.4, 1.0: 0.5}, oracle=0.4).gap_closed(1.0) is None


def test_the_report_says_what_matters(tmp_path):
    classes = {
        "road": {0.0: 0.9, 0.5: 0.9, 1.0: 0.88},
        "cat": {0.0: 0.1, 0.5: 0.6},
        "dog": {0.0: 0.2, 0.5: 0.3, 1.0: 0.1},
    }
    sweep = made_up({0.0: 0.4, 0.5: 0.5, 1.0: 0.3}, oracle=0.6, classes=classes)
    lines = [line.strip() for line in sweep_text(sweep, max_rows=2).splitlines()]
    assert lines[1].split() == ["alpha", "mean_iou", "pixel_accuracy"]
    assert lines[2].split() == ["0", "40.00", "50.00", "generator", "alone"]
    assert lines[3].split() == ["0.5", "50.00", "50.00", "best"]
    assert lines[5].split()[:3] == ["oracle", "60.00", "-"]
    assert lines[6] == "with alpha 0.5 ViT-P closes 50 % of the gap to perfect labels"
    assert [line.split()[0] for line in lines[10:12]] == ["class", "cat"]  # moved most
    assert lines[11].split() == ["cat", "10.00", "60.00", "-"]
    assert lines[-1] == "and 1 more classes"
    plot_sweep(tmp_path / "alpha.png", sweep, "made up")
    with Image.open(tmp_path / "alpha.png") as curve:
        assert curve.width > curve.height > 300


@pytest.mark.parametrize("alphas", [[0.5, 1.0], [0.0, 1.0, 0.5], [0.0, 0.0]])
def test_alphas_rise_from_0(alphas, scenes):
    with pytest.raises(ValueError, match="must rise from 0"):
        sweep_alphas(fused_predictor(scenes, "semantic"), alphas, scenes, scenes.id2label)


def test_alphas_are_of_a_fused_model(scenes):
    predictor = fused_predictor(scenes, "semantic")
    with pytest.raises(ValueError, match=r"alpha=1.5 is no number in \[0, 1\]"):
        sweep_alphas(predictor, [0.0, 1.5], scenes, scenes.id2label)
    alone = Segmenter(predictor.model.generator, predictor.processor.generator, task="semantic")
    with pytest.raises(ValueError, match="has no classifier"):
        sweep_alphas(alone, ALPHAS, scenes, scenes.id2label)


@pytest.fixture(scope="module")
def parts(tmp_path_factory, scenes):
    folder = tmp_path_factory.mktemp("parts")
    predictor = fused_predictor(scenes, "panoptic")
    for name in ("generator", "classifier"):
        getattr(predictor.model, name).save_pretrained(folder / name)
        getattr(predictor.processor, name).save_pretrained(folder / name)
    return folder


def command(parts, *options):
    words = ["evaluate", "--model", parts / "generator", "--data", "generated:easy", "--limit", 4, "--device", "cpu"]
    return main([str(word) for word in [*words, *options]])


def test_the_command_sweeps(parts, tmp_path, capsys):
    options = ["--classifier", parts / "classifier", "--task", "panoptic", "--output", tmp_path / "out"]
    assert command(parts, *options, "--sweep-alpha", "0.3,1", "--oracle") == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["alphas"] == [0, 0.3, 1]
    assert content["classifier"] == str(parts / "classifier")
    assert content["scores"] == [content["results"][name]["metrics"]["pq"] for name in ("0", "0.3", "1")]
    assert content["oracle"] == content["results"]["0"]["metrics"]["oracle_pq"] >= content["scores"][0]
    assert "generator alone" in printed
    assert f"{100 * content['scores'][1]:.2f}" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["alpha.png", "results.json", "results.txt"]


def test_the_command_scores_one_alpha_and_the_gap_that_it_closes(parts, tmp_path, capsys):
    options = ["--classifier", parts / "classifier", "--task", "semantic", "--alpha", 0.3]
    assert command(parts, *options, "--json", tmp_path / "plain.json") == 0
    assert command(parts, *options, "--oracle", "--json", tmp_path / "gap.json") == 0
    plain, gap = (json.loads((tmp_path / name).read_text()) for name in ("plain.json", "gap.json"))
    assert plain["metrics"]["mean_iou"] == gap["results"]["0.3"]["metrics"]["mean_iou"] == gap["scores"][1]
    assert "of the gap to perfect labels" in capsys.readouterr().out
    assert gap["gap_closed"][1] == pytest.approx(
        (gap["scores"][1] - gap["scores"][0]) / (gap["oracle"] - gap["scores"][0])
    )


def test_the_command_averages_views(parts, tmp_path):
    scores = []
    for options in ([], ["--tta-scales", "1,1.5", "--tta-flip"]):
        assert command(parts, "--task", "semantic", "--json", tmp_path / "n.json", *options) == 0
        scores.append(json.loads((tmp_path / "n.json").read_text())["metrics"]["mean_iou"])
    assert scores[0] != scores[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "panoptic", "--sweep-alpha"], "has no classifier whose weight alpha could be"),
        (["--task", "panoptic", "--sweep-alpha", "0,2"], "--sweep-alpha 0,2: 2 is outside [0, 1]"),
        (["--task", "panoptic", "--sweep-alpha", "x"], "--sweep-alpha x: give numbers separated by commas"),
        (["--task", "panoptic", "--sweep-alpha", "--alpha", "0.5"], "leave one of them out"),
        (["--task", "panoptic", "--alpha", "-1"], "--alpha -1.0 is outside [0, 1]"),
        (["--task", "points", "--sweep-alpha"], "are for segmentation; for points name the ViT-P --model"),
        (["--task", "instance", "--tta-flip"], "are for task semantic, not for instance"),
    ],
)
def test_wrong_options_end_in_one_line(options, message, parts, capsys):
    assert command(parts, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


SCRIPT = """
import json, sys
from accelerate import PartialState
sys.path.insert(0, sys.argv[1])
from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.evaluation.alpha_sweep import sweep_alphas
from tests.test_evaluate_fusion import ALPHAS, fused_predictor
state = PartialState(cpu=True)
scenes = GeneratedScenes(5, size=(48, 64))
sweep = sweep_alphas(fused_predictor(scenes, "semantic"), ALPHAS, scenes, scenes.id2label)
print(json.dumps([sweep.generator.num_images, [sweep.score(alpha) for alpha in ALPHAS]]), flush=True)
"""


@pytest.mark.slow
def test_processes_share_a_sweep(tmp_path, scenes):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(Path(__file__).parents[1])],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    rows = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]
    alone = sweep_alphas(fused_predictor(scenes, "semantic"), ALPHAS, scenes, scenes.id2label)
    for row in rows:
        assert row == [5, pytest.approx([alone.score(alpha) for alpha in ALPHAS], rel=1e-15)]
