"""What a run that goes on may change: other data is noticed, settings that save a training take effect and are said."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from hf_segvit.training.checkpoints import identity, refuse_other_run
from hf_segvit.training.derivation import derive
from hf_segvit.training.loop import train
from hf_segvit.training.optimizers import (
    build_optimizer,
    learning_rate_factor,
    learning_rate_schedule,
    restore_schedule,
)
from hf_segvit.training.recipe import RENAMED, Recipe, load_recipe, resume_rules
from hf_segvit.training.tasks import task_for
from hf_segvit.training.tracking import read_history
from hf_segvit.training.training_state import put_optimizer

from .data_folders import mask_folder
from .tiny_models import tiny_eomt
from .tiny_training import tiny_recipe


class Crash(Exception):
    pass


def train_until(recipe, step):
    """Interrupted in the step after `step`."""

    def crash(number, loss):
        if number == step + 1:
            raise Crash

    with pytest.raises(Crash):
        train(recipe, cpu=True, on_step=crash, progress=False)


def folder_recipe(root, **changes):
    folder = {"data": f"mask_folder:{root}", "train_split": "train", "val_data": None, "val_split": "train"}
    return tiny_recipe(root / "run", **folder, task="semantic", augmentation="eomt_semantic", **changes)


def of(recipe, number=4, total=10):
    return identity(recipe, number, total, task_for(recipe).training_datasets())


def test_other_images_of_the_same_number_are_noticed(tmp_path):
    mask_folder(tmp_path, ("a", "b", "c", "d"))
    recipe = folder_recipe(tmp_path)
    found = of(recipe)
    assert refuse_other_run(found, of(folder_recipe(tmp_path)), tmp_path) is None

    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        folder = tmp_path / kind / "train"
        (folder / f"b.{suffix}").rename(folder / f"z.{suffix}")
    with pytest.raises(
        ValueError, match=r"the training images are different ones, or in another order .*must be the same"
    ):
        refuse_other_run(found, of(folder_recipe(tmp_path)), tmp_path)

    # A checkpoint of before these were noted still serves.
    older = {name: value for name, value in found.items() if name not in ("classes", "image_ids")}
    assert refuse_other_run(older, of(folder_recipe(tmp_path)), tmp_path) is None


def test_other_classes_are_noticed(tmp_path):
    mask_folder(tmp_path, ("a", "b"))
    found = of(folder_recipe(tmp_path))
    (tmp_path / "classes.json").write_text(json.dumps({"0": "car", "1": "road"}))
    with pytest.raises(ValueError, match=r"2 classes have other names: 0 was 'road' and is 'car', 1 was 'car'"):
        refuse_other_run(found, of(folder_recipe(tmp_path)), tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps({"0": "car", "1": "road", "2": "tree"}))
    with pytest.raises(ValueError, match="there were 2 classes and are 3"):
        refuse_other_run(found, of(folder_recipe(tmp_path)), tmp_path)


def test_every_part_of_a_mixture_counts(tmp_path):
    mask_folder(tmp_path / "fine", ("a", "b"))
    mask_folder(tmp_path / "coarse", ("c", "d"))
    points = {"num_points": 4, "mixture": [{"data": f"mask_folder:{tmp_path / 'coarse'}"}]}
    recipe = load_recipe("own_points", [f"data=mask_folder:{tmp_path / 'fine'}"]).changed(points=points)
    found = of(recipe)
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        folder = tmp_path / "coarse" / kind / "train"
        (folder / f"d.{suffix}").rename(folder / f"e.{suffix}")
    with pytest.raises(ValueError, match="the training images are different ones"):
        refuse_other_run(found, of(recipe), tmp_path)


def test_the_loop_compares_the_data(tmp_path):
    mask_folder(tmp_path, ("a", "b", "c", "d"))
    train(folder_recipe(tmp_path, steps=1, warmup_steps=[0]), cpu=True, progress=False)
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        folder = tmp_path / kind / "train"
        (folder / f"b.{suffix}").rename(folder / f"z.{suffix}")
    with pytest.raises(ValueError, match="the training images are different ones"):
        train(folder_recipe(tmp_path, steps=1, warmup_steps=[0]), cpu=True, progress=False)


def test_a_training_that_diverged_goes_on_with_the_settings_that_are_advised(tmp_path, capsys):
    recipe = tiny_recipe(tmp_path, weight_decay=0.0, weight_decay_mode="matrices", layer_decay=0.5)
    train_until(recipe, 4)
    changes = {"learning_rate": 1e-4, "warmup_steps": [5], "weight_decay": 0.1, "precision": "bf16"}
    changed = recipe.changed(**changes, max_grad_norm=1.0)
    train(changed, cpu=True)
    said = capsys.readouterr().err
    for text in (
        "learning_rate 0.0001 (was 0.001)",
        "max_grad_norm 1.0 (was 0.01)",
        'precision "bf16" (was "no")',
        "warmup_steps [5] (was [1])",
        "weight_decay 0.1 (was 0.0)",
        "the result is no longer that of an uninterrupted run",
    ):
        assert text in said
    rows = {row["step"]: row for row in read_history(tmp_path / "history.jsonl") if "loss" in row}
    for step, rate, warmup in ((4, 1e-3, 1), (5, 1e-4, 5), (6, 1e-4, 5)):
        factor = learning_rate_factor(step - 1, idle=0, warmup=warmup, total_steps=6)
        assert rows[step]["learning rate/rest"] == pytest.approx(rate * factor, rel=1e-12)
    saved = torch.load(tmp_path / "checkpoints" / "step-00000006" / "optimizer.pt", weights_only=True)
    groups = saved["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    assert max(group["initial_lr"] for group in groups) == 1e-4
    assert {int(moments["step"]) for moments in saved["optimizer"]["state"].values()} == {6}, "moments are kept"

    train(changed, cpu=True)
    assert "training resumes with" not in capsys.readouterr().err, "from here on these are the run's own settings"


def test_what_cannot_change_names_a_command_that_works(tmp_path):
    recipe = tiny_recipe(tmp_path / "run", steps=2)
    train(recipe, cpu=True, progress=False)
    with pytest.raises(ValueError, match=r"freeze was None .* image_size was 64 and is 32") as error:
        train(recipe.changed(image_size=32, freeze="backbone"), cpu=True, progress=False)
    source = re.search(r"with init=(\S+) and another output=", str(error.value))[1]
    assert source == str(tmp_path / "run" / "checkpoints" / "step-00000002")
    again = recipe.changed(image_size=32, freeze="backbone", init=source, output=str(tmp_path / "new"), steps=1)
    train(again.changed(warmup_steps=[0], save_every_steps=1), cpu=True, progress=False)
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (source, tmp_path / "new" / "model"))
    name = "eomt.layers.1.mlp.fc1.weight"
    assert torch.equal(before[name], after[name])
    assert not torch.equal(before["eomt.query.weight"], after["eomt.query.weight"])


def test_moments_go_to_the_same_parameters_in_other_groups():
    model = tiny_eomt()
    plans = [
        derive(Recipe(steps=9, learning_rate=rate, weight_decay=decay, weight_decay_mode="matrices"), 16)
        for rate, decay in ((1e-3, 0.0), (2e-3, 0.1))
    ]
    one, other = (build_optimizer(model, plan) for plan in plans)
    schedules = [learning_rate_schedule(optimizer, plan) for optimizer, plan in zip((one, other), plans, strict=True)]
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    one.step()
    schedules[0].step()
    assert len(one.param_groups) != len(other.param_groups)
    put_optimizer(model, other, one.state_dict())
    restore_schedule(schedules[1], schedules[0].state_dict())
    for parameter in model.parameters():
        assert torch.equal(one.state[parameter]["exp_avg"], other.state[parameter]["exp_avg"])
    assert max(group["weight_decay"] for group in other.param_groups) == 0.1
    assert max(group["lr"] for group in other.param_groups) == 2 * max(group["lr"] for group in one.param_groups)
    assert schedules[1].get_last_lr() == [group["lr"] for group in other.param_groups]
    for schedule in schedules:
        schedule.step()
    rates = zip(*(sorted({group["lr"] for group in optimizer.param_groups}) for optimizer in (one, other)), strict=True)
    assert all(later == pytest.approx(2 * earlier) for earlier, later in rates)


def test_what_may_change_is_what_the_fields_declare():
    rules = resume_rules("eomt")
    assert {name for name, rule in rules.items() if rule == "told"} == {
        *("learning_rate", "base_learning_rate", "prompt_learning_rate", "weight_decay", "warmup_steps"),
        *("max_grad_norm", "precision"),
    }
    kept = identity(Recipe(steps=1), 4, 1).keys() - {"pictures", "total_steps", "task_class"}
    assert kept == {name for name, rule in rules.items() if rule != "yes"}
    assert kept.isdisjoint({"output", "evaluate_every", "device_batch_size", "compile", "cache", "name"})
    assert {"batch_size", "seed", "model_config", "criterion", "lora", "annealing"} <= kept


def test_fields_that_an_older_version_did_not_have_were_at_their_default(tmp_path, monkeypatch):
    recipe = Recipe(steps=1, batch_size=8)
    found = identity(recipe, 4, 1)
    for name in ("criterion", "loss_mask"):
        del found[name]
    assert refuse_other_run(found, identity(recipe, 4, 1), tmp_path) is None
    with pytest.raises(ValueError, match="loss_mask was False and is True"):
        refuse_other_run(found, identity(recipe.changed(loss_mask=True), 4, 1), tmp_path)

    monkeypatch.setitem(RENAMED, "images_per_step", "batch_size")
    found["images_per_step"] = found.pop("batch_size")
    with pytest.warns(FutureWarning, match="images_per_step is called batch_size now"):
        assert refuse_other_run(found, identity(recipe, 4, 1), tmp_path) is None
