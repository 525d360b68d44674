"""The packaged recipes against the tables of the official configurations (tue-mps/eomt at 7bd19dd, sections of YAML).

Each row has the annealing steps that the official files state. They were rounded by hand from the number of steps, so
one step of tolerance is for that (three in ADE20K, whose phases are multiples of 6520 where T / 6 is 6520.3).
"""

import re
from pathlib import Path

import pytest
import torch
import yaml

from hf_segvit.data.augmentation import AUGMENTATIONS
from hf_segvit.data.reading import FORMATS
from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation
from hf_segvit.training.derivation import augmentation_name, derive, model_fields
from hf_segvit.training.optimizers import parameter_groups
from hf_segvit.training.recipe import RECIPE_FOLDER, load_recipe, packaged_recipes

# Images that the official loader keeps, implied by the steps of an epoch.
COCO, ADE20K, CITYSCAPES = 7391 * 16, 1262 * 16, 2975
COCO_LARGE = ([14782, 29564, 44346, 59128], [29564, 44346, 59128, 73910])
COCO_GIANT = ([14782, 25869, 36955, 48042, 59128], [29564, 40651, 51737, 62824, 73910])
COCO_SMALL = ([14782, 36955, 59128], [29564, 51737, 73910])
COCO_SMALL_2X = ([29564, 73910, 118256], [59128, 103474, 147820])
ADE_LARGE = ([6520, 13040, 19560, 26080], [13040, 19560, 26080, 32600])
ADE_GIANT = ([6520, 11410, 16300, 21190, 26080], [13040, 17930, 22820, 27710, 32600])
CITY_LARGE = ([3317, 6634, 9951, 13268], [6634, 9951, 13268, 16585])
# Of no official file, but of the configurations that projects on anomalies share.
CITY_BASE = ([3317, 8292, 13268], [6634, 11609, 16585])
V3_SMALL_2X = ([0, 73910, 118256], [3000, 103474, 147820])
V3_LARGE = ([0, 29564, 44346, 59128], [3000, 44346, 59128, 73910])
V3_ADE = ([0, 6520, 9780, 13040], [3000, 9780, 13040, 16300])

# name: pixels, queries, blocks, query layers, epochs, images, steps, annealing, jitter, smallest scale
ROWS = {
    **{
        f"coco_panoptic_{size}_640{times}": (640, 200, 12, 3, epochs, COCO, steps, phases, False, 0.1)
        for size in ("small", "base")
        for times, epochs, steps, phases in (("", 12, 88692, COCO_SMALL), ("_2x", 24, 177384, COCO_SMALL_2X))
    },
    **{
        f"coco_{task}_large_{pixels}": (pixels, 200, 24, 4, 12, COCO, 88692, COCO_LARGE, False, 0.1)
        for task in ("panoptic", "instance")
        for pixels in (640, 1280)
    },
    **{
        f"coco_panoptic_giant_{pixels}": (pixels, 200, 40, 5, 12, COCO, 88692, COCO_GIANT, False, 0.1)
        for pixels in (640, 1280)
    },
    **{
        f"ade20k_panoptic_{size}_{pixels}": (pixels, 200, depth, layers, 31, ADE20K, 39122, phases, True, 0.1)
        for size, depth, layers, phases in (("large", 24, 4, ADE_LARGE), ("giant", 40, 5, ADE_GIANT))
        for pixels in (640, 1280)
    },
    "ade20k_semantic_large_512": (512, 100, 24, 4, 31, ADE20K, 39122, ADE_LARGE, True, 0.5),
    "cityscapes_semantic_large_1024": (1024, 100, 24, 4, 107, CITYSCAPES, 19902, CITY_LARGE, True, 0.5),
    **{
        f"cityscapes_semantic_base_{pixels}": (pixels, 100, 12, 3, 107, CITYSCAPES, 19902, CITY_BASE, True, 0.5)
        for pixels in (640, 1024)
    },
    **{
        f"dinov3_coco_panoptic_{size}_640_2x": (640, 200, 12, 3, 24, COCO, 177384, V3_SMALL_2X, False, 0.1)
        for size in ("small", "base")
    },
    **{
        f"dinov3_coco_{task}_large_{pixels}": (pixels, 200, 24, 4, 12, COCO, 88692, phases, False, 0.1)
        for task, phases in (("panoptic", V3_LARGE), ("instance", COCO_LARGE))
        for pixels in (640, 1280)
    },
    "dinov3_ade20k_semantic_large_512": (512, 100, 24, 4, 16, ADE20K, 20192, V3_ADE, True, 0.5),
}


def config_of(recipe, depth: int, layers: int) -> EoMTConfig:
    """The configuration that a recipe leads to, at a width that builds in no time."""
    fields = model_fields(recipe, depth)
    if recipe.init is not None:  # the checkpoint brings them
        fields = {"num_queries": 200, "num_query_layers": layers, **fields}
    settings = {"hidden_size": 8, "num_hidden_layers": depth, "num_attention_heads": 2, "intermediate_size": 8}
    return EoMTConfig(**{**settings, "image_size": 32, **fields})


def test_there_is_a_recipe_for_every_official_configuration():
    others = [name for name in packaged_recipes() if not name.startswith(("own_", "vit_p_", "fast_", "ladder_"))]
    assert sorted(ROWS) == others
    assert len(others) == 23 + 2


@pytest.mark.parametrize("name", ROWS)
def test_official_values(name):
    pixels, queries, depth, layers, epochs, images, steps, phases, jitter, smallest = ROWS[name]
    is_v3, tolerance = name.startswith("dinov3"), 3 if "ade20k" in name else 1
    recipe = load_recipe(name)
    config = config_of(recipe, depth, layers)
    plan = derive(recipe, images, world_size=4, config=config)

    assert (plan.total_steps, plan.epochs) == (steps, epochs)
    assert (plan.device_batch_size, plan.accumulation_steps) == (4, 1)
    assert plan.learning_rate == (2e-4 if is_v3 else 1e-4)
    assert plan.warmup_steps == ((2000, 3000) if is_v3 else (500, 1000))
    assert plan.annealing.power == recipe.power == 0.9
    assert plan.annealing.starts == pytest.approx(phases[0], abs=tolerance)
    assert plan.annealing.ends == pytest.approx(phases[1], abs=tolerance)
    if phases[0][0] == 0:
        assert (plan.annealing.starts[0], plan.annealing.ends[0]) == (0, 3000)
    assert (config.num_queries, config.num_query_layers) == (queries, layers)
    assert recipe.image_size == pixels
    assert (recipe.optimizer, recipe.weight_decay, recipe.weight_decay_mode) == ("adamw", 0.05, "all")
    assert (recipe.betas, recipe.max_grad_norm, recipe.seed) == ([0.9, 0.999], 0.01, 0)
    assert (recipe.precision, recipe.ema_decay, recipe.freeze, recipe.loss_mask) == ("fp16", None, None, False)
    assert recipe.layer_decay == (1.0 if name == "dinov3_ade20k_semantic_large_512" else 0.8)
    assert recipe.decay_query_layers is not is_v3
    settings = {**AUGMENTATIONS[augmentation_name(recipe)], **recipe.augmentation_options}
    assert (settings["color_jitter"], settings["scale_range"]) == (jitter, (smallest, 2.0))
    if not is_v3 and recipe.backbone is not None:
        assert config.patch_size == 16
    # Our readers keep the images without objects that the official loader drops: 7 steps an epoch at most.
    whole = {COCO: 118287, ADE20K: 20210, CITYSCAPES: 2975}[images]
    assert derive(recipe, whole, 4, config).total_steps == pytest.approx(steps, rel=1e-3)


@pytest.mark.parametrize("name", ROWS)
def test_official_learning_rate_of_every_parameter(name):
    _, _, depth, layers, _, images, *_ = ROWS[name]
    recipe = load_recipe(name)
    config = config_of(recipe, depth, layers)
    with torch.device("meta"):
        model = EoMTForUniversalSegmentation(config)
    plan = derive(recipe, images, 4, config)
    base = plan.learning_rate
    rates = {name: group["lr"] for group in parameter_groups(model, plan) for name in group["names"]}
    assert rates.keys() == {name for name, _ in model.named_parameters()}
    for name, rate in rates.items():
        block = re.match(r"eomt\.layers\.(\d+)\.", name)
        if block is None:
            exponent = depth - 1 if name.startswith("eomt.embeddings.") else 0
        else:
            exponent = depth - 1 - int(block.group(1))
            if not recipe.decay_query_layers and exponent < layers:
                exponent = 0
        assert rate == pytest.approx(base * recipe.layer_decay**exponent, rel=1e-12), name


@pytest.mark.parametrize("name", packaged_recipes())
def test_head_comment_and_data(name):
    path = RECIPE_FOLDER / f"{name}.yaml"
    head = re.match(r"(# .*\n)+", path.read_text()).group()
    for word in ("Command: ", "Hardware:", "Time: ", "Score: "):
        assert f"# {word}" in head, word
    assert re.search(rf"\b{name}\b", head), "the command names the recipe"
    recipe = load_recipe(name)
    assert recipe.data.partition(":")[0] in FORMATS
    assert augmentation_name(recipe) in AUGMENTATIONS
    assert recipe.init is not None or recipe.backbone is not None or name.startswith("own_tiny_")  # from scratch
    stated = yaml.safe_load(path.read_text())
    assert len(stated) <= 20, "a recipe is short"
    derive(recipe, 20000, 4, None if recipe.init is None else EoMTConfig())


@pytest.mark.parametrize("name", [name for name in packaged_recipes() if re.match("own_(?!tiny)", name)])
def test_own_recipes_train_on_one_gpu_with_few_images(name):
    recipe = load_recipe(name)
    plan = derive(recipe, 50, 1, EoMTConfig() if recipe.model == "eomt" else None)
    assert plan.total_steps == 4000
    assert plan.total_steps / plan.evaluate_every_steps <= 50
    assert plan.accumulation_steps > 1
    if recipe.model == "eomt":
        assert recipe.loss_mask


@pytest.mark.parametrize(
    ("name", "size", "points", "steps", "batch_size", "rate", "augmentation"),
    [
        ("vit_p_ade20k_base", 518, 250, 320 * 60, 80, 9e-3, "vit_p"),
        ("vit_p_ade20k_large", 518, 200, 320 * 60, 80, 3e-2, "vit_p"),
        ("vit_p_cityscapes_base", [518, 1036], 250, 345 * 60, 80, 1e-2, "vit_p"),
        ("vit_p_cityscapes_large", [518, 1036], 250, 575 * 60, 48, 3e-3, "vit_p"),
        ("vit_p_coco_base", 518, 150, 1250 * 30, 80, 6e-3, "vit_p_coco"),
        ("vit_p_coco_large", 518, 250, 1250 * 30, 80, 1e-2, "vit_p_coco"),
        ("vit_p_coco_stuff_large", 518, 200, 1250 * 22, 80, 1e-2, "vit_p_coco"),
    ],
)
def test_vit_p_values(name, size, points, steps, batch_size, rate, augmentation):
    recipe = load_recipe(name)
    plan = derive(recipe, 20210, 4)
    assert (recipe.image_size, recipe.points["num_points"], recipe.augmentation) == (size, points, augmentation)
    assert (plan.total_steps, recipe.batch_size) == (steps, batch_size)
    assert plan.learning_rate == pytest.approx(rate, rel=1e-12)
    assert recipe.prompt_learning_rate == 1e-2
    assert (recipe.optimizer, recipe.momentum, recipe.weight_decay) == ("sgd", 0.9, 0)
    assert (recipe.schedule, recipe.max_grad_norm, recipe.layer_decay) == ("cosine", 1.0, 1.0)
    assert plan.warmup_steps == (1000,)  # the paper's
    assert plan.annealing is None


def test_the_folder_at_the_root_is_the_packaged_one():
    assert (Path(__file__).parents[1] / "training" / "recipes").resolve() == RECIPE_FOLDER.resolve()
