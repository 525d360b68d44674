"""Recipes: reading, overriding, refusing, and what is derived from them."""

import dataclasses
import inspect
from types import SimpleNamespace
from typing import ClassVar

import pytest
import yaml

from hf_segvit.data.augmentation import AUGMENTATIONS
from hf_segvit.data.prompts import PROMPT_SOURCES, PointAugmentation
from hf_segvit.evaluation.points import POINT_KINDS
from hf_segvit.training.annealing import MaskAnnealing
from hf_segvit.training.checkpoints import identity, refuse_other_run
from hf_segvit.training.declarations import DECLARATIONS, EoMTOptions, PointOptions, PromptOptions, option
from hf_segvit.training.derivation import augmentation_name, derive, image_size, model_fields, steps_of_epoch
from hf_segvit.training.recipe import FIELDS, RENAMED, Recipe, find_recipe, load_recipe, packaged_recipes, resume_rules
from hf_segvit.training.tasks import TrainingTask, task_for
from hf_segvit.training.tasks.eomt import EoMTTask
from hf_segvit.training.tasks.vit_p import ViTPTask


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
    assert Recipe(model="vit_p").task == "points"
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
        ("zzz=1", "choose one of model, task"),
        ("batch_size", "give key=value"),
        ("batch_size.x=1", "holds no keys of its own"),
        ("batch_size=many", "batch_size='many' does not fit; expected a whole number"),
        ("batch_size=1.5", "batch_size=1.5 does not fit"),
        ("compile=1", "expected true or false"),
        ("epochs=true", "epochs=True does not fit; expected a number or null"),
        ("trackers=wandb", "expected a list"),
        ("lora.rnak=3", "did you mean rank?"),
        ("betas=[", "no valid YAML"),
        ("model_config={a: 1, a: 2}", "a occurs twice"),
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
        ({"model": "vit_p", "task": "semantic"}, "task='semantic' is none of model=vit_p; choose one of points"),
        ({"task": "points"}, "task='points' is none of model=eomt; choose one of panoptic, instance, semantic"),
        ({"init": "a", "backbone": "b"}, "start from one of them"),
        ({"epochs": 1, "steps": 2}, "set one of them to null"),
        ({"batch_size": 0}, "batch_size=0 must be > 0"),
        ({"batch_size": 16, "device_batch_size": 5}, "does not divide batch_size=16"),
        ({"weight_decay": -1}, "weight_decay=-1 must be >= 0"),
        ({"layer_decay": 1.5}, "layer_decay=1.5 must be > 0 and <= 1"),
        ({"betas": [0.9]}, "betas=[0.9] must have 2 numbers"),
        ({"betas": [0.9, 1]}, "betas=[0.9, 1] must be >= 0 and < 1"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must be > 0 and < 1"),
        ({"warmup_steps": [1, 2, 3]}, "warmup_steps=[1, 2, 3] must have 1 or 2 numbers: [all parameters] or"),
        ({"annealing": True}, "is ambiguous"),
        ({"annealing": [[0, 2]]}, "not a fraction of training"),
        ({"annealing": [["a/b", 1]]}, "give fractions"),
        ({"annealing": [["1/0", 1]]}, "give fractions"),
        ({"annealing": [[0.5, 0.25]]}, "ends before it starts"),
        ({"annealing": [3]}, "[start, end] for each"),
        ({"model": "vit_p", "task": "points", "annealing": [[0, 1]]}, "annealing=[[0, 1]] is for model=eomt"),
        ({"freeze": "everything"}, "give backbone, until_layer:N"),
        ({"freeze": "backbone", "lora": {"rank": 2}}, "adapters freeze what they adapt"),
        ({"image_size": [1, 2, 3]}, "[height, width]"),
        ({"momentum": 1.0}, "momentum=1.0 must be >= 0 and < 1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be > 0"),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(fields, told):
    assert told in refusal(fields)


@dataclasses.dataclass(frozen=True)
class DepthOptions:
    """Fields of a task of one's own."""

    max_depth: float = option(10.0, "metres", limits="> 0", resume="yes")
    loss: str = option("l1", "of the depth", choices=("l1", "log"))
    weight_decay: float = 0.05  # a field of every recipe stays one


class DepthTask(TrainingTask):
    tasks = ("depth", "normals")
    default_image_size: ClassVar = {"depth": 384, "normals": 256}
    default_augmentation = "vit_p_coco"
    options = DepthOptions


class UnfinishedTask(DepthTask):
    """Whose methods are missing."""


DepthTask.__abstractmethods__ = frozenset()


@dataclasses.dataclass(frozen=True)
class BoxOptions(EoMTOptions):
    box_weight: int = option(1, "of the loss of boxes", limits=">= 0")


class BoxTask(EoMTTask):
    options = BoxOptions


class TestTasksOfOnesOwn:
    DEPTH, BOXES = f"{__name__}:DepthTask", f"{__name__}:BoxTask"

    def test_defaults_are_the_tasks(self):
        recipe = Recipe(model=self.DEPTH)
        assert recipe.task == "depth"
        assert (image_size(recipe), augmentation_name(recipe)) == ((384, 384), "vit_p_coco")
        assert image_size(recipe.changed(task="normals")) == (256, 256)
        assert model_fields(recipe, 12) == {}
        assert derive(recipe.changed(steps=9, backbone="b"), 16).annealing is None
        assert isinstance(task_for(recipe), DepthTask)

    def test_its_fields_are_options(self, tmp_path):
        path = tmp_path / "depth.yaml"
        path.write_text(f"model: {self.DEPTH}\nweight_decay: 0.1\noptions: {{loss: log}}\n")
        recipe = load_recipe(path, ["options.max_depth=80"])
        assert recipe.options == {"loss": "log", "max_depth": 80.0}
        assert recipe.task_options() == DepthOptions(80.0, "log", weight_decay=0.1)
        assert Recipe(model=self.DEPTH).task_options() == DepthOptions()
        assert {resume_rules(self.DEPTH)[f"options.{name}"] for name in ("max_depth", "loss")} == {"yes", "no"}
        kept = identity(recipe, 4, 1)
        assert kept["options.loss"] == "log"
        assert "options.max_depth" not in kept
        assert refuse_other_run(kept, identity(recipe.changed(options={"loss": "log"}), 4, 1), path) is None
        with pytest.raises(ValueError, match=r"options\.loss was 'log' and is 'l1'"):
            refuse_other_run(kept, identity(recipe.changed(options={}), 4, 1), path)

    def test_a_task_derived_from_eomts_keeps_its_fields(self):
        recipe = Recipe(model=self.BOXES, annealing=False, options={"box_weight": 2})
        assert (recipe.task, recipe.declaration) == ("panoptic", BoxTask)
        assert recipe.task_options() == BoxOptions(annealing=False, box_weight=2)
        assert model_fields(recipe, 24) == {"num_queries": 200, "num_query_layers": 4}

    @pytest.mark.parametrize(
        ("fields", "told"),
        [
            ({"options": {"max_dept": 3}}, "options has no key 'max_dept'; did you mean max_depth?"),
            ({"options": {"max_depth": 0}}, "options.max_depth=0 must be > 0"),
            ({"options": {"loss": "l2"}}, "options.loss='l2' is unknown; choose one of l1, log"),
            ({"options": {"weight_decay": 0}}, "options has no key 'weight_decay'"),
            ({"task": "deep"}, "task='deep' is none of model=tests.test_recipe:DepthTask; did you mean depth?"),
            ({"annealing": False}, "annealing=False is for model=eomt, not for tests.test_recipe:DepthTask"),
            ({"model": f"{__name__}:UnfinishedTask"}, "lacks build_model, collator, "),
            ({"model": f"{__name__}:BoxOptions"}, "is no training task; derive it from"),
            ({"model": f"{__name__}:Task"}, "has no Task; did you mean"),
            ({"model": "no_such_package:Task"}, "model=no_such_package:Task: no_such_package cannot be"),
            ({"model": "eompt"}, "did you mean eomt?; or give package.module:Class"),
        ],
    )
    def test_mistakes_are_told(self, fields, told):
        assert told in refusal({"model": self.DEPTH, **fields})


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"criterion": "my_loss"}, "criterion='my_loss' is no import path"),
        ({"criterion": "no_such_package.loss:Loss"}, "no_such_package.loss cannot be imported"),
        ({"criterion": "fractions:Fraction"}, "has no method forward, from_config, count_normalizers"),
        ({"metrics": ["fractions:Fraction"]}, "metrics=fractions:Fraction has no method reset, add_batch, compute"),
        ({"callbacks": ["json:dumps"]}, "callbacks=json:dumps is function and no class"),
        ({"augmentation": "json:Dumps"}, "augmentation=json:Dumps: json has no Dumps"),
        ({"augmentation": "eomt_semantik"}, "did you mean eomt_semantic?; or give package.module:Class"),
        ({"options": {"a": 1}}, "options={'a': 1}: model=eomt declares none"),
    ],
)
def test_import_paths_are_checked_before_anything_is_loaded(fields, told):
    assert told in refusal(fields)


class Loss:
    forward = from_config = count_normalizers = curve_name = print


def test_import_paths_that_fit_are_kept():
    paths = {
        "criterion": f"{__name__}:Loss",
        "metrics": ["hf_segvit.metrics.mean_iou:MeanIoU"],
        "callbacks": ["hf_segvit.training.annealing:MaskAnnealing"],
        "augmentation": "hf_segvit.data.augmentation:MaskAugmentation",
    }
    recipe = Recipe(**paths)
    assert {name: getattr(recipe, name) for name in paths} == paths


@pytest.mark.parametrize(
    ("model", "name", "value"),
    [
        *(("eomt", "prompt_learning_rate", 0.1), ("eomt", "points", {"num_points": 3})),
        *(("vit_p", "annealing", False), ("vit_p", "decay_query_layers", False), ("vit_p", "loss_mask", True)),
    ],
)
def test_a_field_of_another_model_is_refused(model, name, value):
    other = {"eomt": "vit_p", "vit_p": "eomt"}[model]
    assert (
        refusal({"model": model, name: value})
        == f"{name}={value!r} is for model={other}, not for {model}; leave it out"
    )
    assert getattr(Recipe(model=other, **{name: value}), name) == value


def test_a_renamed_field_is_translated_and_said(tmp_path, monkeypatch):
    monkeypatch.setitem(RENAMED, "images_per_step", "batch_size")
    path = tmp_path / "old.yaml"
    path.write_text("images_per_step: 8\n")
    with pytest.warns(FutureWarning, match="the recipe's images_per_step is called batch_size now; please rename it"):
        assert load_recipe(path).batch_size == 8
    with pytest.warns(FutureWarning, match="images_per_step"):
        assert load_recipe(path, ["images_per_step=4"]).batch_size == 4
    path.write_text("images_per_step: 8\nbatch_size: 8\n")
    with pytest.raises(ValueError, match="images_per_step is called batch_size now, and both are set"):
        load_recipe(path)


def test_declarations_are_those_of_the_code_that_they_are_for():
    """Which they cannot ask, as it needs PyTorch."""
    declared = {name: field.metadata for name, field in FIELDS.items()}
    assert sorted(declared["augmentation"]["choices"]) == sorted(AUGMENTATIONS)
    assert declared["model"]["choices"] == tuple(DECLARATIONS)
    points = {field.name: field for field in dataclasses.fields(PointOptions)}
    assert points["source"].metadata["choices"] == tuple(PROMPT_SOURCES)
    assert points["evaluate"].metadata["choices"] == POINT_KINDS
    signature = inspect.signature(PointAugmentation).parameters
    for field in dataclasses.fields(PromptOptions):
        assert signature[field.name].default == field.default, field.name
    for model, task in (("eomt", EoMTTask), ("vit_p", ViTPTask)):
        assert (task.tasks, task.options) == (DECLARATIONS[model].tasks, DECLARATIONS[model].options)
    assert all(field.metadata["meaning"] for field in FIELDS.values())
    assert {field.metadata["resume"] for field in FIELDS.values()} == {"yes", "no", "told"}


def test_files_that_are_no_recipes(tmp_path):
    path = tmp_path / "r.yaml"
    for text, told in (
        ("- 1\n", "list of `key: value` lines"),
        ("a: [\n", "no valid YAML"),
        ("epochs: 1\nepochs: 2\n", "epochs occurs twice"),
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
        with pytest.raises(ValueError, match="do not fit into a run of 360 steps"):
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
