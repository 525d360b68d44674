"""Write the cards in this folder anew: `python model_cards/make_cards.py`."""

from functools import partial
from pathlib import Path

from hf_segvit.hub.model_card import make_model_card
from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.published_labels import published_label_sets
from hf_segvit.training.recipe import packaged_recipes
from hf_segvit.training.recipe_cards import recipe_card


def example_card() -> str:
    """The card of EoMT-L for COCO panoptic segmentation at 640 pixels, with the figure that its authors published."""
    coco = next(labels for labels in published_label_sets() if labels.name == "COCO panoptic")
    return make_model_card(
        EoMTConfig(id2label=dict(enumerate(coco.labels)), masked_attention_probabilities=[0.0] * 4),
        EoMTImageProcessor(size=640, stuff_classes=list(coco.stuff_classes)),
        results=[{"task": "panoptic", "dataset": "COCO", "split": "val2017", "metrics": {"PQ": 56.0}}],
        training_data="COCO 2017, panoptic annotations of train2017 (118,287 pictures).",
        base_model="timm/vit_large_patch14_reg4_dinov2.lvd142m",
    )


CARDS = {"example.md": example_card} | {f"{name}.md": partial(recipe_card, name) for name in packaged_recipes()}

if __name__ == "__main__":
    for name, card in CARDS.items():
        Path(__file__).with_name(name).write_text(card(), encoding="utf-8")
