"""What people meet between check-data and a trained model: each fault is refused, or said, before step 1."""

import getpass
import json
import socket

import numpy as np
import pytest
import yaml
from PIL import Image

from hf_segvit.cli import main
from hf_segvit.cli.compare import comparison
from hf_segvit.data.class_checks import object_counts
from hf_segvit.data.reading import describe, load_segmentation_dataset
from hf_segvit.hub import check
from hf_segvit.hub.check import published_data_name, published_path_name, refuse_local_details
from hf_segvit.hub.push import plan_push
from hf_segvit.training.derivation import derive, model_fields
from hf_segvit.training.held_out import hold_out
from hf_segvit.training.loop import train
from hf_segvit.training.preflight import with_classes_of
from hf_segvit.training.recipe import load_recipe
from hf_segvit.training.tasks import task_for
from hf_segvit.training.tasks.eomt import EoMTTask
from hf_segvit.training.tracking import Tracking

from ..tiny_training import MODEL, tiny_recipe

SQUARE = (10, 10, 30, 30)  # x, y, x, y


def coco_folder(root, splits, size=64):
    """A folder of COCO files; `splits` are categories, and the (category, box) pairs of each image."""
    rng = np.random.default_rng(0)
    for split, (categories, images) in splits.items():
        folder = root / split
        folder.mkdir(parents=True)
        content = {"categories": [{"id": 1 + index, "name": name} for index, name in enumerate(categories)]}
        content |= {"images": [], "annotations": []}
        for number, objects in enumerate(images):
            pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
            name = f"{split}{number}.jpg"
            Image.fromarray(pixels).save(folder / name)
            content["images"].append({"id": number + 1, "file_name": name, "height": size, "width": size})
            for category, (left, top, right, bottom), *crowd in objects:
                outline = [left, top, right, top, right, bottom, left, bottom]
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": number + 1,
                        "category_id": 1 + categories.index(category),
                        "segmentation": [outline],
                        "bbox": [left, top, right - left, bottom - top],
                        "area": (right - left) * (bottom - top),
                        "iscrowd": int(bool(crowd)),
                    }
                )
        (folder / "_annotations.coco.json").write_text(json.dumps(content))
    return f"coco_folder:{root}"


def mask_folder(root, names, masks, splits=("",)):
    """A folder of images and masks, with classes a and b."""
    rng = np.random.default_rng(0)
    for split in splits:
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True)
        for name, mask in zip(names, masks, strict=True):
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
                root / "images" / split / f"{name}.jpg"
            )
            Image.fromarray(mask).save(root / "annotations" / split / f"{name}.png")
    (root / "classes.json").write_text('{"0": "a", "1": "b"}')
    return f"mask_folder:{root}"


def half(value=1):
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, 32:] = value
    return mask


def own_recipe(output, data, task="instance", **changes):
    kind = {"instance": "eomt_coco_instance", "semantic": "eomt_semantic"}[task]
    fields = {"data": data, "task": task, "train_split": None, "val_data": None, "val_split": None}
    return tiny_recipe(output, **{**fields, "augmentation": kind, "steps": 2, "save_every_steps": None, **changes})


@pytest.fixture
def said(monkeypatch):
    """The lines that a run says."""
    lines = []
    monkeypatch.setattr("hf_segvit.training.tracking.Tracking.say", lambda self, text: lines.append(text))
    return lines


class TestDataBeforeStep1:
    def test_a_validation_split_without_objects_is_refused_also_on_resume(self, tmp_path):
        data = coco_folder(
            tmp_path / "data", {"train": (["cat"], [[("cat", SQUARE)]] * 2), "valid": (["cat"], [[("cat", SQUARE)]])}
        )
        recipe = own_recipe(tmp_path / "run", data)
        assert train(recipe, cpu=True, progress=False).results["metrics"]
        annotations = tmp_path / "data" / "valid" / "_annotations.coco.json"
        annotations.write_text(json.dumps({**json.loads(annotations.read_text()), "annotations": []}))
        for output in (tmp_path / "run", tmp_path / "other"):
            with pytest.raises(ValueError, match=r"data, split 'valid', has no object that could be scored"):
                train(own_recipe(output, data), cpu=True, progress=False)
        assert not (tmp_path / "other").exists()

    def test_crowds_cannot_be_scored(self, tmp_path):
        splits = {"train": (["cat"], [[("cat", SQUARE)]] * 2), "valid": (["cat"], [[("cat", SQUARE, True)]])}
        with pytest.raises(ValueError, match="split 'valid', has no object"):
            train(own_recipe(tmp_path / "run", coco_folder(tmp_path / "data", splits)), cpu=True, progress=False)

    def test_void_masks_can_be_neither_learnt_nor_scored(self, tmp_path):
        void, good = half(255), half()
        void[:] = 255
        data = mask_folder(tmp_path / "data", ["x", "y"], [good, good], ("train", "val"))
        for split, message in (("val", "split 'val', has no object"), ("train", "split 'train', has no object in any")):
            for name in ("x", "y"):
                Image.fromarray(void).save(tmp_path / "data" / "annotations" / split / f"{name}.png")
            with pytest.raises(ValueError, match=message):
                train(own_recipe(tmp_path / "run", data, "semantic"), cpu=True, progress=False)
            for name in ("x", "y"):
                Image.fromarray(good).save(tmp_path / "data" / "annotations" / split / f"{name}.png")

    def test_pixels_between_outlines_are_no_missing_class(self, tmp_path, said):
        splits = {"train": (["cat"], [[("cat", SQUARE)]] * 2), "valid": (["cat"], [[("cat", SQUARE)]])}
        data = coco_folder(tmp_path / "data", splits)
        train(own_recipe(tmp_path / "run", data, "semantic"), cpu=True, progress=False)
        assert "classes     2: background, cat" in "\n".join(said)
        assert not [line for line in said if "WARNING" in line]

    def test_empty_masks_are_said(self, tmp_path, said):
        void = np.full((64, 64), 255, dtype=np.uint8)
        data = mask_folder(tmp_path / "data", ["x", "y"], [half(), void], ("train", "val"))
        train(own_recipe(tmp_path / "run", data, "semantic"), cpu=True, progress=False)
        assert any(
            "WARNING: 1 of 2 sampled training images have no object that can be learnt, such as" in x for x in said
        )

    def test_one_class_and_void_teaches_nothing(self, tmp_path):
        data = mask_folder(tmp_path / "data", ["x", "y"], [half(255)] * 2, ("train", "val"))
        (tmp_path / "data" / "classes.json").write_text('{"0": "crack", "255": "void"}')
        with pytest.raises(ValueError, match="nothing can be learnt"):
            train(own_recipe(tmp_path / "run", data, "semantic"), cpu=True, progress=False)

    @pytest.mark.parametrize(("trained", "scored"), [(["cat", "dog"], ["cat"]), (["cat"], ["bird", "cat"])])
    def test_other_categories_in_val_are_said_and_common_ones_are_scored(self, tmp_path, said, trained, scored):
        data = coco_folder(
            tmp_path / "data",
            {
                "train": (trained, [[(name, SQUARE) for name in trained]] * 2),
                "valid": (scored, [[(name, SQUARE) for name in scored]]),
            },
        )
        outcome = train(own_recipe(tmp_path / "run", data), cpu=True, progress=False)
        assert "ap" in outcome.results["metrics"]
        different = ({*trained} ^ {*scored}).pop()
        assert any(line.startswith("WARNING") and repr(different) in line for line in said)
        first_step = next(index for index, line in enumerate(said) if line.startswith("step "))
        assert any(repr(different) in line for line in said[:first_step])

    def test_labels_are_translated_by_name(self, tmp_path):
        coco_folder(tmp_path / "one", {"train": (["cat", "dog"], [[("cat", SQUARE), ("dog", SQUARE)]])})
        boxes = [("bird", (0, 0, 9, 9)), ("dog", SQUARE), ("cat", (40, 40, 60, 60))]
        coco_folder(tmp_path / "two", {"val": (["bird", "dog", "cat"], [boxes])})
        train_data, val = (
            load_segmentation_dataset(f"coco_folder:{tmp_path / name}", split=split, task="instance")
            for name, split in (("one", "train"), ("two", "val"))
        )
        assert object_counts(val) == {0: 1, 1: 1, 2: 1}
        translated, description = with_classes_of(val, describe(val), describe(train_data))
        assert description.id2label == {0: "cat", 1: "dog"}
        assert sorted(row["label_id"] for row in translated[0]["segments"]) == [0, 1]
        coco_folder(tmp_path / "three", {"val": (["tree"], [[("tree", SQUARE)]])})
        other = load_segmentation_dataset(f"coco_folder:{tmp_path / 'three'}", split="val", task="instance")
        with pytest.raises(ValueError, match="no class in common: 'tree' against 'cat', 'dog'"):
            with_classes_of(other, describe(other), describe(train_data))

    def test_semantic_maps_are_translated_too(self, tmp_path):
        ours = mask_folder(tmp_path / "one", ["x"], [half()])
        theirs = mask_folder(tmp_path / "two", ["x"], [half()])
        (tmp_path / "two" / "classes.json").write_text('{"0": "b", "1": "c"}')
        one, two = (load_segmentation_dataset(spec, task="semantic") for spec in (ours, theirs))
        entry = with_classes_of(two, describe(two), describe(one))[0][0]
        assert (entry["segment_map"][:, :32] == 1).all()
        assert (entry["segment_map"][:, 32:] == -1).all()
        assert entry["segments"] == [{"id": 1, "label_id": 1, "is_crowd": False}]


def test_the_width_that_follows_is_said_for_points_too(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
    changes = {"model": "vit_p", "task": "points", "augmentation": "vit_p", "augmentation_options": {}}
    for fields in (sizes, {**sizes, "intermediate_size": 48}):
        task = task_for(tiny_recipe(tmp_path / "run", **changes, model_config=fields, image_size=56))
        model, _ = task.build_model()
        assert model.config.intermediate_size == fields.get("intermediate_size", 128)
        remarks = [line for line in task.remarks if "intermediate_size" in line]
        expected = [] if fields is not sizes else ["model_config: intermediate_size is 4 times hidden_size, 128"]
        assert remarks == expected


class TestSettingsBeforeData:
    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("model_config.num_querys=10", "model_config has no field 'num_querys'; did you mean num_queries?"),
            ("model_config.num_queries=abc", "model_config.num_queries='abc' does not fit; expected int"),
            ("augmentation_options.foo=1", "augmentation_options has no key 'foo'"),
            ("augmentation_options.scale_range=3", "augmentation_options.scale_range=3 does not fit"),
            ("augmentation_options.size=9", "augmentation_options has no key 'size'"),
            ("augmentation_options.name=x", "augmentation_options has no key 'name'"),
            ("augmentation_options.color_jitter=1", "augmentation_options.color_jitter=1 does not fit"),
            ("evaluate_every=100", "evaluate_every=100 epochs is 200 steps, but the run ends after 2 steps"),
            ("evaluate_every=7 steps", "evaluate_every=7 steps is 7 steps, but the run ends after 2 steps"),
            ("save_every=7 steps", "save_every=7 steps is 7 steps"),
            ("evaluate_every=soon", "is no interval"),
            ("val_fraction=1", "val_fraction=1"),
        ],
    )
    def test_mistakes_are_one_line(self, tmp_path, word, message, capsys):
        recipe = tiny_recipe(tmp_path / "run", steps=2).to_dict()
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if key != "name"}))
        assert main(["train", str(path), word, "--cpu"]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    def test_a_narrow_model_gets_a_narrow_mlp(self, tmp_path):
        recipe = tiny_recipe(tmp_path, model_config={"hidden_size": 192, "num_attention_heads": 3})
        assert model_fields(recipe)["intermediate_size"] == 768
        stated = tiny_recipe(tmp_path, model_config={"hidden_size": 192, "intermediate_size": 100})
        assert model_fields(stated)["intermediate_size"] == 100

    def test_intervals(self, tmp_path):
        def steps(**changes):
            plan = derive(tiny_recipe(tmp_path, steps=40, save_every_steps=None, **changes), 40)
            return plan.steps_per_epoch, plan.evaluate_every_steps, plan.save_every_steps

        assert steps(evaluate_every="5 steps") == (10, 5, 5)
        assert steps(evaluate_every="2 epochs", save_every="1 epoch") == (10, 20, 10)
        assert steps(evaluate_every=2, save_every=0.5) == (10, 20, 5)
        assert steps(evaluate_every="end", save_every="7 steps") == (10, 40, 7)


class OwnTask(EoMTTask):
    """A task that no recipe names."""


def test_the_task_belongs_to_the_run(tmp_path):
    recipe = tiny_recipe(tmp_path / "own", steps=2, warmup_steps=[0])
    train(recipe, task=OwnTask(recipe), cpu=True, progress=False)
    with pytest.raises(ValueError, match=r"of another run: its task was .*OwnTask and is that of the recipe"):
        train(recipe, cpu=True, progress=False)
    train(recipe, task=OwnTask(recipe), cpu=True, progress=False)
    other = tiny_recipe(tmp_path / "plain", steps=2, warmup_steps=[0])
    train(other, cpu=True, progress=False)
    with pytest.raises(ValueError, match=r"its task was that of the recipe and is .*OwnTask"):
        train(other, task=OwnTask(other), cpu=True, progress=False)


class TestScratch:
    def test_rates_and_sizes_are_those_of_random_weights(self):
        for words in (["init=scratch"], ["init=none"], ["init="], ["backbone=scratch"]):
            recipe = load_recipe("own_semantic", words)
            assert (recipe.init, recipe.backbone) == (None, None), words
            assert recipe.base_learning_rate == 5e-4
            assert recipe.layer_decay == 1.0
            assert recipe.model_config["hidden_size"] == 192
        stated = load_recipe("own_semantic", ["init=scratch", "learning_rate=0.01", "model_config.hidden_size=384"])
        assert stated.learning_rate == 0.01
        assert stated.model_config == {"hidden_size": 384}
        assert load_recipe("own_lora", ["init=scratch"]).lora is None
        assert load_recipe("own_tiny_semantic", ["init=scratch"]).learning_rate == 1e-3, "chosen for random weights"
        assert load_recipe("own_semantic").base_learning_rate == 5e-5
        assert load_recipe("own_points", ["backbone=scratch"]).backbone is None

    def test_it_stays_the_same_recipe(self):
        recipe = load_recipe("own_tiny_instance")
        assert recipe.changed() == recipe
        assert recipe.learning_rate == 1e-3

    def test_missing_weights_name_the_way_out(self, tmp_path):
        recipe = own_recipe(
            tmp_path / "run",
            mask_folder(tmp_path / "data", ["x", "y"], [half()] * 2, ("train", "val")),
            "semantic",
            init=str(tmp_path / "none"),
            model_config={},
        )
        with pytest.raises(ValueError, match=r"init=scratch trains from random ones.*own_tiny_semantic"):
            train(recipe, cpu=True, progress=False)

    @pytest.mark.parametrize("name", ["own_tiny_semantic", "own_semantic", "own_tiny_panoptic"])
    def test_own_recipes_are_explained_without_data_and_weights(self, name, monkeypatch, tmp_path, capsys):
        def no_network(*arguments, **options):
            raise AssertionError("the network was asked")

        monkeypatch.setattr("socket.socket.connect", no_network)
        monkeypatch.chdir(tmp_path)
        assert main(["train", name, "--explain"]) == 0
        printed = capsys.readouterr()
        assert "data/own does not exist here; explained for 100 images of 2 classes" in printed.err
        if name == "own_semantic":
            assert "is not on this machine yet; explained for the architecture" in printed.err
            assert "24 blocks, the last 4 with queries, width 1024" in printed.out
        assert list(tmp_path.iterdir()) == []


class TestHoldOut:
    def names(self, tmp_path, names, seed=0, fraction=0.25):
        spec = mask_folder(tmp_path, names, [half()] * len(names))
        held = hold_out(load_segmentation_dataset(spec), fraction, seed)
        return {name.rpartition("/")[2].removesuffix(".jpg") for name in held.names}, held.explanation

    def test_single_images_by_seed(self, tmp_path):
        names = [f"IMG_{number}" for number in range(8)]
        held, words = self.names(tmp_path / "a", names)
        assert len(held) == 2
        assert "2 of 8 training images are held out (val_fraction=0.25): single images, by seed 0" in words
        assert self.names(tmp_path / "b", names)[0] == held, "wherever the folder lies"
        assert any(self.names(tmp_path / f"seed{seed}", names, seed)[0] != held for seed in (1, 2, 3))

    def test_sequences_stay_together(self, tmp_path):
        names = [f"drive{drive}_frame_{frame:03}" for drive in "abcd" for frame in range(3)]
        held, words = self.names(tmp_path, names)
        assert {name[:6] for name in held} == {next(iter(held))[:6]}
        assert len(held) == 3
        assert "1 of 4 groups" in words

    def test_copies_stay_together(self, tmp_path):
        names = [f"photo{number}_jpg.rf.{copy}{number}" for number in range(5) for copy in "ab"]
        held, _ = self.names(tmp_path, names, fraction=0.2)
        assert len(held) == 2
        assert len({name.partition(".rf.")[0] for name in held}) == 1

    def test_a_folder_without_splits_is_trained(self, tmp_path, said):
        names = [f"x{number}" for number in range(10)]
        spec = mask_folder(tmp_path / "data", names, [half()] * 10)
        with pytest.raises(ValueError, match=r"hold out a part with val_fraction=0.2"):
            train(own_recipe(tmp_path / "run", spec, "semantic"), cpu=True, progress=False)
        recipe = own_recipe(tmp_path / "run", spec, "semantic", val_fraction=0.2)
        outcome = train(recipe, cpu=True, progress=False)
        held = json.loads((tmp_path / "run" / "held_out.json").read_text())
        assert len(held) == 2
        assert outcome.results["split"] == "0.2 of all"
        assert outcome.results["plan"]["pictures"] == 8
        assert any("2 of 10 training images are held out" in line for line in said)
        task = task_for(recipe)
        trained, scored = (
            {row["image"]["member"] for row in data.with_format(None)}
            for data in (task.training_data, task.validation_data(None)[0])
        )
        assert scored == {*held}
        assert not trained & scored
        with pytest.raises(ValueError, match=r"set val_fraction to null"):
            own_recipe(tmp_path / "run", spec, "semantic", val_fraction=0.2, val_split="val")


class TestLocalPaths:
    def test_names_without_places(self):
        assert published_data_name("mask_folder:/home/me/client?classes=/home/me/c.json") == (
            "mask_folder:client?classes=c.json"
        )
        assert published_data_name("yolo:data/own") == "yolo:own"
        assert published_data_name("yolo:C:\\Users\\me\\own") == "yolo:own"
        assert published_data_name("hub:owner/name") == "hub:owner/name"
        assert published_data_name("generated:easy?size=64") == "generated:easy?size=64"
        assert published_path_name("/home/me/runs/boxes/model") == "boxes"
        assert published_path_name("tue-mps/coco") == "tue-mps/coco"

    def test_a_run_tells_no_path(self, tmp_path):
        spec = mask_folder(tmp_path / "client", ["x", "y"], [half()] * 2, ("train", "val"))
        train(own_recipe(tmp_path / "first", spec, "semantic", warmup_steps=[0]), cpu=True, progress=False)
        start = {"init": str(tmp_path / "first" / "model"), "model_config": {}, "warmup_steps": [0]}
        train(own_recipe(tmp_path / "run", spec, "semantic", **start), cpu=True, progress=False)
        for file in ("results.json", "model/README.md", "model/results.json", "model/config.json"):
            assert str(tmp_path) not in (tmp_path / "run" / file).read_text(), file
        assert "mask_folder:client" in (tmp_path / "run" / "model" / "README.md").read_text()
        plan_push(tmp_path / "run" / "model", "me/tiny")
        with open(tmp_path / "run" / "model" / "README.md", "a") as card:
            card.write(f"\nTrained on {tmp_path}/client.\n")
        with pytest.raises(ValueError, match=r"README.md, line \d+: holds the path"):
            plan_push(tmp_path / "run" / "model", "me/tiny")

    @pytest.mark.parametrize(
        "text", ["/home/me/data", "C:\\Users\\me\\x", "C:/Users/me", "~/data/x", '"/srv/a b"', "(/mnt/x)", "`/data/a`"]
    )
    def test_paths_are_refused(self, text):
        with pytest.raises(ValueError, match=r"README.md, line 2: holds the path"):
            refuse_local_details({"README.md": f"a\nTrained on {text}"}, "me/tiny")

    def test_names_of_the_machine_are_refused_unless_public(self, monkeypatch):
        monkeypatch.setattr(getpass, "getuser", lambda: "jane.doe")
        monkeypatch.setattr(socket, "gethostname", lambda: "lab-7.example.org")
        for text in ("by jane.doe", "on lab-7"):
            with pytest.raises(ValueError, match=r"name of this machine"):
                refuse_local_details({"README.md": text}, "me/tiny")
        refuse_local_details({"README.md": "by jane.doe of label-7"}, "jane.doe/tiny")
        refuse_local_details({"README.md": "https://a.org/b/c and/or 1/2/3 /path/to/x model.safetensors"}, "me/tiny")
        assert check._is_public("root", "me/tiny")


def test_a_run_starts_with_its_facts_and_has_one_tensorboard_run(tmp_path, said):
    recipe = tiny_recipe(tmp_path / "run", steps=2, trackers=["tensorboard"], warmup_steps=[0])
    train(recipe, cpu=True, progress=False)
    block = dict(line.split(maxsplit=1) for line in said[0].splitlines())
    assert block["device"].startswith("cpu")
    assert block["images"] == "7 to train on, 2 to score on"
    assert block["classes"] == "6: disc, sky, grass, square, water, triangle"
    assert block["steps"].startswith("2 of 4 images = 1 epoch, scored every 2")
    assert block["folder"] == str(tmp_path / "run")
    assert block["curves"] == f"tensorboard --logdir {tmp_path / 'run' / 'logs'}"
    files = list((tmp_path / "run" / "logs").rglob("events.out.tfevents*"))
    assert len({file.parent for file in files}) == 1


def test_waiting_for_data_is_said_once(tmp_path, said, monkeypatch):
    original = Tracking.step

    def waiting(self, step, outcome, seconds, waited, settings):
        return original(self, step, outcome, seconds, 0.9 * seconds, settings)

    monkeypatch.setattr(Tracking, "step", waiting)
    train(tiny_recipe(tmp_path / "run", steps=14), cpu=True, progress=False)
    assert [line.partition("%")[0] for line in said if "is waiting for data" in line] == ["WARNING: 90"]


class TestCompare:
    def results(self, seed, scores, **recipe):
        rows = [{"step": step, "metrics": {"pq": score}, "not_comparable": None} for step, score in enumerate(scores)]
        fields = {"seed": seed, "name": f"run{seed}", "model_config": MODEL, **recipe}
        selection = f"best of {len(rows)} evaluations by pq"
        return {"recipe": fields, "evaluations": rows, "metrics": {"pq": max(scores)}, "selection": selection}

    def test_seeds_are_one_row_and_evaluations_as_many(self):
        runs = {
            "a": self.results(0, [0.9, 0.1, 0.2, 0.4], learning_rate=0.1),
            "b": self.results(1, [0.1, 0.6], learning_rate=0.1),
            "c": self.results(0, [0.2, 0.3], learning_rate=0.2),
        }
        lines = comparison(runs).splitlines()
        assert lines[0].split("  ")[0] == "learning_rate"
        assert "best pq of 2" in lines[0]
        assert "a, b" in lines[1]
        # Of a count the second and the last evaluation, 0.1 and 0.4: 0.9 is one of four chances.
        assert "0.5000 ± 0.1414 (2)" in lines[1]
        assert lines[2].split()[:2] == ["0.2", "c"]
        assert "2 to 4 evaluations" in lines[3]
        with pytest.raises(ValueError, match="a has no score 'ap', only pq"):
            comparison(runs, "ap")

    def test_the_command(self, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        assert main(["compare", str(tmp_path / "empty")]) == 2
        assert "no finished run among 1 folders" in capsys.readouterr().err
        train(tiny_recipe(tmp_path / "run", steps=1, warmup_steps=[0]), cpu=True, progress=False)
        assert main(["compare", str(tmp_path / "run"), str(tmp_path / "empty")]) == 1
        printed = capsys.readouterr().out
        assert "empty: left out, it has no results.json" in printed
        assert "best pq of 1" in printed
