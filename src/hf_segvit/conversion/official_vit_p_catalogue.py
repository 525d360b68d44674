"""The released ViT-P checkpoints, which all lie in one Hub repository: what their files do not say themselves."""

import difflib
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from ..data.label_tables import LabelTable, label_table

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
        image_size: height and width in pixels that a picture is squashed to.
        num_prompts: points of a picture that it was trained and is published with; answers depend on it.
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
