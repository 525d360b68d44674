"""Cards of the packaged recipes: what they say is the recipe's, and nothing claims that there are weights."""

import re
import runpy
from pathlib import Path

import pytest

from hf_segvit.training.recipe import find_recipe, packaged_recipes

CARDS = Path(__file__).parents[1] / "model_cards"
_SCRIPT = runpy.run_path(str(CARDS / "make_cards.py"))
recipe_card, recipe_head = _SCRIPT["recipe_card"], _SCRIPT["recipe_head"]


@pytest.mark.parametrize("name", packaged_recipes())
def test_the_card_is_honest_and_up_to_date(name):
    card = recipe_card(name)
    written = CARDS / f"{name}.md"
    assert written.is_file(), f"there is no card of {name}; run python model_cards/make_cards.py"
    assert written.read_text(encoding="utf-8") == card, "out of date; run python model_cards/make_cards.py"
    assert "no weights come with it" in card
    scores = card.split("## Scores\n\n")[1].split("\n\n## ")[0]
    if scores.startswith("Measured"):
        assert "Measured with this package" in scores
    elif any(letter.isdigit() for letter in scores):
        assert re.search(r"the (EoMT repository|EoMT paper|ViT-P repository)", scores), "whose figures they are"
        assert "the figures of the paper's authors" in scores
        assert "has not been measured" in scores
    else:
        assert scores.startswith("None ")
    command = card.split("```bash\n")[1].split("\n```")[0]
    assert name in command
    assert "data=" in command
    licences = card.split("## Licences")[1].split("## Limits")[0]
    assert licences.count("\n- ") >= 2, "of the data, and of the weights that it starts from"


def test_cards_are_of_recipes_that_there_are():
    assert {path.stem for path in CARDS.glob("*.md")} == {*packaged_recipes(), "README", "example"}


def test_values_come_from_the_recipe():
    card = recipe_card("dinov3_coco_panoptic_small_640_2x")
    for text in (
        "# EoMT-S on COCO panoptic, 640 x 640, DINOv3, twice the schedule\n",
        "| Starts from | `facebook/dinov3-vits16-pretrain-lvd1689m` |",
        "| Queries | 200 queries, 3 query layers |",
        "| Length | 24 epochs |",
        "learning rate 0.0002, times 0.8 for each block further down, polynomial schedule, weight decay 0.05 |",
        "| Masked attention | annealed in phases that the recipe states |",
        "PQ 47.2 on val2017 (official weights, the EoMT repository).",
        "- DINOv3 weights: DINOv3 License, gated on the Hub",
        "- COCO: annotations CC BY 4.0",
        "    dinov3_coco_panoptic_small_640_2x data=coco:/path/to/coco\n```",
    ):
        assert text in card


def test_data_that_the_starting_weights_learned_from_is_named():
    licences = recipe_card("own_lora").split("## Licences")[1]
    assert "- Your data" in licences
    assert "- COCO: annotations" in licences
    assert "EoMT paper's authors: MIT" in licences
    ade = recipe_card("ade20k_panoptic_large_640").split("## Licences")[1]
    assert "- ADE20K" in ade
    assert "- COCO: " in ade


def test_a_head_comment_that_lacks_something_is_refused(tmp_path):
    path = tmp_path / "new.yaml"
    text = find_recipe("own_panoptic").read_text()
    path.write_text(text.replace("# Hardware:", "# Machines:"))
    with pytest.raises(ValueError, match=r"new.yaml: the comment on top lacks Hardware"):
        recipe_head(path)
