"""Mask annealing: fade out masked attention layer by layer in training.

Masked attention helps EoMT to learn; once it has faded, inference needs none (arXiv 2503.19108, section 3.3).
`MaskAnnealingCallback`, in transformers_trainer.py, applies the schedule under Transformers' `Trainer`.

L query layers, T steps of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .recipe import parse_fraction

POWER = 0.9  # as in the official code


@dataclass(frozen=True)
class MaskAnnealing:
    """The probability of masked attention in each query layer: 1, then falling as (1 - t) ** power, then 0.

    Raises:
        ValueError: there are not as many starts as ends, or a phase ends before it starts.
    """

    starts: tuple[int, ...]  # (L,) steps until which the probability is 1
    ends: tuple[int, ...]  # (L,) steps from which it is 0
    power: float = POWER

    def __post_init__(self) -> None:
        if len(self.starts) != len(self.ends):
            raise ValueError(f"annealing starts at {self.starts} and ends at {self.ends}; give one of each per layer")
        if any(not 0 <= start <= end for start, end in zip(self.starts, self.ends, strict=True)):
            raise ValueError(f"annealing starts at {self.starts} and ends at {self.ends}; each must start first")

    @classmethod
    def by_rule(cls, total_steps: int, num_query_layers: int, power: float = POWER) -> MaskAnnealing:
        """The phases of the official configurations: layer k starts at T / 6 + k (T / 2) / (L - 1) and takes T / 6."""
        # The first layer fades first. The last one ends at 5/6 T, which leaves T / 6 to train without masks.
        distance = 1 / (2 * max(num_query_layers - 1, 1))
        starts = [1 / 6 + layer * distance for layer in range(num_query_layers)]
        return cls.from_fractions([(start, start + 1 / 6) for start in starts], total_steps, power)

    @classmethod
    def from_fractions(cls, phases: Sequence[Sequence[Any]], total_steps: int, power: float = POWER) -> MaskAnnealing:
        """Phases from the (start, end) of each layer, in [0, 1] or as texts such as "1/6", rounded to steps."""
        steps = [[round(parse_fraction(value) * total_steps) for value in phase] for phase in phases]
        return cls(tuple(start for start, _ in steps), tuple(end for _, end in steps), power)

    def probabilities(self, step: int) -> list[float]:
        """Probability of masked attention in each query layer, after `step` steps have been taken."""
        return [_probability(step, start, end, self.power) for start, end in zip(self.starts, self.ends, strict=True)]

    def finished(self, step: int) -> bool:
        """Whether all phases are over."""
        # Only from then on does an evaluation measure the model that inference runs.
        return all(step >= end for end in self.ends)


def _probability(step: int, start: int, end: int, power: float) -> float:
    if step >= end:  # before the start, since a phase may be empty
        return 0.0
    if step < start:
        return 1.0
    return (1 - (step - start) / (end - start)) ** power
