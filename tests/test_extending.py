"""Each door for code of one's own, by the package in tests/extending, which changes nothing of ours."""

import inspect
import json
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.vision_transformer import VisionTransformer
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_segvit import EoMTForUniversalSegmentation, PlainViTModel
from hf_segvit.conversion.to_transformers import export_to_transformers
from hf_segvit.data import augmentation as augmentations
from hf_segvit.data import reading
from hf_segvit.hub.push import plan_push
from hf_segvit.lookup import entry_points
from hf_segvit.models.mask_criterion import MaskCriterion, MaskPrediction
from hf_segvit.training.loop import train
from hf_segvit.training.recipe import Recipe
from hf_segvit.training.tasks import TrainingTask, task_for
from hf_segvit.training.tasks.eomt import EoMTTask
from hf_segvit.training.tracking import read_history

from .test_training_loop import ScoredTask
from .tiny_models import tiny_eomt
from .tiny_training import MODEL, assert_equal, saved_tensors, tiny_recipe

EXTRAS = Path(__file__).parent / "extending"
FOCAL = "segvit_extras.focal:FocalCriterion"
SEMANTIC = {
    "task": "semantic",
    "augmentation": "eomt_semantic",
    "augmentation_options": {"scale_range": [0.9, 1.2], "color_jitter": False},
}


@pytest.fixture(autouse=True)
def extras(tmp_path, monkeypatch):
    """The package is importable and, as if pip had installed it, offers its entry points."""
    project = tomllib.loads((EXTRAS / "pyproject.toml").read_text())["project"]
    folder = tmp_path / "site" / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    folder.mkdir(parents=True)
    lines = [f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"]
    (folder / "METADATA").write_text("".join(lines))
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in project["entry-points"].items()
    ]
    (folder / "entry_points.txt").write_text("\n".join(groups))
    monkeypatch.syspath_prepend(str(EXTRAS))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield
    forget_the_package()


def forget_the_package():
    for name in [name for name in sys.modules if name.split(".")[0] == "segvit_extras"]:
        del sys.modules[name]


def test_the_package_is_small_and_uses_public_names():
    files = sorted((EXTRAS / "segvit_extras").glob("*.py"))
    assert len(files) == 9
    for file in files:
        text = file.read_text()
        assert len(text.splitlines()) <= 60, file
        imported = re.findall(r"from (hf_segvit[\w.]*) import (.+)", text)
        assert not [name for module, names in imported for name in f"{module}.{names}".split(".") if name[0] == "_"]
        assert "monkeypatch" not in text


class TestCriterion:
    def test_a_recipe_names_it_and_its_weight(self, tmp_path):
        fields = {"criterion": FOCAL, "model_config": {**MODEL, "focal_weight": 0.5}}
        losses = {}
        train(tiny_recipe(tmp_path / "run", **fields, steps=3), cpu=True, on_step=losses.__setitem__, progress=False)
        row = read_history(tmp_path / "run" / "history.jsonl")[0]
        weights = {"mask": 5.0, "dice": 5.0, "class": 2.0, "focal": 0.5}
        terms = {name: sum(row[f"{name} loss/prediction {layer}"] for layer in (1, 2, 3)) for name in weights}
        assert terms["focal"] > 0
        assert losses[1] == pytest.approx(sum(weights[name] * term for name, term in terms.items()), rel=1e-5)

        folder = tmp_path / "run" / "model"
        settings = json.loads((folder / "config.json").read_text())
        assert (settings["focal_weight"], settings["criterion"]) == (0.5, FOCAL)
        again = task_for(tiny_recipe(tmp_path / "on", **{**fields, "model_config": {}}, init=str(folder)))
        criterion = again.build_model()[0].criterion
        assert (type(criterion).__name__, criterion.focal_weight) == ("FocalCriterion", 0.5)

    def test_a_checkpoint_never_imports_what_it_was_trained_with(self, tmp_path):
        from segvit_extras.focal import FocalCriterion

        model = tiny_eomt(focal_weight=2.0, intermediate_size=64)
        model.criterion = FocalCriterion.from_config(model.config)
        model.save_pretrained(tmp_path / "model")
        task_for(tiny_recipe(tmp_path)).new_processor().save_pretrained(tmp_path / "model")
        forget_the_package()
        loaded = EoMTForUniversalSegmentation.from_pretrained(tmp_path / "model")
        assert "segvit_extras.focal" not in sys.modules
        assert type(loaded.criterion) is MaskCriterion
        assert (loaded.config.criterion, loaded.config.focal_weight) == (FOCAL, 2.0)
        loaded.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "config.json").read_text())["criterion"] == FOCAL
        plan_push(tmp_path / "model", "me/focal")
        loaded.set_masked_attention_probabilities(0.0)
        export_to_transformers(loaded, tmp_path / "exported")
        assert (tmp_path / "exported" / "model.safetensors").is_file()

    def test_without_weight_it_is_the_criterion_that_it_derives_from(self):
        from segvit_extras.focal import FocalCriterion

        masks, labels = [torch.rand(3, 64, 64) > 0.5], [torch.tensor([0, 4, 2])]
        pixels, losses = torch.randn(1, 3, 64, 64), []
        for weight in (None, 0.0, 1.0):
            model = tiny_eomt().train()
            if weight is not None:
                model.criterion = FocalCriterion(weight, **model.config.criterion_arguments())
            torch.manual_seed(0)
            losses.append(model(pixels, mask_labels=masks, class_labels=labels).loss.item())
        assert losses[0] == losses[1] < losses[2]

    def test_it_counts_its_own_normalizers_and_names_its_own_curves(self, tmp_path):
        class Halves(MaskCriterion):
            def count_normalizers(self, class_labels, num_queries, device=None, all_processes=True):
                return super().count_normalizers(class_labels, num_queries, device, all_processes) / 2

            def layer_losses(self, layer):
                return {"whatever it is": super().layer_losses(layer)["mask"]}

            @staticmethod
            def curve_name(term):
                return term.removeprefix("loss_")

        setattr(Halves, "whatever it is_weight", 2.0)

        class Task(EoMTTask):
            def build_model(self):
                model, processor = super().build_model()
                model.criterion = Halves.from_config(model.config)
                return model, processor

        recipe = tiny_recipe(tmp_path, steps=1, warmup_steps=[0])
        train(recipe, task=Task(recipe), cpu=True, progress=False)
        row = read_history(tmp_path / "history.jsonl")[0]
        curves = [f"whatever it is_layer_{layer}" for layer in range(3)]
        assert [name for name in row if "layer_" in name] == curves
        assert row["loss"] == pytest.approx(2 * sum(row[name] for name in curves), rel=1e-5)
        model = Task(recipe).build_model()[0]
        batches = [{"class_labels": [torch.tensor([0, 1]), torch.tensor([2])]}]
        counts = Task(recipe).normalizers(model, batches, torch.device("cpu"))
        assert counts.tolist() == pytest.approx([1.5, (3 + 0.1 * 11) / 2])

    def test_targets_that_do_not_fit_are_refused(self):
        model = tiny_eomt()
        masks, labels = [torch.zeros(2, 64, 64, dtype=torch.bool)], [torch.tensor([0, 1])]
        boxes = [torch.zeros(1, 4)]
        with pytest.raises(ValueError, match=r"box_labels does not fit class_labels.*2 in image 0"):
            model(torch.zeros(1, 3, 64, 64), mask_labels=masks, class_labels=labels, box_labels=boxes)


class TestTask:
    def test_another_model_is_trained_scored_and_described(self, tmp_path):
        fields = {name: value for name, value in MODEL.items() if "quer" not in name and "point" not in name}
        recipe = tiny_recipe(
            tmp_path,
            model="segvit_extras.task:LinearProbeTask",
            model_config=fields,
            draw=1,
            steps=12,
            learning_rate=1e-2,
            evaluate_every=3.0,
            max_grad_norm=None,
            **SEMANTIC,
        )
        losses = []
        outcome = train(recipe, cpu=True, on_step=lambda step, loss: losses.append(loss), progress=False)
        assert np.mean(losses[-3:]) < np.mean(losses[:3])
        assert [row["not_comparable"] for row in outcome.results["evaluations"]] == [None] * len(
            outcome.results["evaluations"]
        )
        assert outcome.results["metrics"]["pixel_accuracy"] > 0.2
        assert (tmp_path / "predictions" / "step-00000012.png").is_file()
        card = (tmp_path / "model" / "README.md").read_text()
        assert card.startswith("# LinearProbe\n")
        assert f"mean_iou: {outcome.results['metrics']['mean_iou']:.4f}" in card
        loaded = type(outcome.model).from_pretrained(tmp_path / "model")
        pixels = torch.randn(1, 3, 64, 64)
        expected = outcome.model(pixels).masks_queries_logits
        # The same weights at other addresses: matrix products may round differently.
        torch.testing.assert_close(loaded(pixels).masks_queries_logits, expected, rtol=1e-5, atol=1e-6)
        resumed = train(recipe.changed(steps=12), cpu=True, progress=False)
        assert resumed.results["metrics"] == outcome.results["metrics"]

    def test_losses_are_means_over_micro_batches(self, tmp_path):
        fields = {name: value for name, value in MODEL.items() if "quer" not in name and "point" not in name}
        common = {"model": "segvit_extras.task:LinearProbeTask", "model_config": fields, "steps": 1, **SEMANTIC}
        losses = []
        for size in (4, 2):
            recipe = tiny_recipe(tmp_path / str(size), device_batch_size=size, warmup_steps=[0], **common)
            train(recipe, cpu=True, on_step=lambda step, loss: losses.append(loss), progress=False)
        assert losses[0] == pytest.approx(losses[1], rel=0.05)  # void makes the images count unequally

    def test_a_head_beside_the_masks(self, tmp_path):
        recipe = tiny_recipe(tmp_path, model="segvit_extras.box_head:BoxTask", steps=3)
        outcome = train(recipe, cpu=True, progress=False)
        row = read_history(tmp_path / "history.jsonl")[0]
        assert [row[f"box loss/prediction {layer}"] > 0 for layer in (1, 2, 3)] == [True] * 3
        assert "annealing/query layer 1" in row
        settings = json.loads((tmp_path / "model" / "config.json").read_text())
        assert settings["architectures"] == ["EoMTWithBoxes"]
        assert settings["criterion"] == "segvit_extras.box_head:BoxCriterion"
        with torch.inference_mode():
            boxes = outcome.model(torch.randn(2, 3, 64, 64)).query_predictions["boxes"]
        assert boxes.shape == (2, MODEL["num_queries"], 4)
        plain = EoMTForUniversalSegmentation.from_pretrained(tmp_path / "model")
        assert torch.equal(plain.class_predictor.weight, outcome.model.class_predictor.weight)
        on = tiny_recipe(tmp_path / "on", model="segvit_extras.box_head:BoxTask", init=str(tmp_path / "model"))
        model = task_for(on.changed(model_config={})).build_model()[0]
        assert torch.equal(model.bbox_head.weight, outcome.model.bbox_head.weight.cpu())

    def test_the_loss_of_boxes_by_hand(self):
        from segvit_extras.box_head import BoxCriterion, boxes_of

        masks = torch.zeros(3, 8, 4, dtype=torch.bool)
        masks[0, 2:6, 1:3] = masks[1] = True
        boxes = boxes_of(masks)
        assert boxes.tolist() == [[0.25, 0.25, 0.75, 0.75], [0, 0, 1, 1], [0, 0, 1, 1]]
        assert boxes_of(masks[:0]).shape == (0, 4)
        # Queries that are sure of the segments in reverse order, so that it is known which answers for which.
        logits = torch.full((1, 2, 4), -9.0)
        logits[0, 0, 1] = logits[0, 1, 0] = 9.0
        predicted = torch.rand(1, 2, 4)
        prediction = MaskPrediction(logits, torch.where(masks[[1, 0]], 9.0, -9.0)[None], others={"boxes": predicted})
        criterion = BoxCriterion(3, num_points=50)
        _, terms = criterion([prediction], [masks[:2]], [torch.tensor([0, 1])], box_labels=[boxes[:2]])
        expected = (predicted[0, [1, 0]] - boxes[:2]).abs().sum() / 2
        torch.testing.assert_close(terms["loss_box_layer_0"], expected)


class Recorder(TrainerCallback):
    def __init__(self):
        self.events, self.wishes = [], {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert isinstance(model, EoMTForUniversalSegmentation)
        assert (args.max_steps, args.gradient_accumulation_steps, state.max_steps) == (6, 2, 6)
        assert kwargs.keys() >= {"processing_class", "optimizer", "lr_scheduler", "train_dataloader"}
        self.events.append("begin")

    def on_step_begin(self, args, state, control, **kwargs):
        assert {control.should_save, control.should_evaluate} == {False}
        self.events.append(f"({state.global_step}")

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(f"{state.global_step})")
        for flag in self.wishes.get(state.global_step, ()):
            setattr(control, flag, True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        assert logs["loss"] == state.log_history[-1]["loss"]
        self.events.append("log")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.events.append(f"score {metrics['eval_pq']}")

    def on_save(self, args, state, control, **kwargs):
        self.events.append("save")

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.events.append(f"end {state.best_metric}")


class TestCallbacks:
    def test_events_and_wishes(self, tmp_path):
        recipe = tiny_recipe(
            tmp_path, device_batch_size=2, save_every="end", save_every_steps=None, log_every=3, annealing=False
        )
        recorder = Recorder()
        recorder.wishes = {2: ["should_save"], 3: ["should_evaluate"], 4: ["should_evaluate", "should_training_stop"]}
        outcome = train(recipe, task=ScoredTask(recipe, [0.5, 0.25]), callbacks=[recorder], cpu=True, progress=False)
        rows = read_history(tmp_path / "history.jsonl")
        assert recorder.events.count("log") == len([row for row in rows if "loss" in row])
        assert [event for event in recorder.events if event != "log"] == [
            *("begin", "(0", "1)", "(1", "2)", "save", "(2", "3)", "save", "score 0.5", "(3", "4)", "save"),
            *("score 0.25", "end 0.5"),
        ]
        assert outcome.step == 4
        assert outcome.stopped is None
        assert outcome.results["metrics"] == {"pq": 0.5}
        assert [row["step"] for row in outcome.results["evaluations"]] == [3, 4]
        again = Recorder()
        outcome = train(recipe, task=ScoredTask(recipe, []), callbacks=[again], cpu=True, progress=False)
        assert again.events == ["begin", "end 0.5"], "what a callback ended is over"
        assert outcome.step == 4

    def test_early_stopping_of_transformers(self, tmp_path):
        recipe = tiny_recipe(tmp_path, steps=40, evaluate_every=1.0, annealing=False)
        scores = [0.1, 0.3, 0.2, 0.3, 0.9]
        callbacks = [EarlyStoppingCallback(early_stopping_patience=2)]
        outcome = train(recipe, task=ScoredTask(recipe, scores), callbacks=callbacks, cpu=True, progress=False)
        assert outcome.step == 8
        assert outcome.results["metrics"] == {"pq": 0.3}

    def test_what_they_note_survives_an_interruption(self, tmp_path):
        def run(output, scores, stop_at=None):
            def crash(step, loss):
                if step == stop_at:
                    raise KeyboardInterrupt

            recipe = tiny_recipe(output, steps=40, evaluate_every=1.0, annealing=False)
            callback = EarlyStoppingCallback(early_stopping_patience=3)
            return train(
                recipe, task=ScoredTask(recipe, scores), callbacks=[callback], cpu=True, on_step=crash, progress=False
            )

        whole = run(tmp_path / "whole", [0.3, 0.2, 0.2, 0.1])
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", [0.3, 0.2, 0.2], stop_at=7)
        parts = run(tmp_path / "parts", [0.1])
        assert whole.step == parts.step == 8
        assert_equal(saved_tensors(tmp_path / "whole"), saved_tensors(tmp_path / "parts"))

    def test_a_recipe_names_one(self, tmp_path):
        recipe = tiny_recipe(tmp_path, callbacks=["segvit_extras.callback:StopAtLoss"], steps=4)
        assert train(recipe, cpu=True, progress=False).step == 4, "the loss of a tiny model stays above 0.5"
        from segvit_extras.callback import StopAtLoss

        recipe = tiny_recipe(tmp_path / "stopped", steps=4)
        callback = StopAtLoss(loss=1e9)
        outcome = train(recipe, callbacks=[callback], cpu=True, progress=False)
        assert outcome.step == 1
        assert callback.seen == [(1, read_history(tmp_path / "stopped" / "history.jsonl")[0]["loss"])]
        assert "pq" in outcome.results["evaluations"][0]["metrics"], "the end is scored"

    def test_without_any_nothing_changes(self, tmp_path):
        losses = ([], [])
        for index, callbacks in enumerate(([], [Recorder()])):
            recipe = tiny_recipe(tmp_path / str(index), device_batch_size=2)
            train(
                recipe,
                callbacks=callbacks,
                cpu=True,
                on_step=lambda step, loss, index=index: losses[index].append(loss),
                progress=False,
            )
        assert losses[0] == losses[1]


class NoEvents:
    pass


class NeedsArguments(TrainerCallback):
    def __init__(self, threshold):
        self.threshold = threshold


class Unfinished(TrainingTask):
    tasks = ("panoptic",)


HERE = f"{__name__}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"criterion": "segvit_extras.focus:Loss"}, r"criterion=segvit_extras.focus:Loss: .* cannot be imp"),
        ({"criterion": "segvit_extras.focal:Focal"}, "criterion=.*has no Focal; did you mean FocalCriterion"),
        ({"criterion": "segvit_extras.box_head:boxes_of"}, "criterion=.* no class"),
        ({"criterion": "segvit_extras.box_head:BoxTask"}, "criterion=.*has no method .*from_config"),
        ({"metrics": ["segvit_extras.callback:StopAtLoss"]}, "metrics=.*has no method .*add_batch"),
        (
            {"callbacks": [f"{HERE}:NoEvents"]},
            "callbacks=.*has no method that is called; give it one of on_train_begin",
        ),
        ({"callbacks": [f"{HERE}:NeedsArguments"]}, "callbacks=.* is created without arguments .*threshold"),
        ({"model": f"{HERE}:NoEvents"}, "model=.* derive it from hf_segvit.training.tasks.TrainingTask"),
        ({"model": f"{HERE}:Unfinished"}, "model=.* lacks build_model"),
        ({"model_config": {"focal_wait": 1}}, "model_config has no field 'focal_wait'"),
        ({"model_config": {"num_querys": 1}}, "model_config has no field 'num_querys'; did you mean num_queries"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_recipe(tmp_path / "run", data="generated:nothing", **fields), cpu=True)
    assert not (tmp_path / "run").exists()


def test_a_metric_of_ones_own_is_scored_and_decides(tmp_path):
    recipe = tiny_recipe(
        tmp_path, metrics=["segvit_extras.metric:PixelShare"], keep_best="right_pixels", annealing=False, **SEMANTIC
    )
    outcome = train(recipe, cpu=True, progress=False)
    scores = outcome.results["metrics"]
    assert scores["right_pixels"] == pytest.approx(scores["pixel_accuracy"])
    assert outcome.results["selection"] == "best of 1 evaluations by right_pixels"
    row = read_history(tmp_path / "history.jsonl")[-1]
    assert row["score/right_pixels"] == scores["right_pixels"]
    with pytest.raises(ValueError, match="keep_best='right_pixel' is no score of this task; did you mean right_pixels"):
        train(recipe.changed(keep_best="right_pixel", output=str(tmp_path / "other")), cpu=True)


@pytest.fixture
def numpy_folder(tmp_path):
    root = tmp_path / "maps"
    (root / "train").mkdir(parents=True)
    (root / "classes.txt").write_text("sky\nground\n")
    for number in range(4):
        label_map = np.zeros((48, 64), dtype=np.int16)
        label_map[20 + number :] = 1
        label_map[:2] = -1
        pixels = np.stack([100 * label_map + 100] * 3, -1).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "train" / f"{number}.png")
        np.save(root / "train" / f"{number}.npy", label_map)
    return root


@pytest.mark.parametrize("format_name", ["segvit_extras.reader", "numpy_maps"])
def test_a_reader_by_import_path_and_by_entry_point(numpy_folder, format_name):
    assert entry_points("hf_segvit.readers")["numpy_maps"].value == "segvit_extras.reader"
    dataset = reading.load_segmentation_dataset(f"{format_name}:{numpy_folder}")
    assert reading.describe(dataset).id2label == {0: "sky", 1: "ground"}
    entry = dataset[1]
    assert entry["image_id"] == "1"
    assert np.array_equal(entry["segment_map"], np.load(numpy_folder / "train" / "1.npy"))
    assert [row["label_id"] for row in entry["segments"]] == [0, 1]
    (numpy_folder / "train" / "2.npy").unlink()
    with pytest.raises(ValueError, match=r"2\.npy.*has no label map"):
        reading.load_segmentation_dataset(f"{format_name}:{numpy_folder}")


def test_an_augmentation_in_a_recipe(tmp_path):
    from segvit_extras.augmentation import QuarterTurns

    recipe = tiny_recipe(tmp_path, augmentation="segvit_extras.augmentation:QuarterTurns", steps=1, warmup_steps=[0])
    task = task_for(recipe)
    task.build_model()
    samples = task.train_samples()
    found = [samples[0, index] for index in range(7)]
    plain = augmentations.MaskAugmentation((64, 64), **recipe.augmentation_options)
    turns = set()
    for index, sample in enumerate(found):
        entry = task.training_datasets()[0][index]
        same = plain(entry, np.random.default_rng([recipe.seed, 0, index]))
        matching = [turn for turn in range(4) if torch.equal(same.pixels.rot90(turn, (-2, -1)), sample.pixels)]
        turns.update(matching)
        assert torch.equal(same.segment_map.rot90(matching[0], (-2, -1)), sample.segment_map)
    assert len(turns) > 1
    assert train(recipe, cpu=True, progress=False).step == 1
    with pytest.raises(ValueError, match="only squares can be turned"):
        QuarterTurns((64, 32))


def test_a_backbone_family_by_entry_point():

    torch.manual_seed(0)
    theirs = VisionTransformer(32, 16, 2, 2, 32, 48).eval()
    torch.nn.init.normal_(theirs.class_token)
    ours = PlainViTModel.from_backbone(theirs)
    pixels = torch.randn(2, 3, 32, 32)
    from segvit_extras.backbone import features

    with torch.inference_mode():
        torch.testing.assert_close(ours(pixels).last_hidden_state, features(theirs, pixels), rtol=1e-4, atol=1e-5)
    model = EoMTForUniversalSegmentation.from_backbone(theirs, image_size=64, num_labels=3, num_query_layers=1)
    assert model(torch.randn(1, 3, 64, 64)).masks_queries_logits.shape == (1, 200, 16, 16)


def test_the_documentation_shows_these_files():
    text = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
    blocks = re.findall(r"<!-- (tests/extending/\S+) -->\n```(?:python|toml)\n(.*?)```", text, re.DOTALL)
    assert {Path(name).name for name, _ in blocks} >= {
        file.name for file in (EXTRAS / "segvit_extras").glob("*.py") if file.name != "__init__.py"
    }
    for name, code in blocks:
        assert code == (EXTRAS.parents[1] / name).read_text(), f"docs/extending.md differs from {name}"
    named = re.findall(r"segvit_extras\.\w+:\w+", text)
    assert named
    for path in named:
        module, _, name = path.partition(":")
        assert hasattr(__import__(module, fromlist=[name]), name), path
    for key in re.findall(r"^(\w+): segvit_extras", text, re.MULTILINE):
        assert key in Recipe.__dataclass_fields__


def test_the_bare_loop_runs(monkeypatch, capsys):
    file = Path(__file__).parents[1] / "examples" / "bare_loop.py"
    assert len(file.read_text().splitlines()) <= 100
    code: dict = {"__name__": "bare_loop"}
    exec(compile(file.read_text(), str(file), "exec"), code)
    losses = code["main"](steps=6)
    assert len(losses) == 6
    assert all(np.isfinite(losses))
    assert inspect.signature(code["main"]).parameters["steps"].default > 6
