"""Training of Mask2Former on a plain ViT: recipes of the ladder, starts, groups of rates, annealing, evaluation."""

import json

import pytest
import torch

from hf_segvit.cli import main
from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.models.configuration_mask2former_vit import REMOVABLE_PARTS, Mask2FormerViTConfig
from hf_segvit.models.configuration_plain_vit import PlainViTConfig
from hf_segvit.models.modeling_mask2former_vit import Mask2FormerViTForUniversalSegmentation
from hf_segvit.models.modeling_plain_vit import PlainViTModel
from hf_segvit.training.annealing import MaskAnnealing
from hf_segvit.training.declarations import DECLARATIONS
from hf_segvit.training.derivation import derive
from hf_segvit.training.loop import train
from hf_segvit.training.optimizers import BACKBONE, REST, parameter_groups
from hf_segvit.training.recipe import Recipe, flat, load_recipe
from hf_segvit.training.tasks.mask2former_vit import Mask2FormerViTTask

from .tiny_models import tiny_mask2former_vit, tiny_mask2former_vit_config
from .tiny_training import tiny_recipe

MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_queries": 7,
    "train_num_points": 32,
    "decoder_hidden_size": 32,
    "num_decoder_layers": 3,
    "num_decoder_attention_heads": 4,
    "decoder_intermediate_size": 48,
    "num_pixel_decoder_layers": 1,
    "pixel_decoder_intermediate_size": 40,
    "adapter_stem_channels": 8,
}


def ladder_recipe(output, removed="nothing", **changes) -> Recipe:
    """A tiny recipe for a row of the ladder; `model_config` changes single fields."""
    config = {**MODEL, "removed": removed, **changes.pop("model_config", {})}
    return tiny_recipe(output, **{"model": "mask2former_vit", "model_config": config, "steps": 3, **changes})


def quiet_train(recipe: Recipe):
    return train(recipe, cpu=True, progress=False)


def test_the_task_declares_what_recipes_may_say():
    assert Mask2FormerViTTask.options is DECLARATIONS["mask2former_vit"].options
    with pytest.raises(ValueError, match="decay_query_layers=False is for model=eomt, not for mask2former_vit"):
        Recipe(model="mask2former_vit", decay_query_layers=False)


@pytest.mark.parametrize("row", range(6))
def test_rows_of_the_ladder_follow_the_recipe_of_the_paper(row):
    recipe, released = load_recipe(f"ladder_{row}_large_640"), load_recipe("coco_panoptic_large_640")
    different = {name for name, value in flat(recipe).items() if value != flat(released)[name]}
    assert (
        different
        == {
            **{other: {"name", "model", "model_config", "annealing"} for other in range(4)},
            4: {"name", "annealing"},
            5: {"name"},
        }[row]
    )
    plan = derive(recipe, 118287, world_size=4)
    assert (plan.total_steps, plan.warmup_steps, plan.learning_rate) == (88716, (500, 1000), 1e-4)
    assert (plan.annealing is None) is (row < 5)  # masked to the end, but for EoMT itself
    if row < 4:
        fields = recipe.model_config | {"image_size": 64, "hidden_size": 64, "num_hidden_layers": 4}
        config = Mask2FormerViTConfig(**fields, num_attention_heads=2, intermediate_size=8)
        assert config.removed == REMOVABLE_PARTS[row]
        assert (config.num_queries, config.num_decoder_layers) == (200, 9)


def test_the_annealed_row_fades_layer_by_layer():
    plan = derive(load_recipe("ladder_0_large_640_annealed"), 118287)
    assert plan.annealing == MaskAnnealing.by_rule(plan.total_steps, 9)
    assert flat(load_recipe("ladder_0_large_640_annealed")) == flat(load_recipe("ladder_0_large_640")) | {
        "name": "ladder_0_large_640_annealed",
        "annealing": None,
    }


@pytest.mark.parametrize("removed", REMOVABLE_PARTS)
def test_rates_decay_over_the_blocks_of_the_vit_alone(removed):
    model = tiny_mask2former_vit(removed)
    plan = derive(load_recipe("ladder_0_large_640"), 118287, config=model.config)
    rates, roles = {}, {}
    for group in parameter_groups(model, plan):
        for name in group["names"]:
            rates[name], roles[name] = group["lr"], group["role"]
    assert rates.keys() == dict(model.named_parameters()).keys()
    for name, rate in rates.items():
        if name.startswith("mask2former.layers."):
            expected = 1e-4 * 0.8 ** (3 - int(name.split(".")[2]))
        elif name.startswith("mask2former.embeddings."):
            expected = rates["mask2former.layers.0.norm1.weight"]
        else:
            expected = 1e-4
        assert rate == pytest.approx(expected), name
        inside = name.startswith(("mask2former.layers.", "mask2former.embeddings.", "mask2former.layernorm."))
        assert roles[name] == (BACKBONE if inside else REST), name


@pytest.mark.parametrize("removed", REMOVABLE_PARTS)
def test_rows_are_trained_annealed_and_scored(removed, tmp_path, capsys):
    result = quiet_train(ladder_recipe(tmp_path, removed))
    assert result.step == 3
    model = Mask2FormerViTForUniversalSegmentation.from_pretrained(tmp_path / "model")
    assert model.config.removed == removed
    assert model.config.masked_attention_probabilities == [0.0] * 3
    assert model.config.id2label == GeneratedScenes(1).id2label
    records = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    seen = [record["annealing/decoder layer 1"] for record in records if "annealing/decoder layer 1" in record]
    assert seen[0] == 1.0
    if removed == "multi_scale":
        words = ["evaluate", "--model", str(tmp_path / "model"), "--data", "generated:easy?num_scenes=2&size=64"]
        assert main([*words, "--split", "val", "--device", "cpu", "--output", str(tmp_path / "scores")]) == 0
        assert "pq_things" in capsys.readouterr().out


@pytest.mark.slow
def test_training_starts_from_a_backbone_and_goes_on_from_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    config = tiny_mask2former_vit_config()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
    backbone = PlainViTModel(PlainViTConfig(**{name: getattr(config, name) for name in names}))
    backbone.save_pretrained(tmp_path / "backbone")
    heads = {name: value for name, value in MODEL.items() if name not in names}
    recipe = ladder_recipe(tmp_path / "first", backbone=str(tmp_path / "backbone"), learning_rate=1e-9, annealing=False)
    recipe = recipe.changed(model_config={**heads, "removed": "adapter"})
    quiet_train(recipe)
    trained = Mask2FormerViTForUniversalSegmentation.from_pretrained(tmp_path / "first" / "model")
    assert trained.config.masked_attention_probabilities == [1.0] * 3
    for name, value in backbone.layers.state_dict().items():
        torch.testing.assert_close(trained.mask2former.layers.state_dict()[name], value, atol=1e-6, rtol=0)

    second = ladder_recipe(tmp_path / "second", init=str(tmp_path / "first" / "model"), learning_rate=1e-9)
    quiet_train(second.changed(model_config={}))
    again = Mask2FormerViTForUniversalSegmentation.from_pretrained(tmp_path / "second" / "model")
    assert again.config.removed == "adapter"
    assert again.config.masked_attention_probabilities == [0.0] * 3
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-6, rtol=0)


def test_what_does_not_fit_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="annealing has 2 phases, and the model 3 decoder layers"):
        quiet_train(ladder_recipe(tmp_path / "a", annealing=[[0, 1], [0, 1]]))
    for model in ("mask2former_vit", "eomt"):
        recipe = Recipe(model=model, steps=9, annealing=[[0, 1]], model_config={"masked_attention": False})
        with pytest.raises(ValueError, match=r"annealing=\[\[0, 1\]\] and model_config\.masked_attention=false"):
            derive(recipe, 100)
    with pytest.raises(ValueError, match="num_hidden_layers=3: the adapter interacts with 4 groups of blocks"):
        quiet_train(ladder_recipe(tmp_path / "b", model_config={"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="removed='decoder' is not one of"):
        quiet_train(ladder_recipe(tmp_path / "c", "decoder"))
    with pytest.raises(ValueError, match="model_config has no field 'num_query_layers'"):
        quiet_train(ladder_recipe(tmp_path / "d", model_config={"num_query_layers": 2}))


def test_never_masked_rows_have_one_prediction_and_no_phases(tmp_path):
    quiet_train(ladder_recipe(tmp_path, "adapter", model_config={"masked_attention": False}))
    records = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    names = {name for record in records for name in record}
    assert {name for name in names if name.startswith("mask loss")} == {"mask loss/prediction 1"}
    assert not any("annealing" in name for name in names)
