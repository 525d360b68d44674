"""Model cards: the metadata that the Hub indexes, and the text."""

import json
import runpy
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from hf_segvit.hub.model_card import complete_card, make_model_card, read_results
from hf_segvit.models.configuration_vit_p import ViTPConfig
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor

from .tiny_models import tiny_config

RESULTS = {
    "task": "panoptic",
    "dataset": "Generated scenes",
    "split": "test",
    "metrics": {"PQ": 51.25, "PQ things": 40},
}


def test_card_metadata_is_what_the_hub_indexes(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps([RESULTS]))
    processor = EoMTImageProcessor(size=64, stuff_classes=[3, 4])
    labels = {0: "cat", 1: "dog|wolf", 2: "<b>", 3: "sky", 4: "grass"}
    text = make_model_card(
        tiny_config(id2label=labels),
        processor,
        repo_id="tester/tiny",
        results=read_results(tmp_path / "results.json"),
        license="mit",
        base_model="tester/base",
        datasets=["tester/scenes"],
    )
    card = ModelCard(text)
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "image-segmentation", "mit")
    assert (data.base_model, data.datasets, data.model_name) == ("tester/base", ["tester/scenes"], "tiny")
    assert {"eomt", "panoptic-segmentation"} <= set(data.tags)
    found = {(r.dataset_name, r.dataset_split, r.metric_name, r.metric_value) for r in data.eval_results}
    assert found == {("Generated scenes", "test", "PQ", 51.25), ("Generated scenes", "test", "PQ things", 40)}
    assert all(r.task_type == "image-segmentation" for r in data.eval_results)
    for row in ("| 1 | dog\\|wolf | thing |", "| 2 | &lt;b> | thing |", "| 3 | sky | stuff |"):
        assert row in card.text
    assert "| Generated scenes | test | panoptic | PQ | 51.25 |" in card.text
    assert "$" not in card.text
    assert "<details>" not in card.text


def test_card_folds_long_label_tables_and_admits_what_is_unknown():
    config = tiny_config(id2label={index: f"class {index}" for index in range(31)})
    text = make_model_card(config, EoMTImageProcessor(size=64, task="semantic"))
    assert "<summary>All 31 labels</summary>" in text
    assert "| 30 | class 30 |\n" in text
    assert "thing" not in text.split("## Labels")[1].split("## Training data")[0]
    assert "not stated; ask the author" in text
    metadata = yaml.safe_load(text.split("---")[1])
    assert not {"license", "model-index", "datasets", "base_model"} & set(metadata)


def test_cards_of_the_repository_are_up_to_date():
    cards = Path(__file__).parents[1] / "model_cards"
    for name, card in runpy.run_path(str(cards / "make_cards.py"))["CARDS"].items():
        assert (cards / name).read_text() == card(), f"{name} is out of date; run python model_cards/make_cards.py"


def test_a_point_classifiers_card_says_what_goes_in_and_how_to_load_it():
    config = ViTPConfig(patch_size=14, image_size=56, id2label={0: "cat", 1: "grass"}, label2id={"cat": 0, "grass": 1})
    processor = ViTPImageProcessor(size={"height": 28, "width": 56}, patch_size=14)  # wider than the grid of weights
    card = make_model_card(config, processor, num_parameters=1_250_000)
    assert "| Input | 28 x 56 pixels, squashed |" in card
    assert "| Parameters | 1.2 million |" in card
    published = complete_card(card, "me/points", with_code=True)
    assert '("modeling_vit_p.ViTPForPointClassification", "me/points")' in published
    assert "post_process" not in card
    assert "Prompts do not see one another" in card
    assert "| 1 | grass |" in card
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "image-classification"
    without = complete_card(card, "me/points", with_code=False)
    assert "dynamic_module" not in without
    assert "## How to use" in without
    direct = make_model_card(config, processor, repo_id="me/points", with_code=False)
    assert "dynamic_module" not in direct
