"""What `--explain` prints: every decision and every parameter; and what to change when memory runs out."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hf_segvit import (
    EoMTConfig,
    EoMTForUniversalSegmentation,
    EoMTImageProcessor,
    ViTPConfig,
    ViTPForPointClassification,
)
from hf_segvit.models.configuration_mask2former_vit import Mask2FormerViTConfig
from hf_segvit.models.modeling_mask2former_vit import Mask2FormerViTForUniversalSegmentation
from hf_segvit.training.declarations import PointOptions, option
from hf_segvit.training.derivation import derive
from hf_segvit.training.explanation import explain, field_table, memory_advice
from hf_segvit.training.optimizers import freeze, parameter_groups
from hf_segvit.training.recipe import FIELDS, Recipe, load_recipe, packaged_recipes
from hf_segvit.training.results import Selection
from hf_segvit.training.tasks import TrainingTask

from .tiny_models import tiny_eomt

SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "giant": (1536, 40, 24)}


@dataclass(frozen=True)
class DepthOptions:
    """Of depth."""

    max_depth: float = option(10.0, "metres", limits="> 0", resume="told")


class DepthTask(TrainingTask):
    """As much of a task as a recipe needs."""

    tasks = ("depth",)
    options = DepthOptions


DepthTask.__abstractmethods__ = frozenset()


def plan_for(model, **fields):
    return derive(Recipe(**{"epochs": 6, "backbone": "b", "image_size": 64, **fields}), 1600, config=model.config)


def test_one_epoch_has_no_plural():
    model = tiny_eomt()
    text = explain(plan_for(model, epochs=1, data="coco:there"), model, EoMTImageProcessor())
    assert "100 steps = 1 epoch of 100 steps" in text


def test_decisions_are_told():
    model = tiny_eomt()
    text = explain(
        plan_for(model, data="coco:there", device_batch_size=4, warmup_steps=[20, 40]),
        model,
        EoMTImageProcessor(),
        full=True,
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
        (1, 0.5, "1: training stops after this many evaluations without a better score; 3 of the 12 evaluations"),
        (2, 0.5, "WARNING: 2 cannot stop this run early, as 3 of the 12 evaluations count, those after annealing"),
        (2, 0.5, "give at most 1, or a lower evaluate_every"),
        (10, 1, "WARNING: 10 cannot stop this run early, as 2 of the 6 evaluations count, those after annealing"),
        (10, 1, "; give a lower evaluate_every"),
    ):
        assert words in explain(
            plan_for(model, patience=patience, evaluate_every=every), model, EoMTImageProcessor(), full=True
        )
    assert "patience" not in explain(plan_for(model), model, EoMTImageProcessor())
    without_masks = plan_for(model, patience=4, annealing=False, evaluate_every=1)
    assert "without a better score; 6 of the 6 evaluations count" in explain(
        without_masks, model, EoMTImageProcessor(), full=True
    )


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
    text = explain(plan, model, EoMTImageProcessor(), full=True)
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
    text = explain(plan, model, EoMTImageProcessor(), full=True)
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


def published_model(recipe):
    """The model of a packaged recipe in its size, without memory for its weights."""
    name = next((size for size in SIZES if size in f"{recipe.name} {recipe.init} {recipe.backbone}"), "base")
    width, depth, heads = SIZES[name]
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": width}
    config_class, model_class = {
        "eomt": (EoMTConfig, EoMTForUniversalSegmentation),
        "mask2former_vit": (Mask2FormerViTConfig, Mask2FormerViTForUniversalSegmentation),
        "vit_p": (ViTPConfig, ViTPForPointClassification),
    }[recipe.model]
    with torch.device("meta"):
        return model_class(config_class(**{**sizes, "image_size": recipe.image_size, **recipe.model_config}))


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_packaged_recipe_is_explained_on_one_screen(name):
    recipe = load_recipe(name)
    model = published_model(recipe)
    lines = explain(derive(recipe, 20_000, config=model.config), model, EoMTImageProcessor()).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    rows = dict(re.match(r"(.{16})(.*)", line).groups() for line in lines[:12] if len(line) > 16)
    depth, count = model.config.num_hidden_layers, sum(parameter.numel() for parameter in model.parameters())
    assert rows[f"{'model':<16}"].startswith(f"{depth} blocks, ")
    assert f"width {model.config.hidden_size}, " in rows[f"{'model':<16}"]
    assert rows[f"{'model':<16}"].endswith(f"{count:,} parameters")
    assert f"blocks 0 to {depth - 1}" in "\n".join(lines)


def test_groups_of_one_role_and_decay_are_one_row():
    model = tiny_eomt()
    plan = plan_for(model, weight_decay_mode="matrices", layer_decay=0.5)
    groups = parameter_groups(model, plan)
    table = explain(plan, model, EoMTImageProcessor()).partition("role ")[2]
    for role, decay in {(group["role"], group["weight_decay"]) for group in groups}:
        same = [group for group in groups if (group["role"], group["weight_decay"]) == (role, decay)]
        rates = sorted({f"{group['lr']:.4g}" for group in same}, key=float)
        count = sum(parameter.numel() for group in same for parameter in group["params"])
        rate = rates[0] if len(rates) == 1 else f"{rates[0]} to {rates[-1]}"
        assert re.search(rf"^{role} +{re.escape(rate)} +{decay:.3g} +{count:,} ", table, re.MULTILINE)
    assert "embeddings, blocks 0 to " in table
    assert "query, mask_head" in table


def test_what_becomes_of_the_masks_is_said():
    model = tiny_eomt()
    assert "the masks of the 2 query layers fade one after the other, from step 100 to 500" in explain(
        plan_for(model), model, EoMTImageProcessor()
    )
    assert "false: attention stays masked, also at inference" in explain(
        plan_for(model, annealing=False), model, EoMTImageProcessor()
    )
    model.set_masked_attention_probabilities(0.0)  # as in a checkpoint whose training annealed them
    assert "nothing is masked, in training and at inference" in explain(
        plan_for(model, annealing=False), model, EoMTImageProcessor()
    )


class TestFieldTable:
    def test_every_field_has_a_row_with_its_declaration(self):
        recipe = load_recipe("own_points", ["points.source=box", "seed=7"])
        table = field_table(recipe)
        assert max(map(len, table.splitlines())) <= 120
        for name in [*FIELDS, *(f"points.{name}" for name in PointOptions.__dataclass_fields__)]:
            assert re.search(rf"^{re.escape(name)}  ", table, re.MULTILINE), name
        for row in (
            r"seed +7 \(0\) +whole number >= 0 +no +seed of all random",
            r"learning_rate +null +number > 0, <= 1000 +told +peak learning rate",
            r"optimizer +sgd \(adamw\) +adamw, sgd +no ",
            r"keep_last +2 +whole number > 0, <= +yes ",
            r"criterion +null +module:Class +no ",
            r"points\.source +box \(mask\) +mask, coarse, box +no ",
            r"points\.num_points +200 ",
        ):
            assert re.search(rf"^{row}", table, re.MULTILINE), row
        assert "\neomt: not for model=vit_p\n" in table
        assert "\nvit_p: Fields of ViT-P only.\n" in table

    def test_options_of_a_task_of_ones_own_are_listed(self):
        table = field_table(Recipe(model=f"{__name__}:DepthTask", options={"max_depth": 80}))
        assert re.search(r"^options\.max_depth +80\.0 \(10\.0\) +number > 0 +told +metres", table, re.MULTILINE)
        assert "\neomt: not for model=" in table

    def test_it_needs_no_pytorch(self):
        """Under a stand-in for the package itself, which imports the models where it is not lazy."""
        package = Path(sys.modules["hf_segvit"].__file__).parent
        script = (
            "import sys, types; package = types.ModuleType('hf_segvit'); "
            f"package.__path__ = [{str(package)!r}]; sys.modules['hf_segvit'] = package\n"
            "from hf_segvit.training.explanation import field_table\n"
            "from hf_segvit.training.recipe import load_recipe, packaged_recipes\n"
            "assert field_table(load_recipe(packaged_recipes()[0])) and 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", script], check=True)
