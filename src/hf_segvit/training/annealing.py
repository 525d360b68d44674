"""Mask annealing: masked attention helps EoMT to learn, and is faded out layer by layer, so that inference needs none.

`MaskAnnealing` is the schedule: per query layer, the probability of masked attention is 1 until a step, falls as
(1 - t) ** power to another step, and is 0 from there on. `MaskAnnealing.by_rule` places the phases as the official
configurations do. `MaskAnnealingCallback`, in transformers_trainer.py, applies it under Transformers' `Trainer`.

Source: EoMT (arXiv 2503.19108), section 3.3. L query layers, T steps of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .recipe import parse_fraction

POWER = 0.9


@dataclass(frozen=True)
class MaskAnnealing:
    """When the masked attention of each query layer fades.

    Attributes:
        starts: (L,) steps until which the probability is 1.
        ends: (L,) steps from which on it is 0.
        power: of the fall in between; 1 is linear.

    Raises:
        ValueError: there are not as many starts as ends, or a phase ends before it starts.
    """

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    power: float = POWER

    def __post_init__(self) -> None:
        if len(self.starts) != len(self.ends):
            raise ValueError(f"annealing starts at {self.starts} and ends at {self.ends}; give one of each per layer")
        if any(not 0 <= start <= end for start, end in zip(self.starts, self.ends, strict=True)):
            raise ValueError(f"annealing starts at {self.starts} and ends at {self.ends}; each must start first")

    @classmethod
    def by_rule(cls, total_steps: int, num_query_layers: int, power: float = POWER) -> MaskAnnealing:
        """The phases of the official configurations, of which the first layer's comes first.

        Layer k (from 0) starts at T / 6 + k * (T / 2) / (L - 1) and takes T / 6, so that the last one ends at 5/6 T. A
        single layer starts at T / 6.

        Args:
            total_steps: T.
            num_query_layers: L.
            power: of the fall.
        """
        distance = 1 / (2 * max(num_query_layers - 1, 1))
        starts = [1 / 6 + layer * distance for layer in range(num_query_layers)]
        return cls.from_fractions([(start, start + 1 / 6) for start in starts], total_steps, power)

    @classmethod
    def from_fractions(cls, phases: Sequence[Sequence[Any]], total_steps: int, power: float = POWER) -> MaskAnnealing:
        """Phases given as fractions of training, per query layer; rounded to steps.

        Args:
            phases: (start, end) of each layer, numbers in [0, 1] or texts such as "1/6".
            total_steps: T.
            power: of the fall.

        Raises:
            ValueError: a value is no fraction, or a phase ends before it starts.
        """
        steps = [[round(parse_fraction(value) * total_steps) for value in phase] for phase in phases]
        return cls(tuple(start for start, _ in steps), tuple(end for _, end in steps), power)

    def probabilities(self, step: int) -> list[float]:
        """Probability of masked attention in each query layer, for the step after `step` steps have been taken."""
        return [_probability(step, start, end, self.power) for start, end in zip(self.starts, self.ends, strict=True)]

    def finished(self, step: int) -> bool:
        """Whether nothing is masked any more, so that evaluation measures the model that inference will run."""
        return all(step >= end for end in self.ends)


def _probability(step: int, start: int, end: int, power: float) -> float:
    if step >= end:
        return 0.0
    if step < start:
        return 1.0
    return (1 - (step - start) / (end - start)) ** power
