"""The models released by the authors of EoMT and ViT-P.

A released file holds only tensors. Task, label set, image size, the DINOv3 base of a delta, the number of points and
the published figures are in `official_models.json`.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ..data.label_tables import LabelTable, label_table
from ..lookup import suggestion

HUB_OWNER = "tue-mps"  # EoMT: a repository for each model
VIT_P_REPOSITORY = "Sajjad-Sh33/ViT-P"  # ViT-P: a file for each model

# Hidden size and blocks by backbone size, to check a file's tensors against.
_BACKBONES = {"small": (384, 12), "base": (768, 12), "large": (1024, 24), "giant": (1536, 40), "7b": (4096, 32)}


@dataclass(frozen=True)
class ReleasedModel:
    """One released checkpoint.

    Attributes:
        id: name of an EoMT's repository under `HUB_OWNER`, or of a ViT-P's file without its ending.
        task: `"panoptic"`, `"instance"` or `"semantic"`; `"points"` for a ViT-P.
        labels: name of its label table.
        image_size: side of its square input in pixels, or height and width; semantic models see an image in windows of
            this size, ViT-Ps squash the image to it.
        backbone: family and size of the ViT.
        metrics: published figure by metric, in percent: PQ, mIoU or mask AP; for a ViT-P the point accuracy that the
            file's name suggests, not verified.
        num_query_layers: blocks that see the queries.
        num_prompts: points per image in training and in the published results of a ViT-P; answers depend on it.
        generator: model whose masks a ViT-P is published for.
        base: Hub id of the backbone that a delta file is added to; `None` if the file is complete.
        gflops: multiply-adds per image in 10^9, all windows together, as published.
        fps: images per second on an H100, compiled, as published.
        pretrained_on: data set of an earlier training of the whole model.
        unsupported: why this model cannot be converted.
    """

    id: str
    task: str
    labels: str
    image_size: int | list[int]
    backbone: str
    metrics: dict[str, float] = field(default_factory=dict)
    num_queries: int | None = None
    num_query_layers: int | None = None
    num_prompts: int | None = None
    generator: str | None = None
    base: str | None = None
    gflops: float | None = None
    fps: float | None = None
    pretrained_on: str | None = None
    unsupported: str | None = None

    @property
    def repository(self) -> str:
        """Hub id of the repository."""
        return VIT_P_REPOSITORY if self.task == "points" else f"{HUB_OWNER}/{self.id}"

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

    @property
    def config_fields(self) -> dict[str, Any]:
        """Fields of an `EoMTConfig` of the same shape, for a model of random weights."""
        family, _, size = self.backbone.rpartition("_")
        if size == "7b":
            raise ValueError(f"{self.id}: the shape of its backbone {self.backbone} is not in the catalogue")
        hidden_size, depth = _BACKBONES[size]
        fields: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_hidden_layers": depth,
            "num_attention_heads": hidden_size // 64,
            "intermediate_size": 4 * hidden_size,
            "image_size": self.image_size,
            "num_queries": self.num_queries,
            "num_query_layers": self.num_query_layers,
            "num_labels": len(self.label_table.classes),
        }
        if size == "giant":
            fields |= {"mlp_type": "swiglu", "intermediate_size": 4096}
        if family == "dinov3":
            fields |= {"position_embedding_type": "rope", "key_bias": False, "layer_norm_eps": 1e-5}
        return fields

    def disagreement(self, dimensions: dict[str, int]) -> str | None:
        """The first of these config fields that shows a checkpoint not to be this model, or `None`."""
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


Architecture = Literal["eomt", "vit_p"]


@cache
def released_models(architecture: Architecture) -> dict[str, ReleasedModel]:
    """All released models of an architecture, by id."""
    text = resources.files(__package__).joinpath("official_models.json").read_text(encoding="utf-8")
    models = [ReleasedModel(**entry) for entry in json.loads(text)[architecture]["models"]]
    return {model.id: model for model in models}


def released_model(architecture: Architecture, name: str) -> ReleasedModel:
    """The released model of a name, with or without its owner or its file's ending."""
    models = released_models(architecture)
    model_id = name.removeprefix(f"{HUB_OWNER}/").removesuffix(".pth")
    if model_id not in models:
        raise ValueError(f"no released model is called {name!r}; {suggestion(model_id, models, 3)}")
    return models[model_id]


def recognise_released_model(architecture: Architecture, source: str | Path) -> ReleasedModel | None:
    """The released model that a Hub id, a folder or a file is named after, or `None`."""
    path = Path(source)
    # Lightning checkpoints are somebody's own runs, whatever they are called.
    if path.suffix == ".ckpt":
        return None
    # The name may be the file's, that of the folder around it, or the Hub cache's "models--OWNER--NAME".
    owned = f"models--{HUB_OWNER}--"
    cached = [part.removeprefix(owned) for part in path.parts if part.startswith(owned)]
    names = [path.name, path.name.partition(".")[0], path.parent.name, *cached]
    return next((model for name, model in released_models(architecture).items() if name in names), None)
