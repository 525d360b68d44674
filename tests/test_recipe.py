"""Recipes: reading, overriding, refusing, and what is derived from them."""

import dataclasses
from types import SimpleNamespace

import pytest
import yaml

from hf_segvit.training.annealing import MaskAnnealing
from hf_segvit.training.derivation import augmentation_name, derive, image_size, model_fields, steps_of_epoch
from hf_segvit.training.recipe import Recipe, find_recipe, load_recipe, packaged_recipes


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "epochs: 12\nbase_learning_rate: 2e-4\nmodel_config: {layer_norm_eps: 1e-5}\nimage_size: [64, 96]\n"
    )
    return path


def refusal(fields: dict) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the caller compares the message
        Recipe(**fields)
    return str(error.value)


def test_file_is_read_into_the_types_of_the_fields(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.epochs == 12.0
    assert isinstance(recipe.epochs, float)
    assert recipe.base_learning_rate == 2e-4  # YAML 1.1 alone reads text
    assert recipe.model_config == {"layer_norm_eps": 1e-5}
    assert recipe.image_size == [64, 96]
    assert recipe.name == "mine"
    assert recipe.batch_size == 16


def test_overrides_are_applied_in_order_and_reach_into_dicts(recipe_file):
    recipe = load_recipe(
        recipe_file,
        [
            "batch_size=8",
            "batch_size=4",
            "model_config.num_queries=7",
            "lora.rank=3",
            "image_size=32",
            "betas=[0.9, .95]",
        ],
    )
    assert recipe.batch_size == 4
    assert recipe.model_config == {"layer_norm_eps": 1e-5, "num_queries": 7}
    assert recipe.lora == {"rank": 3}
    assert recipe.image_size == 32
    assert recipe.betas == [0.9, 0.95]


def test_text_is_taken_as_it_is(recipe_file):
    recipe = load_recipe(recipe_file, ["output=2024", "data=coco:/a [b]: #1=x", "init= 1e3 ", "push_to_hub=null"])
    assert (recipe.output, recipe.data, recipe.init) == ("2024", "coco:/a [b]: #1=x", "1e3")
    assert recipe.push_to_hub is None


def test_steps_stand_in_for_epochs_and_init_for_a_backbone(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("epochs: 12\nbackbone: timm/vit\n")
    recipe = load_recipe(path, ["steps=10", "init=folder"])
    assert (recipe.steps, recipe.epochs, recipe.init, recipe.backbone) == (10, None, "folder", None)


def test_same_recipe_after_to_dict(recipe_file):
    recipe = load_recipe(recipe_file, ["annealing=[[0, 1/2]]", "warmup_steps=[1, 2]"])
    assert Recipe(**recipe.to_dict()) == recipe
    assert Recipe(**yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
    assert recipe.changed(seed=3).seed == 3


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("lerning_rate=1", "did you mean learning_rate"),
        ("zzz=1", "the keys are model, task"),
        ("batch_size", "give key=value"),
        ("batch_size.x=1", "holds no keys of its own"),
        ("batch_size=many", "batch_size='many' does not fit; expected a whole number"),
        ("batch_size=1.5", "batch_size=1.5 does not fit"),
        ("compile=1", "expected true or false"),
        ("epochs=true", "epochs=True does not fit; expected a number or null"),
        ("trackers=wandb", "expected a list"),
        ("lora.rnak=3", "did you mean rank?"),
        ("betas=[", "no valid YAML"),
        ("model_config={a: 1, a: 2}", "a stands there twice"),
    ],
)
def test_bad_overrides_are_told(recipe_file, override, told):
    with pytest.raises(ValueError, match=r".") as error:
        load_recipe(recipe_file, [override])
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"task": "panoptik"}, "did you mean panoptic?"),
        ({"model": "vit_p"}, "do not go together"),
        ({"task": "points"}, "do not go together"),
        ({"init": "a", "backbone": "b"}, "start from one of them"),
        ({"epochs": 1, "steps": 2}, "set one of them to null"),
        ({"batch_size": 0}, "batch_size=0 must be greater than 0"),
        ({"batch_size": 16, "device_batch_size": 5}, "does not divide batch_size=16"),
        ({"weight_decay": -1}, "must not be negative"),
        ({"layer_decay": 1.5}, "at most 1"),
        ({"betas": [0.9]}, "two numbers"),
        ({"ema_decay": 1.0}, "between 0 and 1"),
        ({"warmup_steps": [1, 2, 3]}, "one or two whole numbers"),
        ({"annealing": True}, "says nothing"),
        ({"annealing": [[0, 2]]}, "not a fraction of training"),
        ({"annealing": [["a/b", 1]]}, "give fractions"),
        ({"annealing": [["1/0", 1]]}, "give fractions"),
        ({"annealing": [[0.5, 0.25]]}, "ends before it starts"),
        ({"annealing": [3]}, "[start, end] for each"),
        ({"model": "vit_p", "task": "points", "annealing": [[0, 1]]}, "for EoMT's masked attention"),
        ({"freeze": "everything"}, "give backbone, until_layer:N"),
        ({"freeze": "backbone", "lora": {"rank": 2}}, "adapters freeze what they adapt"),
        ({"image_size": [1, 2, 3]}, "[height, width]"),
        ({"momentum": 1.0}, "below 1"),
        ({"learning_rate": float("nan")}, "must be greater than 0"),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(fields, told):
    assert told in refusal(fields)


def test_files_that_are_no_recipes(tmp_path):
    path = tmp_path / "r.yaml"
    for text, told in (
        ("- 1\n", "list of `key: value` lines"),
        ("a: [\n", "no valid YAML"),
        ("epochs: 1\nepochs: 2\n", "epochs stands there twice"),
        ("epoch: 1\n", "did you mean epochs"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r".") as error:
            load_recipe(path)
        assert told in str(error.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="give a YAML file in UTF-8"):
        load_recipe(path)
    path.write_text("output: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ValueError, match="no valid YAML"):
        load_recipe(path)


def test_a_bare_name_finds_a_packaged_recipe_and_a_wrong_one_the_nearest():
    assert load_recipe("coco_panoptic_large_640").name == "coco_panoptic_large_640"
    assert find_recipe("own_panoptic.yaml").name == "own_panoptic.yaml"
    assert "own_panoptic" in packaged_recipes()
    with pytest.raises(ValueError, match="own_panoptic"):
        load_recipe("own_panoptik")
    with pytest.raises(ValueError, match="there is no such file"):
        load_recipe("some/folder/own_panoptic")


class TestDerivation:
    def recipe(self, **fields):
        return Recipe(**{"epochs": 12, "backbone": "b", "model_config": {"num_query_layers": 3}, **fields})

    def test_batches_are_split_over_processes_and_accumulation(self):
        plan = derive(self.recipe(batch_size=16, device_batch_size=2), 1600, world_size=4)
        assert (plan.device_batch_size, plan.accumulation_steps) == (2, 2)
        assert plan.device_batch_size * plan.accumulation_steps * plan.world_size == 16
        plan = derive(self.recipe(batch_size=16, device_batch_size=8), 1600, world_size=4)
        assert (plan.device_batch_size, plan.accumulation_steps) == (4, 1)
        with pytest.raises(ValueError, match="batch_size=18"):
            derive(self.recipe(batch_size=16), 1600, world_size=3)
        with pytest.raises(ValueError, match="give a divisor of 6"):
            derive(self.recipe(batch_size=12, device_batch_size=4), 1600, world_size=2)

    @pytest.mark.parametrize(
        ("num_images", "batch_size", "steps"), [(100, 16, 6), (104, 16, 7), (103, 16, 6), (3, 16, 1), (2975, 16, 186)]
    )
    def test_an_epoch_is_the_nearest_number_of_steps(self, num_images, batch_size, steps):
        assert steps_of_epoch(num_images, batch_size) == steps
        plan = derive(self.recipe(batch_size=batch_size), num_images)
        assert (plan.steps_per_epoch, plan.total_steps, plan.epochs) == (steps, 12 * steps, 12)

    def test_learning_rate_follows_the_batch_by_the_rule_of_its_optimizer(self):
        assert derive(self.recipe(), 1600).learning_rate == 1e-4
        assert derive(self.recipe(batch_size=4), 1600).learning_rate == pytest.approx(0.5e-4)
        assert derive(self.recipe(batch_size=64, base_learning_rate=2e-4), 1600).learning_rate == pytest.approx(4e-4)
        sgd = self.recipe(optimizer="sgd", batch_size=40, base_learning_rate=1e-2)
        assert derive(sgd, 1600).learning_rate == pytest.approx(5e-3)
        assert derive(self.recipe(batch_size=4, learning_rate=3e-3), 1600).learning_rate == 3e-3

    def test_warmup_is_official_in_long_runs_and_a_share_of_short_ones(self):
        assert derive(self.recipe(epochs=None, steps=18_000), 1600).warmup_steps == (500, 1000)
        assert derive(self.recipe(epochs=None, steps=360), 1600).warmup_steps == (10, 20)
        assert derive(self.recipe(epochs=None, steps=360, backbone=None), 1600).warmup_steps == (30,)
        assert derive(self.recipe(epochs=None, steps=360, warmup_steps=[7]), 1600).warmup_steps == (7,)
        with pytest.raises(ValueError, match="do not fit into a training of 360 steps"):
            derive(self.recipe(epochs=None, steps=360, warmup_steps=[60, 300]), 1600)

    def test_annealing_scales_with_the_steps_and_fits_the_layers(self):
        long, short = (derive(self.recipe(epochs=None, steps=steps), 1600).annealing for steps in (6000, 600))
        assert (long.starts, long.ends) == ((1000, 2500, 4000), (2000, 3500, 5000))
        assert (short.starts, short.ends) == ((100, 250, 400), (200, 350, 500))
        config = SimpleNamespace(num_query_layers=2, masked_attention=True)
        assert derive(self.recipe(), 1600, config=config).annealing.starts == (200, 800)
        assert derive(self.recipe(annealing=False), 1600).annealing is None
        assert derive(self.recipe(model_config={"masked_attention": False}), 1600).annealing is None
        with pytest.raises(ValueError, match="annealing has 1 phases, and the model 3"):
            derive(self.recipe(annealing=[[0, 1]]), 1600)

    def test_evaluation_and_checkpoints(self):
        plan = derive(self.recipe(evaluate_every=2, save_every=0.5), 1600)
        assert (plan.evaluate_every_steps, plan.save_every_steps) == (200, 50)
        plan = derive(self.recipe(epochs=200), 1600)
        assert (plan.evaluate_every_steps, plan.save_every_steps) == (400, 400)
        assert derive(self.recipe(save_every_steps=7), 1600).save_every_steps == 7

    def test_a_short_training_has_a_curve_all_the_same(self):
        # 100 steps of the default recipe would be two records.
        assert [derive(self.recipe(epochs=None, steps=steps), 1600).log_every for steps in (5, 100, 400)] == [1, 5, 20]
        assert derive(self.recipe(epochs=None, steps=5000), 1600).log_every == 50
        assert derive(self.recipe(epochs=None, steps=400, log_every=7), 1600).log_every == 7

    def test_without_length_or_images(self):
        with pytest.raises(ValueError, match="epochs=12"):
            derive(self.recipe(epochs=None), 1600)
        with pytest.raises(ValueError, match="no images"):
            derive(self.recipe(), 0)

    def test_fields_of_the_model_follow_from_task_and_depth(self):
        assert model_fields(Recipe(task="semantic"), 24) == {"num_queries": 100, "num_query_layers": 4}
        assert model_fields(Recipe(task="instance"), 12) == {"num_queries": 200, "num_query_layers": 3}
        assert model_fields(Recipe(model_config={"num_hidden_layers": 2})) == {
            "num_queries": 200,
            "num_query_layers": 2,
            "num_hidden_layers": 2,
        }
        assert model_fields(Recipe(), 40)["num_query_layers"] == 5
        assert model_fields(Recipe(init="folder", model_config={"num_queries": 9}), 40) == {"num_queries": 9}
        assert augmentation_name(Recipe(task="semantic")) == "eomt_semantic"
        assert augmentation_name(Recipe(augmentation="eomt_ade20k_panoptic")) == "eomt_ade20k_panoptic"
        assert image_size(Recipe(image_size=32)) == (32, 32)
        assert image_size(Recipe(image_size=[32, 64])) == (32, 64)
        assert image_size(Recipe(), SimpleNamespace(image_size=[48, 16])) == (48, 16)
        assert image_size(Recipe(task="semantic")) == (512, 512)


def test_a_plan_is_a_record_of_plain_values():
    plan = derive(Recipe(epochs=1), 32)
    assert isinstance(plan.annealing, MaskAnnealing)
    assert dataclasses.asdict(plan)["annealing"]["power"] == 0.9
