"""The model card of a point classifier (ViT-P); that of segmentation models is in model_card.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from .model_card import GENERATED_MARK, REPOSITORY_PLACEHOLDER, check_result, point_remote_code

_TEXT = """# {title}

A point classifier (ViT-P, CVPR 2026): a plain Vision Transformer that says what is at a point or in a box of a picture.

| | |
|---|---|
{facts}

## How to use

With `hf_segvit` installed (see its README):

```python
import torch
from hf_segvit import ViTPForPointClassification, ViTPImageProcessor
from PIL import Image

processor = ViTPImageProcessor.from_pretrained("{repo_id}")
model = ViTPForPointClassification.from_pretrained("{repo_id}").eval()

inputs = processor(Image.open("photo.jpg"), input_points=[[[320, 240]]], return_tensors="pt")
with torch.inference_mode():
    logits = model(pixel_values=inputs["pixel_values"], prompts=inputs["prompts"]).logits
print(model.config.id2label[int(logits[0, 0].argmax())])
```
{remote_code}
## Labels

{labels}

## Training data

{training_data}

## Results

{results}

## Intended use and limits

Meant for naming the parts of photographs like those it was trained on, such as the masks of a segmentation model. It
knows no other classes, and names every point, also one on something else. {attention}

## Licence

Weights: {license}. The code of hf-segvit, which loads them: Apache-2.0.
"""
_ATTENTION = {
    "joint": "Prompts see one another: the answer to one may change with the others that are asked.",
    "isolated": "Prompts do not see one another: each is answered as if it were the only one.",
}


def make_point_model_card(
    config: Any,
    processor: Any,
    *,
    repo_id: str = REPOSITORY_PLACEHOLDER,
    num_parameters: int | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    training_data: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    with_code: bool = True,
) -> str:
    """Write the model card of a `ViTPForPointClassification`; see `make_model_card` for the arguments.

    Returns:
        The text of README.md.

    Raises:
        ValueError: a result lacks a field or a metric is not a finite number.
    """
    for result in results:
        check_result(result, "results")
    title = repo_id.split("/")[-1] if repo_id != REPOSITORY_PLACEHOLDER else "ViT-P, point classification"
    height, width = processor.size["height"], processor.size["width"]
    facts = {
        "Classes": str(len(config.id2label)),
        "Input": f"{height} x {width} pixels, squashed",
        "Backbone": (
            f"plain ViT, {config.num_hidden_layers} blocks of width {config.hidden_size}, patches of "
            f"{config.patch_size} pixels"
        ),
        "Prompts": f"points and boxes, {config.prompt_attention}",
        **({} if num_parameters is None else {"Parameters": f"{num_parameters / 1e6:.1f} million"}),
    }
    metadata = ModelCardData(
        model_name=title,
        library_name="transformers",
        pipeline_tag="image-classification",
        license=license,
        base_model=base_model,
        tags=["vit-p", "hf-segvit", "vision-transformer", "point-classification"],
    )
    text = _TEXT.format(
        title=title,
        facts=_rows(facts.items()),
        repo_id=repo_id,
        remote_code=point_remote_code(repo_id) if with_code else "",
        labels=", ".join(f"{index} {' '.join(str(name).split())}" for index, name in sorted(config.id2label.items())),
        training_data=training_data or "Not stated.",
        results=_result_table(results),
        attention=_ATTENTION[config.prompt_attention],
        license=license or "not stated; ask the author before using them",
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{GENERATED_MARK}\n\n{text}"


def _result_table(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return "Not evaluated, or not stated."
    rows = [
        (result["dataset"], result["split"], name, f"{value:g}")
        for result in results
        for name, value in result["metrics"].items()
    ]
    return "\n".join(["| data set | split | metric | value |", "|---|---|---|---|", _rows(rows)])


def _rows(rows: Any) -> str:
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
