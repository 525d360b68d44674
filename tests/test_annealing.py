"""Mask annealing: the schedule against its formula, and under Transformers' Trainer."""

import pytest

from hf_segvit.training.annealing import MaskAnnealing


def test_rule_against_the_formula_written_out():
    total, layers = 1200, 4
    schedule = MaskAnnealing.by_rule(total, layers)
    for step in range(0, total + 100, 7):
        for layer, probability in enumerate(schedule.probabilities(step)):
            start = total / 6 + layer * (total / 2) / (layers - 1)
            end = start + total / 6
            if step < start:
                expected = 1.0
            elif step >= end:
                expected = 0.0
            else:
                expected = (1 - (step - start) / (end - start)) ** 0.9
            assert probability == pytest.approx(expected, abs=1e-12)


def test_first_layer_of_dinov3_is_annealed_from_the_start():
    schedule = MaskAnnealing.from_fractions([[0, "3000/88692"], ["1/3", "1/2"]], 88692)
    assert (schedule.starts, schedule.ends) == ((0, 29564), (3000, 44346))
    assert schedule.probabilities(0) == [1.0, 1.0]
    assert schedule.probabilities(1500) == [0.5**0.9, 1.0]
    assert schedule.probabilities(3000) == [0.0, 1.0]


def test_a_single_layer_and_runs_of_a_few_steps():
    schedule = MaskAnnealing.by_rule(6, 1)
    assert (schedule.starts, schedule.ends) == ((1,), (2,))
    assert [schedule.probabilities(step) for step in range(4)] == [[1.0], [1.0], [0.0], [0.0]]
    one_step = MaskAnnealing.by_rule(1, 3)
    assert one_step.probabilities(1) == [0.0, 0.0, 0.0]


def test_finished_once_every_layer_is():
    schedule = MaskAnnealing((1, 4), (2, 6))
    assert [schedule.finished(step) for step in range(8)] == [False] * 6 + [True] * 2


def test_phases_that_cannot_be():
    with pytest.raises(ValueError, match="one of each per layer"):
        MaskAnnealing((1,), (2, 3))
    with pytest.raises(ValueError, match="each must start first"):
        MaskAnnealing((5,), (2,))
    with pytest.raises(ValueError, match="not a fraction"):
        MaskAnnealing.from_fractions([(0, 1.5)], 10)
