"""Training normalises pixels as its starting weights know them, and the trained model's image processor says so.

Pixels that reach the model are taken back to 8 bits with the normalisation that is expected: of any other they would
be no whole numbers.
"""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import transformers

from hf_segvit import EoMTForUniversalSegmentation, EoMTImageProcessor, ViTPImageProcessor
from hf_segvit.cli import main
from hf_segvit.conversion.backbones import image_normalization
from hf_segvit.conversion.families import FAMILIES
from hf_segvit.models.configuration_plain_vit import PlainViTConfig
from hf_segvit.models.modeling_plain_vit import PlainViTModel
from hf_segvit.training.loop import train
from hf_segvit.training.tasks import task_for
from hf_segvit.training.tasks.eomt import EoMTTask
from hf_segvit.training.tasks.vit_p import ViTPTask

from . import test_training_vit_p
from .parity import test_backbones as backbones
from .tiny_generators import tiny_classifier
from .tiny_models import tiny_eomt
from .tiny_training import tiny_recipe

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5] * 3, [0.5] * 3)
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
UNUSUAL = ([0.31, 0.42, 0.53], [0.21, 0.22, 0.25])
HEADS = {"num_queries": 5, "num_query_layers": 1, "train_num_points": 16}

# One of every family of timm, with the normalisation that is published for it.
TIMM_BACKBONES = {
    "vit_small_patch14_reg4_dinov2.lvd142m": IMAGENET,
    "deit3_small_patch16_224.fb_in1k": IMAGENET,
    "vit_tiny_patch16_224.augreg_in21k": HALF,
    "vit_base_patch16_224.mae": IMAGENET,
    "vit_base_patch16_siglip_224.v2_webli": HALF,
    "vit_large_patch16_dinov3.sat493m": ([0.430, 0.411, 0.296], [0.213, 0.156, 0.143]),
    "vit_pe_core_base_patch16_224.fb": HALF,
    "eva02_tiny_patch14_224.mim_in22k": CLIP,
}


def plain_vit() -> PlainViTModel:
    return PlainViTModel(PlainViTConfig(**backbones.small(intermediate_size=160)))


def siglip2_fields() -> dict:
    fields = backbones.small(intermediate_size=160, num_patches=25)
    del fields["image_size"]
    return fields


def siglip2() -> transformers.Siglip2Model:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.Siglip2Model(transformers.Siglip2Config(vision_config=siglip2_fields(), text_config=text))


# Every type of model that Transformers or this package saves and that becomes a plain ViT.
SAVED_BACKBONES = {
    **backbones.TRANSFORMERS_BACKBONES,
    "vit mae": lambda: transformers.ViTMAEModel(transformers.ViTMAEConfig(**backbones.small(intermediate_size=160))),
    "siglip2": lambda: transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**siglip2_fields())),
    "siglip2 of both towers": siglip2,
    "plain vit": plain_vit,
}


def save_timm(name: str, folder: Path) -> str:
    model = backbones.randomize(timm.create_model(name, **backbones.TINY))
    timm.models.save_for_hf(model, str(folder), model_args=dict(backbones.TINY), safe_serialization=True)
    return str(folder)


def save_with_settings(model: torch.nn.Module, folder: Path, **settings) -> str:
    """A model with a preprocessor_config.json as every image processor of Transformers writes it."""
    model.save_pretrained(folder)
    mean, std = UNUSUAL
    settings = {"do_rescale": True, "rescale_factor": 1 / 255, "image_mean": mean, "image_std": std, **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def eomt_recipe(output: Path, **changes):
    """One step, scored once, at a size of which the patches of all backbones are divisors."""
    return tiny_recipe(output, **{"steps": 1, "warmup_steps": [0], "batch_size": 2, "model_config": {}, **changes})


def vit_p_recipe(output: Path, **changes):
    one_step = {"steps": 1, "warmup_steps": [0], "batch_size": 2, "model_config": {}}
    return test_training_vit_p.recipe(output, **{**one_step, **changes})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The pixels of every batch that a loss is computed of."""
    pixels = []
    for task in (EoMTTask, ViTPTask):

        def loss(self, model, batch, normalizers, original=task.loss):
            pixels.append(batch["pixel_values"])
            return original(self, model, batch, normalizers)

        monkeypatch.setattr(task, "loss", loss)
    return pixels


def assert_8_bit(pixels: torch.Tensor, mean: list[float], std: list[float]) -> None:
    values = (pixels * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)) * 255
    torch.testing.assert_close(values, values.round().clamp(0, 255), atol=1e-3, rtol=0)
    assert values.max() - values.min() > 50


def check_one_step(recipe, seen: list[torch.Tensor], normalization: tuple[list[float], list[float]]) -> None:
    """Train for a step; the pixels and the saved processor are normalised as expected."""
    train(recipe, cpu=True)
    cls = EoMTImageProcessor if recipe.model == "eomt" else ViTPImageProcessor
    for folder in (Path(recipe.output) / "model", *(Path(recipe.output) / "checkpoints").glob("step*")):
        processor = cls.from_pretrained(folder)
        assert (list(processor.image_mean), list(processor.image_std)) == normalization
    assert seen
    for pixels in seen:
        assert_8_bit(pixels, *normalization)


def test_the_families_here_are_all_that_convert() -> None:
    types = {make().config.model_type for make in SAVED_BACKBONES.values()}
    made = [type(timm.create_model(name, **backbones.TINY)) for name in TIMM_BACKBONES]
    classes = {f"{kind.__module__}.{kind.__name__}" for kind in made}
    assert types | classes == {model for family in FAMILIES for model in family.MODELS}


@pytest.mark.parametrize("name", TIMM_BACKBONES)
def test_a_step_from_a_backbone_of_timm(name: str, tmp_path: Path, seen) -> None:
    folder = save_timm(name, tmp_path / "backbone")
    size = 56 if "patch14" in name else 64
    recipe = eomt_recipe(tmp_path / "run", backbone=folder, image_size=size, model_config=HEADS)
    check_one_step(recipe, seen, TIMM_BACKBONES[name])


@pytest.mark.parametrize("name", SAVED_BACKBONES)
def test_a_step_from_a_saved_backbone(name: str, tmp_path: Path, seen) -> None:
    folder = save_with_settings(SAVED_BACKBONES[name](), tmp_path / "backbone")
    recipe = eomt_recipe(tmp_path / "run", backbone=folder, image_size=56, model_config=HEADS)
    check_one_step(recipe, seen, UNUSUAL)


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_a_step_of_vit_p_from_a_backbone(kind: str, tmp_path: Path, seen) -> None:
    if kind == "timm":
        folder, expected = save_timm("vit_tiny_patch16_224.augreg_in21k", tmp_path / "backbone"), HALF
    else:
        folder, expected = save_with_settings(SAVED_BACKBONES["dinov2"](), tmp_path / "backbone"), UNUSUAL
    size = 48 if kind == "timm" else 56
    check_one_step(vit_p_recipe(tmp_path / "run", backbone=folder, image_size=size), seen, expected)


def save_checkpoint(model: str, folder: Path, **settings) -> str:
    """A tiny checkpoint to start from, whose image processor has these settings."""
    made = tiny_eomt() if model == "eomt" else tiny_classifier()
    processor = EoMTImageProcessor(size=64, **settings) if model == "eomt" else ViTPImageProcessor(**settings)
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def recipe_from(model: str, output: Path, init: str, **changes):
    if model == "eomt":
        return eomt_recipe(output, init=init, image_size=None, **changes)
    return vit_p_recipe(output, init=init, image_size=None, **changes)


@pytest.mark.parametrize("model", ["eomt", "vit_p"])
def test_a_step_from_a_checkpoint(model: str, tmp_path: Path, seen) -> None:
    mean, std = UNUSUAL
    init = save_checkpoint(model, tmp_path / "init", image_mean=mean, image_std=std)
    check_one_step(recipe_from(model, tmp_path / "run", init), seen, UNUSUAL)


def test_a_step_from_a_checkpoint_of_transformers(tmp_path: Path, seen) -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    config |= {"num_queries": 5, "num_blocks": 1, "num_upscale_blocks": 2, "train_num_points": 16}
    transformers.EomtForUniversalSegmentation(transformers.EomtConfig(**config)).save_pretrained(tmp_path / "init")
    size = {"shortest_edge": 64, "longest_edge": 64}
    mean, std = UNUSUAL
    processor = transformers.EomtImageProcessor(size=size, image_mean=mean, image_std=std)
    processor.save_pretrained(tmp_path / "init")
    check_one_step(recipe_from("eomt", tmp_path / "run", str(tmp_path / "init")), seen, UNUSUAL)


@pytest.mark.parametrize("device", ["cpu", "meta"])  # "meta": finished where the model computes
@pytest.mark.parametrize("model", ["eomt", "vit_p"])
@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": 0.5, "image_std": 0.25},
        {"rescale_factor": 1 / 127.5, "image_mean": (1.0, 0.9, 0.8), "image_std": (1.0, 1.1, 1.2)},
        {"do_rescale": False, "image_mean": (120.0, 110.0, 100.0), "image_std": (60.0, 61.0, 62.0)},
        {"do_normalize": False},
    ],
)
def test_training_pixels_are_those_of_the_checkpoints_processor(
    settings: dict, model: str, device: str, tmp_path: Path
) -> None:
    init = save_checkpoint(model, tmp_path / "init", **settings)
    task = task_for(recipe_from(model, tmp_path / "run", init))
    built, processor = task.build_model()
    for name, value in settings.items():
        assert getattr(processor, name) == value
    task.device = torch.device(device)
    samples = [task.train_samples()[0, index] for index in range(3)]
    # On the CPU the same crops are scaled before they are collated; ViT-P's always are.
    batch = task.prepare_batch(task.collator(processor, task.device)(samples), processor)
    plain = task_for(recipe_from(model, tmp_path / "run", init))
    plain.build_model()
    images = [plain.train_samples()[0, index].pixels for index in range(3)]
    expected = processor(images, do_resize=False)["pixel_values"]
    assert expected.shape == (3, 3, *_size(built))
    torch.testing.assert_close(batch["pixel_values"], expected, rtol=1e-5, atol=1e-4)


def _size(model) -> tuple[int, int]:
    return model.config.image_height_width


@pytest.mark.parametrize("model", ["eomt", "vit_p"])
def test_scoring_normalises_as_training(model: str, tmp_path: Path) -> None:
    mean, std = UNUSUAL
    init = save_checkpoint(model, tmp_path / "init", image_mean=mean, image_std=std)
    size = _size(tiny_eomt() if model == "eomt" else tiny_classifier())[0]
    scenes = {"val_data": f"generated:easy?num_scenes=2&size={size}"}  # as large as the input: nothing is resized
    task = task_for(recipe_from(model, tmp_path / "run", init, **scenes))
    built, processor = task.build_model()
    seen = []

    def look(module, args, kwargs) -> None:
        seen.append(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0])

    built.eval().base_model.embeddings.register_forward_pre_hook(look, with_kwargs=True)
    task.evaluate(built, processor, torch.device("cpu"), None)
    assert seen
    for pixels in seen:
        assert_8_bit(pixels, mean, std)


def test_how_answers_are_made_stays_and_the_rest_is_the_recipes(tmp_path: Path) -> None:
    kept = {"threshold": 0.3, "mask_threshold": 0.4, "overlap_mask_area_threshold": 0.6}
    kept |= {"instance_threshold": 0.2, "num_instances": 11}
    before = {"task": "semantic", "num_labels": 5, "ignore_index": 0, "do_reduce_labels": True}
    init = save_checkpoint("eomt", tmp_path / "init", **kept, **before)
    task = EoMTTask(recipe_from("eomt", tmp_path / "run", init))
    _, processor = task.build_model()
    expected = {**kept, "task": "panoptic", "do_split_image": False, "num_labels": len(task.description.id2label)}
    expected |= {"stuff_classes": task.description.stuff_classes, "ignore_index": 255, "do_reduce_labels": False}
    assert {name: getattr(processor, name) for name in expected} == expected


@pytest.mark.parametrize("model", ["eomt", "vit_p"])
def test_what_a_backbone_does_not_say_is_imagenets_and_said(model: str, tmp_path: Path, seen, capsys) -> None:
    SAVED_BACKBONES["siglip"]().save_pretrained(tmp_path / "backbone")
    make, fields = (eomt_recipe, HEADS) if model == "eomt" else (vit_p_recipe, {})
    made = make(tmp_path / "run", backbone=str(tmp_path / "backbone"), image_size=56, model_config=fields)
    check_one_step(made, seen, IMAGENET)
    words = f"normalisation: that of {tmp_path / 'backbone'} is unknown, so pixels are normalised by ImageNet's"
    assert words in capsys.readouterr().err


def test_resuming_keeps_the_normalisation(tmp_path: Path, seen, capsys) -> None:
    mean, std = UNUSUAL
    init = save_checkpoint("eomt", tmp_path / "init", image_mean=mean, image_std=std)
    changes = {"steps": 2, "save_every_steps": 1}
    train(recipe_from("eomt", tmp_path / "run", init, **changes), cpu=True, progress=False)
    checkpoints = tmp_path / "run" / "checkpoints"
    newest = max(checkpoints.glob("step*"))
    assert len(list(checkpoints.glob("step*"))) == 2
    for says_otherwise in (False, True):
        shutil.rmtree(newest)
        seen.clear()
        capsys.readouterr()
        if says_otherwise:
            EoMTImageProcessor(size=64, image_mean=0.5, image_std=0.5).save_pretrained(init)
        check_one_step(recipe_from("eomt", tmp_path / "run", init, resume=True, **changes), seen, UNUSUAL)
        assert len(seen) == 1
        assert ("pixels are still normalised as in" in capsys.readouterr().err) == says_otherwise


def test_the_explanation_tells_the_normalisation(tmp_path: Path, capsys) -> None:
    mean, std = UNUSUAL
    init = save_checkpoint("eomt", tmp_path / "init", image_mean=mean, image_std=std)
    recipe = tmp_path / "recipe.yaml"
    data = "generated:easy?num_scenes=3&size=64"
    recipe.write_text(json.dumps({"init": init, "data": data, "train_split": "train", "epochs": 60, "batch_size": 1}))
    assert main(["train", str(recipe), "--explain", f"output={tmp_path / 'run'}"]) == 0
    line = "normalisation   mean 0.31, 0.42, 0.53, standard deviation 0.21, 0.22, 0.25, of pixels in [0, 1]"
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, UNUSUAL),
        ({"image_mean": 0.5, "image_std": 0.25}, ([0.5] * 3, [0.25] * 3)),
        ({"do_normalize": False}, ([0.0] * 3, [1.0] * 3)),
        ({"rescale_factor": 2 / 255, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, HALF),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}, ([0.5] * 3, [0.2] * 3)),
    ],
)
def test_a_backbones_settings_are_brought_to_pixels_of_0_to_1(settings: dict, expected, tmp_path: Path) -> None:
    folder = save_with_settings(plain_vit(), tmp_path, **settings)
    mean, std = image_normalization(folder)
    assert mean == pytest.approx(expected[0])
    assert std == pytest.approx(expected[1])


def test_settings_without_a_normalisation_are_refused(tmp_path: Path) -> None:
    folder = save_with_settings(plain_vit(), tmp_path / "transformers", image_mean=None)
    with pytest.raises(ValueError, match=r"image_mean is None|hold no image_mean and image_std"):
        image_normalization(folder)
    folder = save_timm("vit_tiny_patch16_224.augreg_in21k", tmp_path / "timm")
    config = json.loads((Path(folder) / "config.json").read_text())
    nested = config.pop("pretrained_cfg")
    (Path(folder) / "config.json").write_text(json.dumps({**nested, **config}))  # as older versions of timm wrote it
    assert image_normalization(folder) == HALF
    (Path(folder) / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="hold no mean and std"):
        image_normalization(folder)


def test_a_model_from_a_backbone_is_unchanged_by_what_its_pixels_are(tmp_path: Path) -> None:
    folder = save_with_settings(SAVED_BACKBONES["dinov2"](), tmp_path / "backbone")
    task = EoMTTask(eomt_recipe(tmp_path / "run", backbone=folder, image_size=56, model_config=HEADS))
    model, _ = task.build_model()
    expected = EoMTForUniversalSegmentation.from_backbone(folder, image_size=56, num_query_layers=1)
    assert torch.equal(model.eomt.layers[1].mlp.fc1.weight, expected.eomt.layers[1].mlp.fc1.weight)
    assert task.remarks == []
