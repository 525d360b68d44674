"""Confidence of pixels and segments: anomaly scores, and temperature scaling.

All of a pixel's scores follow from its class scores S: of mask classification, the sums over queries of class
probability x mask probability; of models that classify pixels, their logits. The sign is the same everywhere: **a
confidence is higher where the model is surer, and the anomaly score is its negative**. With s = softmax(S / T):

- `maxscore`: the largest of S (of logits: of s), which the authors of EoMT used for BRAVO.
- `msp`: the largest of s ("maximum softmax probability", Hendrycks and Gimpel, ICLR 2017).
- `maxlogit`: the largest of S (Hendrycks et al., ICML 2022).
- `entropy`: sum s log s.
- `energy`: T logsumexp(S / T) (Liu et al., NeurIPS 2020).
- `rba`: sum tanh(S) ("rejected by all", Nayal et al., ICCV 2023).
- `rejection`: the largest over queries of (1 - probability of no-object) x mask probability.

`msp@0.5` is `msp` with T = 0.5. C classes, H W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CONFIDENCES = ("maxscore", "msp", "maxlogit", "entropy", "energy", "rba", "rejection")
_SOFTMAX = ("msp", "entropy", "energy")  # those that have a temperature
CERTAIN = 1e-6  # the closest to 0 or 1 that a score is taken for when it is calibrated
_BAND_VALUES = 2**22  # values of S to work on at a time


@dataclass(frozen=True)
class Confidence:
    """One way to say how sure a model is of a pixel; `str` is its name as users write it."""

    name: str
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in CONFIDENCES:
            raise ValueError(f"there is no confidence {self.name!r}; it is one of {', '.join(CONFIDENCES)}")
        check_temperature(self.temperature)
        if self.temperature != 1 and self.name not in _SOFTMAX:
            raise ValueError(f"{self}: {self.name} has no temperature; {', '.join(_SOFTMAX)} have one")

    @classmethod
    def parse(cls, text: str) -> "Confidence":
        """`NAME` or `NAME@T`."""
        name, separator, temperature = text.strip().partition("@")
        if not separator:
            return cls(name)
        try:
            return cls(name, float(temperature))
        except ValueError as error:
            if str(error).startswith("could not convert"):
                raise ValueError(f"{text}: {temperature!r} is no temperature; give a number, such as msp@0.5") from None
            if str(error).startswith("temperature="):
                raise ValueError(f"{text}: {error}") from None
            raise

    def __str__(self) -> str:
        # Every digit, as results are told apart by this name.
        return self.name if self.temperature == 1 else f"{self.name}@{float(self.temperature)!r}".removesuffix(".0")

    def bounds(self, num_classes: int) -> tuple[float, float]:
        """The confidence of a pixel that no class claims, and of one that a single class claims wholly.

        For scores of mask classification; those of overlapping queries may exceed the upper one.
        """
        if self.name == "rejection":
            return 0.0, 1.0
        scores = torch.zeros(num_classes, 2, dtype=torch.float64)
        scores[0, 1] = 1
        low, high = pixel_confidences(scores, [self])[str(self)].tolist()
        return low, high


def confidences_named(given: "str | Confidence | Sequence[str | Confidence]") -> list[Confidence]:
    """The confidences that a name, or several, stand for.

    Raises:
        ValueError: there is none of that name, or one is given twice.
    """
    several: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    if strangers := [each for each in several if not isinstance(each, str | Confidence)]:
        raise ValueError(f"{strangers[0]!r} is no confidence; name one or several of {', '.join(CONFIDENCES)}")
    wanted = [each if isinstance(each, Confidence) else Confidence.parse(each) for each in several]
    if not wanted:
        raise ValueError(f"no confidence is named; give one or several of {', '.join(CONFIDENCES)}")
    if twice := [each for index, each in enumerate(wanted) if each in wanted[:index]]:
        raise ValueError(f"the confidence {twice[0]} is named twice; leave one of them out")
    return wanted


def pixel_confidences(
    scores: Tensor,
    wanted: Sequence[Confidence],
    *,
    dim: int = 0,
    are_logits: bool = False,
    rejection: Tensor | None = None,
) -> dict[str, Tensor]:
    """Confidences, by name, from class scores that have the C classes at `dim`; `rejection` is passed through.

    The work takes about three copies of `scores`.
    """
    found: dict[str, Tensor] = {}
    largest = scores.amax(dim, keepdim=True)
    for temperature in dict.fromkeys(each.temperature for each in wanted):
        group = [each for each in wanted if each.temperature == temperature]
        names = {each.name for each in group}
        of_softmax = names & {*_SOFTMAX, *(["maxscore"] if are_logits else [])}
        if of_softmax:
            # One exponential serves them all, of differences to the largest, which cannot overflow.
            shifted = (scores - largest).div_(temperature)
            weights = shifted.exp()
            total = weights.sum(dim)
        for each in group:
            if each.name == "rejection":
                if rejection is None:
                    raise ValueError(
                        "rejection is about queries, which these class scores no longer tell apart (several views, or "
                        "a model that classifies pixels); choose another confidence"
                    )
                values = rejection
            elif each.name == "rba":
                values = scores.tanh().sum(dim)
            elif each.name == "msp" or (each.name == "maxscore" and are_logits):
                values = total.reciprocal()
            elif each.name == "entropy":
                # 0 x -inf, of a class that is excluded, is 0 here.
                values = shifted.mul(weights).nan_to_num_(0.0, None, None).sum(dim).div_(total).sub_(total.log())
                values = values.masked_fill(total.isnan(), math.nan)
            elif each.name == "energy":
                values = total.log().mul_(temperature).add_(largest.squeeze(dim))
            else:
                values = largest.squeeze(dim)
            found[str(each)] = values
    return {str(each): found[str(each)] for each in wanted}


def confidence_maps(scores: Tensor, wanted: Sequence[Confidence], *, are_logits: bool = False) -> dict[str, Tensor]:
    """`pixel_confidences` (H, W) float32 of whole maps (C, H, W), in bands, so that little memory is needed."""
    num_classes, height, width = scores.shape
    maps = {str(each): torch.empty((height, width), device=scores.device) for each in wanted}
    step = max(1, _BAND_VALUES // (num_classes * width))
    for start in range(0, height, step):
        rows = slice(start, start + step)
        for name, values in pixel_confidences(scores[:, rows].float(), wanted, are_logits=are_logits).items():
            maps[name][rows] = values
    refuse_nan(maps)
    return maps


def refuse_nan(maps: dict[str, Tensor]) -> None:
    """Refuse confidences that are not numbers."""
    if maps and bool(torch.stack([values.isnan().any() for values in maps.values()]).any()):
        raise ValueError(
            "the confidence is NaN somewhere, as the model's logits are: float16 overflows in some models (use float32 "
            "or bfloat16), or its weights are damaged"
        )


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is no positive number."""
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature!r} must be a positive number; above 1 it makes a model less sure")


def calibrated(confidence: Tensor, temperature: float | None) -> Tensor:
    """Probabilities that an answer is right, c, as sigmoid(logit(c) / T): softened by T > 1, sharpened by T < 1.

    That keeps their order. `None` gives what was given.
    """
    if temperature is None:
        return confidence
    # Certainty has no logit, and class scores of overlapping queries exceed 1.
    return (confidence.clamp(CERTAIN, 1 - CERTAIN).logit() / temperature).sigmoid()
