"""Write the cards in this folder anew: `python model_cards/make_cards.py`.

`recipe_card` writes one from the recipe file alone: its fields, and the head comment with command, hardware, time and
published score (`recipe_head`). A recipe is no model: the cards say that there are no weights from it, whose the scores
are, and which licences of data and starting weights the result depends on. The card of a trained model is another one,
which training writes beside the weights, see hf_segvit/hub/model_card.py.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

from hf_segvit.hub.model_card import POINT_USAGE, TASK_SENTENCES, make_model_card, rows
from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.published_labels import published_label_sets
from hf_segvit.training.derivation import augmentation_name, derived_learning_rate, image_size, model_fields
from hf_segvit.training.recipe import Recipe, find_recipe, load_recipe, packaged_recipes

_MARK = "<!-- Generated from the recipe by model_cards/make_cards.py: change the recipe, not this file. -->"
_FIELDS = ("Command", "Hardware", "Time", "Score")

# As their publishers state them; by format of the data.
_DATA_LICENCES = {
    "coco": "COCO: annotations CC BY 4.0; the images belong to their Flickr authors, under terms of their own.",
    "coco_stuff": (
        "COCO-Stuff: annotations CC BY 4.0; the images belong to their Flickr authors, under terms of their own."
    ),
    "ade20k": "ADE20K: images for non-commercial research and education, by its terms of use.",
    "cityscapes": "Cityscapes: after registration, for non-commercial purposes such as research and teaching.",
}
# By the beginning of the source's name.
_WEIGHT_LICENCES = {
    "timm/vit_": "DINOv2 weights: Apache-2.0.",
    "facebook/dinov3": "DINOv3 weights: DINOv3 License, gated on the Hub; it covers what is trained from them, too.",
    "tue-mps/": "Weights of the EoMT paper's authors: MIT; their backbone is DINOv2, Apache-2.0.",
}
_LIMITS = {
    "eomt": """- It will know the classes of its training data and no others; what else is in an image is left out or
  called by the nearest known name.
- Masks are predicted on a grid coarser than the image; parts of only a few pixels are lost.
- Images unlike the training data are segmented worse. Score the model on images of the kind you need it for
  (`hf-segvit evaluate`) before you rely on it.""",
    "vit_p": """- It will know the classes of its training data and no others, and names every point, also one on
  something else.
- It draws no masks: published scores are of a generator's masks with its names, so they depend on the generator.
- Images unlike the training data are named worse. Score the model on images of the kind you need it for
  (`hf-segvit evaluate --task points`) before you rely on it.""",
}
_LIMITS["mask2former_vit"] = _LIMITS["eomt"]
_LOADING = {
    "eomt": """from transformers import pipeline

import hf_segvit

segment = pipeline("image-segmentation", model="$source")
segments = segment("photo.jpg")""",
    "vit_p": POINT_USAGE,
}
_LOADING["mask2former_vit"] = _LOADING["eomt"]
_PAPERS = {
    "eomt": 'Kerssies et al., "Your ViT is Secretly an Image Segmentation Model", CVPR 2025, arXiv 2503.19108.',
    "mask2former_vit": (
        'A row of Table 1 of Kerssies et al., "Your ViT is Secretly an Image Segmentation Model", CVPR 2025, arXiv '
        "2503.19108. Mask2Former: arXiv 2112.01527; ViT-Adapter: arXiv 2205.08534."
    ),
    "vit_p": "ViT-P, CVPR 2026; https://github.com/sajjad-sh33/ViT-P.",
}


def recipe_card(name: str) -> str:
    """The card of a packaged recipe.

    Args:
        name: of the recipe.

    Returns:
        The text of a Markdown file.

    Raises:
        ValueError: there is no such recipe, or its head comment lacks a field.
    """
    recipe, head = load_recipe(name), recipe_head(find_recipe(name))
    facts = rows(_facts(recipe, head).items())
    remarks = f"\n{head['Remarks']}\n" if head["Remarks"] else ""
    licences = "\n".join(f"- {line}" for line in _licences(recipe))
    loading = Template(_LOADING[recipe.model]).substitute(source=f"runs/{recipe.name}/model")
    return f"""# {head["Title"]}

{_MARK}

The card of a recipe, `{name}`, not of a model: no weights come with it.

{TASK_SENTENCES[recipe.task]}

| | |
|---|---|
{facts}
{remarks}
## Train

```bash
{head["Command"]}
```

With `hf-segvit train {name} --explain` nothing is trained but explained: what follows from the recipe, with learning
rate and weight decay of every parameter. Any value can be changed with `key=value`.

## Scores

{_scores(head["Score"])}

## Use the result

Training leaves the model in `runs/{recipe.name}/model`, with a card of its own and the scores of that very training.

```python
{loading}
```

## Licences

The code and this recipe: Apache-2.0. Weights that you train depend on what they are trained on and from:

{licences}

These notes are no legal advice; the terms of the publishers count.

## Limits

{_LIMITS[recipe.model]}

## Source

{_PAPERS[recipe.model]}
"""


def recipe_head(path: Path) -> dict[str, str]:
    """What the comment on top of a recipe says.

    Returns:
        `Title`, `Command` (as shell lines), `Hardware`, `Time`, `Score`, and `Remarks`, which may be empty.

    Raises:
        ValueError: one of them is not there.
    """
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].rstrip())
    head: dict[str, list[str]] = {"Title": [], "Remarks": []}
    key = "Title"
    for line in lines:
        stated = re.match(rf" ({'|'.join(_FIELDS)}):\s+(.*)", line)
        if stated:
            key = stated[1]
            head[key] = [stated[2]]
        elif line.startswith("     "):
            head[key].append(line.strip())
        else:
            key = "Title" if key == "Title" else "Remarks"
            head[key].append(line.strip())
    missing = [name for name in _FIELDS if name not in head]
    if missing or not head["Title"]:
        raise ValueError(f"{path}: the comment on top lacks {', '.join(missing) or 'a title'}; see the other recipes")
    command = [line for line in head.pop("Command") if not line.startswith("(")]
    return {name: " ".join(text).rstrip(".") if name == "Title" else " ".join(text) for name, text in head.items()} | {
        "Command": "\n    ".join(_without_remark(command))
    }


def _without_remark(lines: list[str]) -> list[str]:
    """The lines of a command up to the one that does not go on."""
    for number, line in enumerate(lines):
        if not line.endswith("\\"):
            return lines[: number + 1]
    return lines


def _facts(recipe: Recipe, head: dict[str, str]) -> dict[str, str]:
    height, width = image_size(recipe)
    fields: dict[str, Any] = model_fields(recipe)
    queries = [f"{fields[key]} {text}" for key, text in _QUERIES if key in fields]
    decay = "" if recipe.layer_decay == 1 else f", times {recipe.layer_decay:g} for each block further down"
    facts = {
        "Model": _NAMES[recipe.model],
        "Task": recipe.task,
        "Starts from": f"`{recipe.init or recipe.backbone}`" if recipe.init or recipe.backbone else "random weights",
        "Data": "your own" if _own(recipe) else f"`{(recipe.data or '').partition(':')[0]}`",
        "Images": f"{height} x {width} pixels, augmentation `{augmentation_name(recipe)}`",
        "Queries": ", ".join(queries) or ("those of the checkpoint" if recipe.model != "vit_p" else ""),
        "Points an image": str(recipe.points.get("num_points", "")),
        "Length": f"{recipe.epochs:g} epochs" if recipe.epochs is not None else f"{recipe.steps:,} steps",
        "Batch": f"{recipe.batch_size} images",
        "Optimiser": (
            f"{ {'adamw': 'AdamW', 'sgd': 'SGD'}[recipe.optimizer] }, learning rate "
            f"{derived_learning_rate(recipe):.3g}{decay}, {recipe.schedule} schedule, weight decay "
            f"{recipe.weight_decay:g}"
        ),
        "Masked attention": _annealing(recipe),
        "Adapters": "" if recipe.lora is None else f"low-rank (LoRA), rank {recipe.lora.get('rank')}",
        "Precision": {"no": "float32"}.get(recipe.precision, recipe.precision),
        "Hardware": head["Hardware"],
        "Time": head["Time"],
    }
    return {key: value for key, value in facts.items() if value}


_NAMES = {"eomt": "EoMT", "mask2former_vit": "Mask2Former on a plain ViT", "vit_p": "ViT-P"}
_QUERIES = (("num_queries", "queries"), ("num_query_layers", "query layers"))


def _annealing(recipe: Recipe) -> str:
    if recipe.model == "vit_p":
        return ""
    if recipe.annealing is False:
        return "as the configuration has it, not annealed"
    return "annealed in phases that the recipe states" if recipe.annealing else "annealed by the paper's rule"


def _scores(text: str) -> str:
    if text.startswith("measured"):
        return f"{text[0].upper()}{text[1:]}\n\nMeasured with this package; your data decides about yours."
    if not re.search(r"\d", text) or text.startswith("your data"):
        return (
            f"None yet: {text}" if not text.startswith("not published") else "None published, and none measured here."
        )
    return (
        f"{text}.\n\nThese are the figures of the paper's authors, who trained with their own code.\n"
        "This recipe follows their settings; what it reaches with this package has not been measured."
    )


def _own(recipe: Recipe) -> bool:
    return (recipe.data or "").endswith(":data/own")


def _licences(recipe: Recipe) -> list[str]:
    form, source = (recipe.data or "").partition(":")[0], recipe.init or recipe.backbone or ""
    lines = ["Your data: whatever its terms are."] if _own(recipe) else [_DATA_LICENCES[form]]
    lines += [text for start, text in _WEIGHT_LICENCES.items() if source.startswith(start)]
    if not source:
        lines.append("No weights of others: training starts from random ones.")
    if recipe.init is not None:  # a model that learned from data of its own
        before = source.rpartition("/")[2].partition("_")[0]
        lines += [text for name, text in _DATA_LICENCES.items() if name == before and text not in lines]
    return lines


def example_card() -> str:
    """The card of EoMT-L for COCO panoptic segmentation at 640 pixels, with the figure that its authors published."""
    coco = next(labels for labels in published_label_sets() if labels.name == "COCO panoptic")
    return make_model_card(
        EoMTConfig(id2label=dict(enumerate(coco.labels)), masked_attention_probabilities=[0.0] * 4),
        EoMTImageProcessor(size=640, stuff_classes=list(coco.stuff_classes)),
        results=[{"task": "panoptic", "dataset": "COCO", "split": "val2017", "metrics": {"PQ": 56.0}}],
        training_data="COCO 2017, panoptic annotations of train2017 (118,287 images).",
        base_model="timm/vit_large_patch14_reg4_dinov2.lvd142m",
    )


CARDS = {"example.md": example_card} | {f"{name}.md": partial(recipe_card, name) for name in packaged_recipes()}

if __name__ == "__main__":
    for name, card in CARDS.items():
        Path(__file__).with_name(name).write_text(card(), encoding="utf-8")
