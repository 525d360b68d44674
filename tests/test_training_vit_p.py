"""ViT-P under the training loop: whole tiny runs, what the loss is divided by, two stages, mixtures, wrong settings."""

import dataclasses
import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_segvit.models.modeling_vit_p import ViTPForPointClassification
from hf_segvit.training.derivation import derive
from hf_segvit.training.loop import train
from hf_segvit.training.optimizers import parameter_groups
from hf_segvit.training.recipe import Recipe
from hf_segvit.training.tasks import task_for
from hf_segvit.training.tasks.vit_p import ViTPTask, point_settings

DATA = "generated:easy?num_scenes=7&size=48"
MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 8,
    "initializer_range": 0.1,
    "layer_scale_init_value": None,
}


def recipe(output, **changes) -> Recipe:
    fields = {
        "model": "vit_p",
        "task": "points",
        "data": DATA,
        "train_split": "train",
        "val_data": "generated:easy?num_scenes=3&size=48",
        "val_split": "val",
        "model_config": MODEL,
        "image_size": 48,
        "augmentation": "vit_p",
        "points": {"num_points": 12},
        "steps": 4,
        "batch_size": 4,
        "optimizer": "sgd",
        "learning_rate": 0.05,
        "prompt_learning_rate": 0.01,
        "weight_decay": 0.0,
        "layer_decay": 1.0,
        "max_grad_norm": 1.0,
        "schedule": "cosine",
        "warmup_steps": [1],
        "num_workers": 0,
        "evaluate_every": "end",
        "trackers": [],
        "draw": 0,
        "log_every": 1,
        "output": str(output),
    }
    return Recipe(**{**fields, **changes})


def run(made: Recipe):
    return train(made, cpu=True, progress=False)


def test_a_run_trains_scores_and_saves(tmp_path):
    points = {"num_points": 12, "evaluate": ["random", "interior"]}
    outcome = run(recipe(tmp_path, points=points, draw=2))
    metrics = outcome.results["metrics"]
    for name in ("top_1", "top_5", "class_balanced", "expected_calibration_error", "interior_top_1"):
        assert 0 <= metrics[name] <= 1
    assert metrics["num_points"] == 36
    assert json.loads((tmp_path / "results.json").read_text())["metrics"] == metrics
    reloaded = ViTPForPointClassification.from_pretrained(tmp_path / "model").eval()
    batch = {"pixel_values": torch.randn(1, 3, 48, 48), "prompts": torch.rand(1, 5, 4)}
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, outcome.model(**batch).logits)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "point-classification" in card
    assert "| top_1 |" in card
    (drawing,) = (tmp_path / "predictions").iterdir()
    assert drawing.stat().st_size > 1000


@pytest.mark.slow
def test_a_longer_run_learns(tmp_path):
    changes = {"steps": 60, "optimizer": "adamw", "learning_rate": 3e-3, "prompt_learning_rate": None}
    fewer = {"augmentation_options": {"crop": False, "max_rotation": 0.0}, "val_data": DATA, "val_split": "train"}
    outcome = run(recipe(tmp_path, **changes, **fewer))
    assert outcome.results["metrics"]["top_1"] > 0.45  # of six classes, of which an image has three or four


def test_the_loss_is_the_mean_over_all_micro_batches(tmp_path):
    task = ViTPTask(recipe(tmp_path))
    torch.manual_seed(0)
    model, processor = task.build_model()
    samples = task.train_samples()
    collate = task.collator(processor, torch.device("cpu"))
    chosen = [samples[0, index] for index in range(5)]
    chosen[1].prompt_labels[:7] = -100  # micro-batches with different numbers of labels
    batches = [collate(chosen[:2]), collate(chosen[2:])]
    normalizers = task.normalizers(model, batches, torch.device("cpu"))
    assert float(normalizers) == 5 * 12 - 7
    sums = [task.loss(model, batch, normalizers)[0] for batch in batches]
    whole = collate(chosen)
    logits = model(**{name: whole[name] for name in ("pixel_values", "prompts", "prompt_mask")}).logits
    expected = cross_entropy(logits.flatten(0, 1), whole["labels"].flatten(), ignore_index=-100)
    # Batches of another size are summed in another order.
    torch.testing.assert_close(sum(sums), expected, rtol=1e-5, atol=1e-5)


def test_accumulation_changes_nothing(tmp_path):
    models = []
    for number in (4, 2):
        outcome = run(recipe(tmp_path / str(number), device_batch_size=number))
        models.append(outcome.model.state_dict())
    for name, tensor in models[0].items():
        # Gradients are summed in another order, over four steps.
        torch.testing.assert_close(models[1][name], tensor, rtol=1e-4, atol=1e-5)


def test_the_prompt_encoder_has_a_rate_of_its_own(tmp_path):
    made = recipe(tmp_path)
    model, _ = ViTPTask(made).build_model()
    groups = {group["role"]: group for group in parameter_groups(model, derive(made, 7, 1, model.config))}
    assert groups["prompt"]["lr"] == 0.01
    assert groups["prompt"]["names"] == ["vit_p.prompt_encoder.weight"]
    assert {group["lr"] for role, group in groups.items() if role != "prompt"} == {0.05}


def test_a_warm_up_longer_than_the_run_is_refused(tmp_path):
    # A published configuration has one of 80,000 steps in a run of 19,200, so that it never decays.
    with pytest.raises(ValueError, match=r"warmup_steps=\[80000\] do not fit into a run of 19200 steps"):
        derive(recipe(tmp_path, steps=19200, warmup_steps=[80000]), 20000)


def test_boxes_first_and_points_then(tmp_path):
    boxes = run(recipe(tmp_path / "boxes", points={"num_points": 12, "source": "box"}))
    trained = boxes.model.state_dict()
    init = str(tmp_path / "boxes" / "model")

    kept, _ = ViTPTask(recipe(tmp_path / "points", init=init)).build_model()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in kept.state_dict().items())
    anew, _ = ViTPTask(recipe(tmp_path / "points", init=init, points={"reset_head": True})).build_model()
    differ = [name for name, tensor in anew.state_dict().items() if not torch.equal(tensor, trained[name])]
    assert differ == ["classifier.weight", "classifier.bias"]
    # Other classes, also as many: the head is new, everything else stays.
    medium = recipe(tmp_path / "other", init=init, data="generated:medium?num_scenes=3&size=48")
    task = ViTPTask(medium)
    other, _ = task.build_model()
    assert task.remarks == ["class head: all 10 classes are new (the checkpoint has other classes than the data)"]
    assert other.classifier.weight.shape == (10, 32)
    assert torch.equal(other.vit_p.prompt_encoder.weight, trained["vit_p.prompt_encoder.weight"])
    assert run(recipe(tmp_path / "points", init=init)).step == 4


def test_fine_and_coarse_labels_are_mixed(tmp_path):
    points = {
        "num_points": 12,
        "mixture": [{"data": "generated:easy?num_scenes=20&size=48&seed=5", "source": "coarse", "share": 3}],
    }
    made = recipe(tmp_path, points=points)
    samples = ViTPTask(made).train_samples()
    assert len(samples) == 27
    assert samples.ends.tolist() == [7, 27]  # a quarter and three quarters
    assert samples.parts[1].augmentation.sampling.source == "coarse"
    assert samples.parts[1].augmentation.sampling.num_prompts == 12
    assert run(made).step == 4
    wrong = dataclasses.replace(made, points={"mixture": [{"data": "generated:hard?num_scenes=3"}]})
    with pytest.raises(ValueError, match="need the same classes"):
        ViTPTask(wrong).train_samples()


def test_a_run_that_was_stopped_goes_on_to_the_bit(tmp_path):
    points = {"num_points": 8, "mixture": [{"data": "generated:easy?num_scenes=5&size=48&seed=5"}]}
    whole = run(recipe(tmp_path / "whole", points=points))

    class Stopped(Exception):
        pass

    def stop(step, loss):
        if step == 3:
            raise Stopped

    made = recipe(tmp_path / "parts", points=points, save_every_steps=2)
    with pytest.raises(Stopped):
        train(made, cpu=True, progress=False, on_step=stop)
    outcome = run(made)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, outcome.model.state_dict()[name]), name


def test_settings_that_cannot_be_meant_are_refused(tmp_path):
    for values, message in (
        ({"num_point": 5}, "no key 'num_point'; did you mean num_points"),
        ({"source": "boxes"}, "points.source='boxes' is unknown; did you mean box"),
        ({"share": 0}, "points.share=0 must be > 0"),
        ({"evaluate": ["centre"]}, "points.evaluate='centre' is unknown; choose one of random"),
        ({"evaluate": "maximum"}, "needs masks"),
        ({"mixture": [{"share": 2}]}, "each with `data`"),
        ({"mixture": [{"data": "x", "sauce": "box"}]}, "no key 'sauce'; did you mean source"),
    ):
        with pytest.raises(ValueError, match=message):
            point_settings(values)
    assert isinstance(task_for(recipe(tmp_path)), ViTPTask)
