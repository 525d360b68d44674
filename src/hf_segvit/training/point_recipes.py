"""The `points` part of a ViT-P recipe: how prompts are drawn, from which data, and where the model is scored.

`point_settings` reads it; unknown keys and values that cannot be meant are refused before anything is loaded.

    points:
      num_points: 200          # prompts of a picture
      source: mask             # mask, coarse or box
      instance_aware: false
      box_share: 0.5           # of prompts from boxes that are boxes; the others are points in them
      coarse_margin: 0.03
      share: 1                 # of the samples, beside those of the mixture
      mixture:                 # further data, each with the keys above
        - {data: "cityscapes_coarse:/data/cityscapes", split: train_extra, source: mask, share: 3}
      reset_head: false        # with init: learn the classes anew
      evaluate: [random]       # and interior, maximum
      generator: null          # segmentation model whose masks "maximum" asks about
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ..data.prompts import PROMPT_SOURCES
from ..evaluation.points import POINT_KINDS

SAMPLING_KEYS = ("num_points", "source", "instance_aware", "box_share", "coarse_margin")
_PART_KEYS = (*SAMPLING_KEYS, "data", "split", "share")
_KEYS = (*SAMPLING_KEYS, "share", "mixture", "reset_head", "evaluate", "generator")


@dataclass(frozen=True)
class PointPart:
    """Further data of a mixture.

    Attributes:
        data: "FORMAT:PATH".
        split: of the data; `None` is the first there is.
        share: of the samples.
        sampling: settings of `PointAugmentation`.
    """

    data: str
    split: str | None
    share: float
    sampling: dict[str, Any]


@dataclass(frozen=True)
class PointSettings:
    """The `points` of a recipe; see the module.

    Attributes:
        sampling: settings of `PointAugmentation`, for the recipe's own data.
        share: of the recipe's own data.
        mixture: further data.
        reset_head: whether the head of `init` is made anew.
        evaluate: kinds of points to score at.
        generator: segmentation model for kind "maximum".
    """

    sampling: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    mixture: tuple[PointPart, ...] = ()
    reset_head: bool = False
    evaluate: tuple[str, ...] = ("random",)
    generator: str | None = None

    @property
    def wants_segments(self) -> bool:
        """Whether segments of one class must be told apart."""
        return needs_segments(self.sampling)


def point_settings(values: Mapping[str, Any]) -> PointSettings:
    """Read the `points` of a recipe.

    Raises:
        ValueError: a key is unknown or a value cannot be meant; the message names it and the remedy.
    """
    _refuse_unknown(values, _KEYS, "points")
    parts = values.get("mixture") or ()
    if not isinstance(parts, list | tuple) or not all(isinstance(part, Mapping) and "data" in part for part in parts):
        raise ValueError(
            "points.mixture must be a list of data sets, each with `data` and perhaps `share` and `source`"
        )
    for part in parts:
        _refuse_unknown(part, _PART_KEYS, "points.mixture")
    own = _sampling(values, "points")
    kinds = values.get("evaluate", ("random",))
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    unknown = [kind for kind in kinds if kind not in POINT_KINDS]
    if unknown or not kinds:
        raise ValueError(f"points.evaluate is {list(kinds)}; name some of {', '.join(POINT_KINDS)}")
    if "maximum" in kinds and not values.get("generator"):
        raise ValueError(
            "points.evaluate has maximum, which needs masks: name a segmentation model as points.generator"
        )
    return PointSettings(
        sampling=own,
        share=_share(values, "points"),
        mixture=tuple(
            PointPart(
                str(part["data"]),
                part.get("split"),
                _share(part, "points.mixture"),
                {**own, **_sampling(part, "points.mixture")},
            )
            for part in parts
        ),
        reset_head=bool(values.get("reset_head", False)),
        evaluate=kinds,
        generator=values.get("generator"),
    )


def needs_segments(sampling: Mapping[str, Any]) -> bool:
    """Whether prompts drawn with these settings tell segments of one class apart."""
    return bool(sampling.get("instance_aware")) or sampling.get("source") == "box"


def _sampling(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    source = values.get("source", "mask")
    if source not in PROMPT_SOURCES:
        raise ValueError(f"{place}.source is {source!r}; choose one of {', '.join(PROMPT_SOURCES)}")
    return {key: values[key] for key in SAMPLING_KEYS if key in values}


def _share(values: Mapping[str, Any], place: str) -> float:
    share = values.get("share", 1.0)
    if isinstance(share, bool) or not isinstance(share, int | float) or not share > 0:
        raise ValueError(f"{place}.share is {share!r}; give a number above 0, relative to the other shares")
    return float(share)


def _refuse_unknown(values: Mapping[str, Any], known: tuple[str, ...], place: str) -> None:
    for key in values:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
            raise ValueError(f"{place} has no key {key!r}; {hint}")
