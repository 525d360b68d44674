"""What `--explain` prints: every decision and every parameter; and what to change when memory runs out."""

import re

import pytest

from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.training.derivation import derive
from hf_segvit.training.explanation import explain, memory_advice
from hf_segvit.training.optimizers import freeze, parameter_groups
from hf_segvit.training.recipe import Recipe, load_recipe, packaged_recipes
from hf_segvit.training.results import Selection

from .tiny_models import tiny_eomt


def plan_for(model, **fields):
    return derive(Recipe(**{"epochs": 6, "backbone": "b", "image_size": 64, **fields}), 1600, config=model.config)


def test_decisions_are_told():
    model = tiny_eomt()
    text = explain(
        plan_for(model, data="coco:there", device_batch_size=4, warmup_steps=[20, 40]), model, EoMTImageProcessor()
    )
    for words in (
        "recipe: eomt, panoptic",
        "coco:there, 1,600 images",
        "64 x 64, augmentation eomt_coco_panoptic",
        "600 steps = 6 epochs of 100 steps",
        "16 = 1 x 4 x 4 (processes x accumulation x images on a device)",
        "adamw, learning rate 0.0001, gradients at most 0.01",
        "20 steps, then 40 for the backbone; then polynomial decay",
        "100 to 200, 400 to 500 (a query layer each)",
    ):
        assert words in text, words


def test_patience_that_cannot_end_the_training_is_told():
    """600 steps, scored every 100 or 50: annealing ends with step 500, which leaves 2 or 3 scores that count."""
    model = tiny_eomt()
    for patience, every, words in (
        (1, 0.5, "1: training stops after as many evaluations without a better score; 3 of the 12 evaluations count,"),
        (2, 0.5, "WARNING: 2 cannot stop this training early, as 3 of the 12 evaluations count, those after annealing"),
        (2, 0.5, "give at most 1, or a lower evaluate_every"),
        (10, 1, "WARNING: 10 cannot stop this training early, as 2 of the 6 evaluations count, those after annealing"),
        (10, 1, "; give a lower evaluate_every"),
    ):
        assert words in explain(plan_for(model, patience=patience, evaluate_every=every), model, EoMTImageProcessor())
    assert "patience" not in explain(plan_for(model), model, EoMTImageProcessor())
    without_masks = plan_for(model, patience=4, annealing=False, evaluate_every=1)
    assert "without a better score; 6 of the 6 evaluations count" in explain(without_masks, model, EoMTImageProcessor())


@pytest.mark.parametrize("name", packaged_recipes())
def test_the_patience_of_every_recipe_can_end_it(name):
    """With up to 1280 images, whose epochs are as short as the least distance of evaluations."""
    recipe = load_recipe(name)
    if recipe.patience is not None:
        for num_images in (20, 300, 1280):
            plan = derive(recipe, num_images)
            scores = Selection("pq", recipe.patience)
            for step in plan.evaluation_steps:
                masked = plan.annealing is not None and any(plan.annealing.probabilities(step))
                scores.add(step, {"pq": 0.5}, "masked" if masked else None)
                if scores.out_of_patience:
                    break
            assert scores.last_step < plan.total_steps
            assert plan.comparable_evaluations > recipe.patience + 1
    else:
        assert name not in ("own_panoptic", "own_instance", "own_semantic", "own_lora")


def test_every_parameter_stands_in_the_table_with_its_shape():
    model = tiny_eomt()
    plan = plan_for(model)
    text = explain(plan, model, EoMTImageProcessor())
    table = text[text.index("role") :]
    for name, parameter in model.named_parameters():
        shape = "x".join(map(str, parameter.shape))
        parts = name.split(".")
        candidates = [
            rf"{re.escape('.'.join(parts[:cut]))}: (.*, )?{re.escape('.'.join(parts[cut:]))} ?{shape}(,|$)"
            for cut in range(1, len(parts) + 1)
        ]
        assert any(re.search(candidate, table, re.MULTILINE) for candidate in candidates), name
    for group in parameter_groups(model, plan):
        count = sum(parameter.numel() for parameter in group["params"])
        assert re.search(rf"{group['role']} +{group['lr']:.4g} +0\.05 +{count:,}", table)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"{total:,} parameters in 5 groups are trained, 0 are frozen" in text


def test_frozen_parameters_are_counted():
    model = tiny_eomt()
    plan = plan_for(model, freeze="backbone")
    freeze(model, "backbone")
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    text = explain(plan, model, EoMTImageProcessor())
    assert f"in 1 groups are trained, {frozen:,} are frozen" in text
    assert "freeze=" not in text


def test_advice_starts_with_what_changes_nothing():
    recipe = Recipe(epochs=1, init="folder", batch_size=16, device_batch_size=6 - 2, image_size=640)
    advice = memory_advice(recipe, derive(recipe, 1600))
    assert [line.partition(":")[0] for line in advice] == [
        "device_batch_size=2",
        "gradient_checkpointing=true",
        "precision=bf16",
        "image_size=480",
        "freeze=until_layer",
        "the recipe own_lora",
    ]
    assert "in 8 parts a step" in advice[0]
    for line in advice[:4]:  # each is a setting that a recipe takes
        key, _, value = line.partition(":")[0].partition("=")
        recipe = recipe.changed(**{key: {"true": True}.get(value, int(value) if value.isdecimal() else value)})
    assert [line.partition("=")[0] for line in memory_advice(recipe, derive(recipe, 1600))][:1] == ["device_batch_size"]


def test_nothing_left_to_change():
    recipe = Recipe(
        epochs=1, batch_size=1, gradient_checkpointing=True, precision="bf16", image_size=[64, 96], freeze="backbone"
    )
    assert memory_advice(recipe, derive(recipe, 10)) == []


def test_vit_p_is_explained_too():
    recipe = Recipe(model="vit_p", task="points", steps=10, optimizer="sgd", image_size=[518, 1036])
    advice = memory_advice(recipe, derive(recipe, 10))
    assert any(line.startswith("image_size=[384,768]") for line in advice)
    assert not any("own_lora" in line for line in advice)
