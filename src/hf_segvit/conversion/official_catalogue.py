"""The EoMT models that the paper's authors released, and what their files do not say.

A released file holds tensors only. Task, label set, image size, the DINOv3 base of a delta and the published figures
are in `official_models.json`; backbones are named by their size, which fixes the dimensions that are checked here.

The released ViT-P checkpoints, which all lie in one Hub repository: what their files do not say themselves.
"""

import difflib
import json
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path

from ..data.label_tables import LabelTable, label_table

HUB_OWNER = "tue-mps"

# Backbone sizes: hidden size, blocks.
_BACKBONES = {"small": (384, 12), "base": (768, 12), "large": (1024, 24), "giant": (1536, 40), "7b": (4096, 32)}


@dataclass(frozen=True)
class ReleasedModel:
    """One released checkpoint.

    Attributes:
        id: name of its repository, below `HUB_OWNER`.
        task: `"panoptic"`, `"instance"` or `"semantic"`.
        labels: name of its label table.
        image_size: side in pixels of its square input; semantic models see an image in windows of it.
        backbone: family and size of the ViT.
        num_queries: queries Q.
        num_query_layers: blocks that see the queries.
        metrics: published figure by metric, in percent: PQ on COCO or ADE20K, mIoU, AP of masks.
        base: Hub id of the backbone that a delta file is to be added to; `None` where the file is complete.
        gflops: multiply-adds of an image in 10^9, windows counted; `None` where not published.
        fps: images a second on an H100, compiled, as published.
        pretrained_on: data set of an earlier training of the whole model.
        unsupported: why this model cannot be converted.
    """

    id: str
    task: str
    labels: str
    image_size: int
    backbone: str
    num_queries: int
    num_query_layers: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    base: str | None = None
    gflops: float | None = None
    fps: float | None = None
    pretrained_on: str | None = None
    unsupported: str | None = None

    @property
    def repository(self) -> str:
        """Hub id of the repository."""
        return f"{HUB_OWNER}/{self.id}"

    @property
    def label_table(self) -> LabelTable:
        """Its classes."""
        return label_table(self.labels)

    @property
    def thresholds(self) -> dict[str, float]:
        """Post-processing of the official evaluation, as settings of `EoMTImageProcessor`."""
        if self.task == "panoptic":
            return {"threshold": 0.8, "mask_threshold": 0.5, "overlap_mask_area_threshold": 0.8}
        return {}

    def disagreement(self, dimensions: dict[str, int]) -> str | None:
        """In what a checkpoint cannot be this model.

        Args:
            dimensions: config fields read from its tensors.

        Returns:
            The first field that differs, with both values; `None` if none does.
        """
        hidden_size, depth = _BACKBONES[self.backbone.rpartition("_")[2]]
        published = {
            "hidden_size": hidden_size,
            "num_hidden_layers": depth,
            "num_queries": self.num_queries,
            "num_query_layers": self.num_query_layers,
            "num_labels": len(self.label_table.classes),
        }
        for name, value in published.items():
            if value is not None and name in dimensions and dimensions[name] != value:
                return f"{name} is {dimensions[name]} in the file and {value} in {self.id}"
        return None


@cache
def released_models() -> dict[str, ReleasedModel]:
    """All released models, by id."""
    text = resources.files("hf_segvit.conversion").joinpath("official_models.json").read_text(encoding="utf-8")
    models = [ReleasedModel(**entry) for entry in json.loads(text)["models"]]
    return {model.id: model for model in models}


def released_model(model_id: str) -> ReleasedModel:
    """The released model of a name, with or without its owner.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    models = released_models()
    name = model_id.removeprefix(f"{HUB_OWNER}/")
    if name not in models:
        near = difflib.get_close_matches(name, models, n=3, cutoff=0.4) or list(models)[:3]
        raise ValueError(f"no released model is called {model_id!r}; near it are {', '.join(near)}")
    return models[name]


def recognise_released_model(source: str | Path) -> ReleasedModel | None:
    """The released model that a Hub id, a folder or a file is named after, or `None`.

    A file may also lie in a folder of that name, or in the Hub's cache. Lightning checkpoints (`.ckpt`) are never
    released models but somebody's own runs, wherever they lie.
    """
    path = Path(source)
    if path.suffix == ".ckpt":
        return None
    owned = f"models--{HUB_OWNER}--"
    cached = [part.removeprefix(owned) for part in path.parts if part.startswith(owned)]
    names = [path.name, path.name.partition(".")[0], path.parent.name, *cached]
    return next((model for name, model in released_models().items() if name in names), None)


REPOSITORY = "Sajjad-Sh33/ViT-P"
# Hidden size and blocks of the backbones, DINOv2's.
BACKBONES = {"base": (768, 12), "large": (1024, 24)}


@dataclass(frozen=True)
class ReleasedViTP:
    """One released checkpoint.

    Attributes:
        file: its name in the repository.
        labels: name of its label table.
        backbone: size of its DINOv2 backbone, a key of `BACKBONES`.
        image_size: height and width in pixels that an image is squashed to.
        num_prompts: points of an image that it was trained and is published with; answers depend on it.
        generator: whose masks it is published for.
        point_accuracy: percent of points classified rightly, as the file's name suggests; not verified.
    """

    file: str
    labels: str
    backbone: str
    image_size: tuple[int, int]
    num_prompts: int
    generator: str
    point_accuracy: float

    @property
    def label_table(self) -> LabelTable:
        """Its classes."""
        return label_table(self.labels)

    def disagreement(self, dimensions: dict[str, int]) -> str | None:
        """In what a checkpoint cannot be this model.

        Args:
            dimensions: `hidden_size`, `num_hidden_layers` and `num_labels` read from its tensors.

        Returns:
            The first that differs, with both values; `None` if none does.
        """
        hidden_size, depth = BACKBONES[self.backbone]
        published = {
            "hidden_size": hidden_size,
            "num_hidden_layers": depth,
            "num_labels": len(self.label_table.classes),
        }
        for name, value in published.items():
            if dimensions[name] != value:
                return f"{name} is {dimensions[name]} in the file and {value} in {self.file}"
        return None


@cache
def released_vit_p_models() -> dict[str, ReleasedViTP]:
    """All released models, by the name of their file without its ending."""
    text = resources.files("hf_segvit.conversion").joinpath("official_vit_p_models.json").read_text(encoding="utf-8")
    models = [
        ReleasedViTP(**{**entry, "image_size": tuple(entry["image_size"])}) for entry in json.loads(text)["models"]
    ]
    return {model.file.removesuffix(".pth"): model for model in models}


def released_vit_p(name: str) -> ReleasedViTP:
    """The released model of a file name, with or without its ending.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    models = released_vit_p_models()
    stem = name.removesuffix(".pth")
    if stem not in models:
        near = difflib.get_close_matches(stem, models, n=3, cutoff=0.4) or list(models)
        raise ValueError(f"no released ViT-P file is called {name!r}; near it are {', '.join(near)}")
    return models[stem]


def recognise_released_vit_p(source: str | Path) -> ReleasedViTP | None:
    """The released model that a file is named after, or `None`."""
    return released_vit_p_models().get(Path(source).stem)
