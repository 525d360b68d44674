"""`hf-segvit demo`: a shrunken run writes everything, training really learns, and the full run reaches its quality."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segvit import EoMTForUniversalSegmentation, EoMTImageProcessor
from hf_segvit.cli import main
from hf_segvit.data.augmentation import AugmentedSample
from hf_segvit.data.collation import binary_masks
from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.demo import IMAGE_SIZE, SHIFT, DemoTask, check_reloaded, demo_recipe, run_demo
from hf_segvit.training.loop import train

SMALL = {"steps": 3, "num_training_scenes": 12, "num_test_scenes": 4}


@pytest.fixture(scope="module")
def shrunken(tmp_path_factory):
    """The folder of a shrunken run, its results and what it reported."""
    folder = tmp_path_factory.mktemp("demo")
    lines: list[str] = []
    steps: list[tuple[int, float]] = []
    results = run_demo(folder, seed=5, on_step=lambda *step: steps.append(step), report=lines.append, **SMALL)
    return folder, results, lines, steps


def test_writes_all_it_promises(shrunken):
    folder, results, lines, steps = shrunken
    assert {path.name for path in folder.iterdir()} == {"demo.png", "curves.png", "results.json", "model"}
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["steps"] == len(steps) == 3
    assert [number for number, _ in steps] == [1, 2, 3]
    assert 0 <= results["pq"] <= 1
    scenes = GeneratedScenes(4, "test", seed=5, size=(IMAGE_SIZE, IMAGE_SIZE))
    present = {scenes.id2label[row["label_id"]] for scene in scenes for row in scene["segments"]}
    assert present <= set(results["pq_per_class"]) <= set(scenes.id2label.values())
    assert all(0 <= value <= 1 for value in results["pq_per_class"].values())
    assert any("same answers" in line for line in lines)
    # Four scenes, two a row, three panels of four times their size each.
    width, height = Image.open(folder / "demo.png").size
    assert width > 6 * 4 * IMAGE_SIZE
    assert height > 2 * 4 * IMAGE_SIZE
    assert np.asarray(Image.open(folder / "curves.png").convert("L")).min() < 100, "the curves are not blank"


def test_the_saved_model_is_annealed_and_loads(shrunken):
    folder = shrunken[0] / "model"
    model = EoMTForUniversalSegmentation.from_pretrained(folder)
    assert model.config.masked_attention_probabilities == [0.0, 0.0]
    processor = EoMTImageProcessor.from_pretrained(folder)
    assert processor.stuff_classes == [1, 2, 4]
    assert processor.task == "panoptic"


def test_the_same_seed_gives_the_same_run(shrunken, tmp_path):
    _, results, _, steps = shrunken
    again: list[tuple[int, float]] = []
    run_demo(tmp_path, seed=5, on_step=lambda *step: again.append(step), report=lambda text: None, **SMALL)
    assert again == steps
    assert json.loads((tmp_path / "results.json").read_text())["pq"] == results["pq"]
    other: list[tuple[int, float]] = []
    run_demo(tmp_path, seed=6, on_step=lambda *step: other.append(step), report=lambda text: None, **SMALL)
    assert other != steps


def test_a_reload_that_differs_is_noticed(shrunken):
    folder = shrunken[0] / "model"
    processor = EoMTImageProcessor.from_pretrained(folder)
    scenes = [Image.fromarray(scene["image"]) for scene in GeneratedScenes(2, "test", size=(IMAGE_SIZE, IMAGE_SIZE))]
    model = EoMTForUniversalSegmentation.from_pretrained(folder)
    with torch.no_grad():  # everything is a triangle, with certainty
        model.class_predictor.bias.copy_(torch.tensor([0.0, 0, 0, 0, 0, 50, 0]))
    with pytest.raises(RuntimeError, match="answers differently through the Auto classes"):
        check_reloaded(folder, model, processor, scenes)


def test_samples_are_crops_of_the_scenes(tmp_path):
    scenes = GeneratedScenes(5, "train", seed=2, size=(IMAGE_SIZE + SHIFT, IMAGE_SIZE + SHIFT))
    samples = DemoTask(demo_recipe(tmp_path, seed=2, steps=4, num_training_scenes=5)).train_samples()
    assert len(samples) == 5
    places, mirrored = set(), 0
    for epoch in range(4):
        for expected in range(5):
            sample = samples[epoch, expected]
            index, crop, flipped = locate(sample.pixels.permute(1, 2, 0).numpy(), scenes)
            assert index == expected
            places.add((crop[0].start, crop[1].start))
            mirrored += flipped
            segment_map = scenes[index]["segment_map"][crop]
            segment_map = segment_map[:, ::-1] if flipped else segment_map
            rows = [row for row in scenes[index]["segments"] if (segment_map == row["id"]).any()]
            assert sample.labels.tolist() == [row["label_id"] for row in rows]
            masks = binary_masks(sample.segment_map, len(rows)).numpy()
            assert (masks == np.stack([segment_map == row["id"] for row in rows])).all()
    assert len(places) > 10
    assert 3 < mirrored < 17


def locate(image: np.ndarray, scenes: GeneratedScenes):
    """Which scene a crop is from, where, and whether it is mirrored."""
    for index, scene in enumerate(scenes):
        for flipped in (False, True):
            wanted = image[:, ::-1] if flipped else image
            for top in range(SHIFT + 1):
                for left in range(SHIFT + 1):
                    crop = (slice(top, top + IMAGE_SIZE), slice(left, left + IMAGE_SIZE))
                    if (scene["image"][crop] == wanted).all():
                        return index, crop, flipped
    raise AssertionError("the crop is in no scene")


class OneSample:
    """The same sample under every key."""

    def __init__(self, sample):
        self.sample = sample

    def __len__(self):
        return 8

    def __getitem__(self, key):
        return self.sample


class Halves(DemoTask):
    """One image whose halves are two classes, over and over."""

    def train_samples(self):
        self.pixels = torch.randint(256, (3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
        self.segment_map = torch.zeros(IMAGE_SIZE, IMAGE_SIZE, dtype=torch.int8)
        self.segment_map[:, IMAGE_SIZE // 2 :] = 1
        return OneSample(AugmentedSample("halves", self.pixels, self.segment_map, torch.tensor([0, 1])))

    def evaluate(self, model, processor, device, limit):
        self.probabilities_at_the_end = list(model.config.masked_attention_probabilities)
        return {"pq": 0.0}


def test_training_learns_a_batch_by_heart(tmp_path):
    """On one image the loss must fall by much, which it does not if gradients, matching or schedules are wrong."""
    recipe = demo_recipe(tmp_path, seed=0, steps=60).changed(batch_size=2, warmup_steps=[5])
    task, losses = Halves(recipe), []
    outcome = train(recipe, task=task, cpu=True, on_step=lambda step, loss: losses.append(loss), progress=False)
    model = outcome.model
    assert losses[-1] < 0.1 * losses[0]
    assert not model.training
    assert task.probabilities_at_the_end == model.config.masked_attention_probabilities == [0.0, 0.0]
    with torch.inference_mode():
        outputs = model(**outcome.processor(task.pixels, return_tensors="pt"))
    best = outputs.class_queries_logits[0, :, :2].argmax(0)
    predicted = torch.nn.functional.interpolate(outputs.masks_queries_logits, IMAGE_SIZE, mode="bilinear")[0, best]
    assert ((predicted > 0) == binary_masks(task.segment_map, 2)).float().mean() > 0.97


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--seed", "-1"], "--seed -1 must be between 0"),
        (["--output", "FILE"], "it exists and is not a folder"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments, message, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", *(word.replace("FILE", str(tmp_path / "file")) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_command_prints_the_quality(tmp_path, capsys, monkeypatch):
    for name, value in (("NUM_TRAINING_SCENES", 8), ("NUM_TEST_SCENES", 4)):
        monkeypatch.setitem(run_demo.__wrapped__.__kwdefaults__, name.lower(), value)
    assert main(["demo", "--steps", "2", "--output", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("panoptic quality ")
    assert str(tmp_path / "new" / "demo.png") in printed.out
    assert "Traceback" not in printed.err


@pytest.mark.slow
def test_the_full_demo_really_learns(tmp_path):
    results = run_demo(tmp_path, report=lambda text: None)
    assert results["num_test_scenes"] >= 100
    assert results["pq"] > 0.75  # 0.87 when it was tuned; another machine's arithmetic may take another course
    assert results["pq_things"] > 0.5
