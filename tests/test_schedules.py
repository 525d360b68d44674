"""Learning-rate schedules, step by step against the formulas written out."""

import math

import pytest
import torch

from hf_segvit.training.derivation import derive
from hf_segvit.training.optimizers import build_optimizer, learning_rate_factor, learning_rate_schedule
from hf_segvit.training.recipe import Recipe

from .tiny_models import tiny_eomt


def official_two_stages(step: int, first: int, second: int, total: int) -> tuple[float, float]:
    """Factor of new parameters and of the backbone."""
    new = step / first if step < first else (1 - (step - first) / (total - first)) ** 0.9
    if step < first:
        backbone = 0.0
    elif step < first + second:
        backbone = (step - first) / second
    else:
        backbone = (1 - (step - first - second) / (total - first - second)) ** 0.9
    return new, backbone


def run(recipe: Recipe, steps: int) -> list[list[tuple[str, float, float]]]:
    """Role, rate and highest rate of each group at every step of training."""
    model = tiny_eomt()
    plan = derive(recipe, 16, config=model.config)
    optimizer = build_optimizer(model, plan)
    schedule = learning_rate_schedule(optimizer, plan)
    history = []
    for _ in range(steps):
        history.append([(group["role"], group["lr"], group["initial_lr"]) for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return history


def test_two_stages_of_warmup_and_polynomial_decay_step_by_step():
    total = 120
    recipe = Recipe(steps=total, backbone="b", warmup_steps=[7, 11], learning_rate=1e-3)
    history = run(recipe, total + 3)
    for step, groups in enumerate(history[: total + 1]):
        new, backbone = official_two_stages(step, 7, 11, total)
        assert {role for role, *_ in groups} == {"backbone", "rest"}
        for role, rate, highest in groups:
            assert rate == pytest.approx(highest * (backbone if role == "backbone" else new), rel=1e-12, abs=1e-18)
    for groups in history[total:]:  # past the end, where the formula has no real value
        assert all(rate == 0.0 for _, rate, _ in groups)


def test_derived_warmup_of_official_length_follows_the_official_numbers():
    plan = derive(Recipe(epochs=12, backbone="b"), 7391 * 16)
    assert plan.warmup_steps == (500, 1000)
    for step in (0, 1, 250, 499, 500, 501, 1000, 1499, 1500, 1501, 40000, 88691, 88692):
        new, backbone = official_two_stages(step, 500, 1000, 88692)
        assert learning_rate_factor(step, idle=0, warmup=500, total_steps=88692) == pytest.approx(new, abs=1e-15)
        assert learning_rate_factor(step, idle=500, warmup=1000, total_steps=88692) == pytest.approx(
            backbone, abs=1e-15
        )


def test_one_stage_and_cosine():
    total = 50
    history = run(Recipe(steps=total, warmup_steps=[10], schedule="cosine", learning_rate=1e-3), total + 2)
    for step, groups in enumerate(history):
        expected = step / 10 if step < 10 else (1 + math.cos(math.pi * min((step - 10) / 40, 1.0))) / 2
        for _, rate, highest in groups:
            assert rate == pytest.approx(highest * expected, rel=1e-12, abs=1e-18)


def test_no_warmup_starts_at_the_highest_rate():
    assert learning_rate_factor(0, idle=0, warmup=0, total_steps=10) == 1.0
    assert learning_rate_factor(5, idle=0, warmup=0, total_steps=10, power=1.0) == 0.5


@pytest.mark.parametrize("schedule", ["polynomial", "cosine"])
def test_never_negative_nor_complex(schedule):
    for step in (10, 11, 1000):
        factor = learning_rate_factor(step, idle=2, warmup=3, total_steps=10, schedule=schedule)
        assert isinstance(factor, float)
        assert factor == 0.0


def test_a_restored_schedule_goes_on_where_it_was():
    model = tiny_eomt()
    plan = derive(Recipe(steps=30, backbone="b", warmup_steps=[3, 4]), 16, config=model.config)

    def fresh():
        optimizer = build_optimizer(model, plan)
        return optimizer, learning_rate_schedule(optimizer, plan)

    optimizer, schedule = fresh()
    for _ in range(9):
        optimizer.step()
        schedule.step()
    restored_optimizer, restored = fresh()
    restored_optimizer.load_state_dict(optimizer.state_dict())
    restored.load_state_dict(schedule.state_dict())
    for _ in range(5):
        assert restored.get_last_lr() == schedule.get_last_lr()
        assert [group["lr"] for group in restored_optimizer.param_groups] == schedule.get_last_lr()
        for one in (optimizer, restored_optimizer, schedule, restored):
            one.step()


def test_backbone_stands_still_in_the_first_stage():
    model = tiny_eomt()
    plan = derive(Recipe(steps=30, backbone="b", warmup_steps=[2, 2]), 16, config=model.config)
    optimizer = build_optimizer(model, plan)
    schedule = learning_rate_schedule(optimizer, plan)
    block, head = model.eomt.layers[0].mlp.fc1.weight, model.class_predictor.weight
    before, head_before = block.detach().clone(), head.detach().clone()
    moved, head_moved = [], []
    for _ in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        schedule.step()
        moved.append(not torch.equal(block, before))
        head_moved.append(not torch.equal(head, head_before))
    # Rates of the steps are 0, 0, 0, 1/2, 1 for the backbone and 0, 1/2, 1, ... for the head.
    assert moved == [False, False, False, True, True]
    assert head_moved == [False, True, True, True, True]
