"""The demo: a tiny EoMT trained on generated scenes, measured, saved, loaded back and drawn.

`run_demo` does all of it, on the training loop that real models are trained on; demo_task.py says what is trained. It
computes on the CPU in float32, so that it does the same everywhere.

What the demo trains, and on what: recipe, model and scenes, for `hf_segvit.demo`.

The recipe is tuned for two minutes of two cores: many small steps, a high learning rate, and scenes that are shifted
and mirrored, since a few thousand are soon known by heart.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation, pipeline

from .atomic_files import replacing
from .data.augmentation import sample_generator
from .data.generated_scenes import GeneratedScenes
from .drawing.segments import contact_sheet, draw_segments
from .inference.loading import quiet_transformers
from .metrics.panoptic_quality import PanopticQuality
from .models.configuration_eomt import EoMTConfig
from .models.image_processing_eomt import EoMTImageProcessor
from .models.modeling_eomt import EoMTForUniversalSegmentation
from .training.loop import train
from .training.recipe import Recipe
from .training.tasks.eomt import EoMTTask

STEPS, WARMUP_STEPS, BATCH_SIZE, LEARNING_RATE = 1500, 50, 8, 2e-3
NUM_TRAINING_SCENES, NUM_TEST_SCENES = 3000, 200
IMAGE_SIZE, SHIFT = 64, 8  # pixels; training scenes are larger by the latter, to be cropped at random

Scene = Mapping[str, Any]  # a row of GeneratedScenes


def demo_recipe(output: Path, seed: int, steps: int) -> Recipe:
    """How the demo trains; it is scored once, at the end."""
    return Recipe(
        name="demo",
        data="generated:easy",
        val_split="test",
        image_size=IMAGE_SIZE,
        steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        betas=[0.9, 0.95],
        weight_decay_mode="matrices",
        max_grad_norm=1.0,
        warmup_steps=[min(WARMUP_STEPS, steps // 4)],
        layer_decay=1.0,
        seed=seed,
        num_workers=0,
        evaluate_every=1e9,
        trackers=[],
        draw=0,
        log_every=max(1, steps // 150),
        output=str(output),
    )


def demo_config(id2label: Mapping[int, str]) -> EoMTConfig:
    """A model of 0.4 million parameters for 64 x 64 pixels: four blocks, two of which see the queries."""
    return EoMTConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=IMAGE_SIZE,
        patch_size=8,
        num_register_tokens=0,
        layer_scale_init_value=None,
        initializer_range=0.1,  # about 1 / sqrt(hidden_size): nothing is pretrained here
        num_queries=12,
        num_query_layers=2,
        train_num_points=128,
        id2label=dict(id2label),
        label2id={name: label for label, name in id2label.items()},
    )


class DemoTask(EoMTTask):
    """The demo's model and scenes, all of which are drawn at once and kept in memory.

    Args:
        recipe: of the demo.
        num_training_scenes: to train on; larger than the model's input by `SHIFT` pixels, to be cropped at random.
        num_test_scenes: to measure on.

    Attributes:
        test_scenes: rows of `GeneratedScenes`.
        answers: of the model for them, once it was scored.
        quality: of the answers.
    """

    def __init__(self, recipe: Recipe, num_training_scenes: int, num_test_scenes: int) -> None:
        super().__init__(recipe)
        size = (IMAGE_SIZE + SHIFT, IMAGE_SIZE + SHIFT)
        self.scenes = GeneratedScenes(num_training_scenes, "train", seed=recipe.seed, size=size)
        test_set = GeneratedScenes(num_test_scenes, "test", seed=recipe.seed, size=(IMAGE_SIZE, IMAGE_SIZE))
        self.test_scenes = [test_set[index] for index in range(num_test_scenes)]
        self.answers: list[dict[str, Any]] = []
        self.quality: dict[str, Any] = {}
        self.processor = EoMTImageProcessor(
            task="panoptic",
            size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            stuff_classes=self.scenes.stuff_classes,
            num_labels=len(self.scenes.id2label),
            threshold=0.5,
        )

    def build_model(self) -> tuple[Any, Any]:
        """The tiny model and its processor."""
        return EoMTForUniversalSegmentation(demo_config(self.scenes.id2label)), self.processor

    def train_samples(self) -> CroppedScenes:
        """The scenes, cropped at random places."""
        return CroppedScenes(self.scenes, self.processor, self.recipe.seed)

    def collator(self, processor: Any, device: torch.device) -> Callable[[list[Any]], dict[str, Any]]:
        """Batches of crops."""
        return collate_crops

    def evaluate(self, model: Any, processor: Any, device: torch.device, limit: int | None) -> dict[str, float]:
        """Panoptic quality on the test scenes."""
        self.answers = segment_scenes(model, processor, self.test_scenes)
        self.quality = panoptic_quality(self.answers, self.test_scenes, self.scenes.id2label, self.scenes.stuff_classes)
        return {name: value for name, value in self.quality.items() if isinstance(value, float)}

    def validation_name(self) -> dict[str, str]:
        """Scenes that no training has seen."""
        return {"task": "panoptic", "dataset": "generated:easy", "split": "test"}


class CroppedScenes:
    """Scenes to train on, each cropped at a random place and mirrored half of the time.

    Args:
        scenes: larger than the model's input by `SHIFT` pixels.
        processor: prepares images and maps.
        seed: of places and mirroring.
    """

    def __init__(self, scenes: GeneratedScenes, processor: EoMTImageProcessor, seed: int) -> None:
        rows = [scenes[index] for index in range(len(scenes))]
        size = scenes.options["size"]
        inputs = processor(
            [row["image"] for row in rows],
            segmentation_maps=[row["segment_map"] for row in rows],
            instance_id_to_semantic_id=[{s["id"]: s["label_id"] for s in row["segments"]} for row in rows],
            size={"height": size[0], "width": size[1]},
        )
        self.pixel_values = inputs["pixel_values"]
        self.mask_labels, self.class_labels = inputs["mask_labels"], inputs["class_labels"]
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pixel_values)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Image (3, H, W), masks (n, H, W) and classes (n,) of what the crop shows."""
        epoch, index = key
        top, left, mirrored = sample_generator(self.seed, epoch, index).integers((SHIFT + 1, SHIFT + 1, 2)).tolist()
        window = (..., slice(top, top + IMAGE_SIZE), slice(left, left + IMAGE_SIZE))
        image, masks = self.pixel_values[index][window], self.mask_labels[index][window]
        if mirrored:
            image, masks = image.flip(-1), masks.flip(-1)
        visible = masks.flatten(1).any(1)
        return image, masks[visible], self.class_labels[index][visible]

    def name(self, index: int) -> str:
        """The scene's number."""
        return f"scene {index}"


def collate_crops(samples: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Any]:
    """The arguments of the model for some samples of `CroppedScenes`."""
    images, masks, classes = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "mask_labels": list(masks), "class_labels": list(classes)}


@torch.inference_mode()
def segment_scenes(model: Any, processor: Any, scenes: Sequence[Scene], **thresholds: float) -> list[dict[str, Any]]:
    """Panoptic answers for scenes; `thresholds` are those of `post_process_panoptic_segmentation`."""
    answers = []
    for start in range(0, len(scenes), 50):
        images = [scene["image"] for scene in scenes[start : start + 50]]
        outputs = model(**processor(images, return_tensors="pt"))
        sizes = [image.shape[:2] for image in images]
        answers += processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes, **thresholds)
    return answers


def panoptic_quality(
    answers: Sequence[Mapping[str, Any]],
    scenes: Sequence[Scene],
    id2label: Mapping[int, str],
    stuff_classes: Sequence[int],
) -> dict[str, Any]:
    """Panoptic quality of answers, rounded, with `pq_per_class` by name."""
    metric = PanopticQuality(num_labels=len(id2label), stuff_classes=stuff_classes)
    truth = [{"segmentation": scene["segment_map"], "segments_info": scene["segments"]} for scene in scenes]
    metric.add_batch(predictions=answers, references=truth)
    result = metric.compute()
    names = [name + group for group in ("", "_things", "_stuff") for name in ("pq", "sq", "rq")]
    return {name: round(result[name], 4) for name in names} | {
        "pq_per_class": {id2label[label]: round(row["pq"], 4) for label, row in result["per_class"].items()}
    }


NUM_DRAWN_SCENES = 8
DRAWING_SCALE = 4


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute with one thread.

    Tensors as small as the demo's are not worth sharing: threads then mostly wait for each other, several times as long
    as they compute where other programs run too. And one thread adds up in the same order on every machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def run_demo(
    folder: Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    num_training_scenes: int = NUM_TRAINING_SCENES,
    num_test_scenes: int = NUM_TEST_SCENES,
    on_step: Callable[[int, float], None] | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the demo.

    Args:
        folder: where `model/`, `demo.png`, `curves.png` and `results.json` go; it must be there.
        seed: of the scenes, the initial weights and the training.
        steps: of training.
        num_training_scenes: scenes that are drawn to train on.
        num_test_scenes: unseen scenes to measure on.
        on_step: called after every step of training with its number, from 1, and its loss.
        report: takes a line of text for people.

    Returns:
        What `results.json` holds: panoptic quality on the unseen scenes (`pq`, `sq`, `rq`, those of things and of
        stuff, and `pq_per_class`), the settings, and the seconds taken.

    Raises:
        ValueError: the loss diverged, or the folder cannot be written to.
        RuntimeError: the model answered differently after it was loaded back.
        KeyboardInterrupt: it was asked to stop.
    """
    start = time.perf_counter()
    report(f"drawing {num_training_scenes} scenes to train on and {num_test_scenes} others to test on")
    losses: list[float] = []

    def note(step: int, loss: float) -> None:
        losses.append(loss)
        if on_step is not None:
            on_step(step, loss)

    with tempfile.TemporaryDirectory() as temporary:
        recipe = demo_recipe(Path(temporary), seed, steps)
        task = DemoTask(recipe, num_training_scenes, num_test_scenes)
        report(f"training for {steps} steps")
        outcome = train(recipe, task=task, cpu=True, on_step=note, progress=False)
        if outcome.stopped is not None:
            raise KeyboardInterrupt
        shutil.copytree(Path(temporary, "model"), folder / "model", dirs_exist_ok=True)
        shutil.copy(Path(temporary, "curves.png"), folder)
    report(f"panoptic quality on {num_test_scenes} unseen scenes: {task.quality['pq']:.3f}")
    with quiet_transformers():
        check_reloaded(folder / "model", outcome.model, outcome.processor, task.test_scenes[:4])
    report("saved, loaded back through the Auto classes and the pipeline: same answers")

    draw_answers(folder / "demo.png", task.test_scenes[:NUM_DRAWN_SCENES], task.answers, outcome.model.config.id2label)
    results = {
        **task.quality,
        "num_test_scenes": num_test_scenes,
        "seed": seed,
        "steps": steps,
        "num_training_scenes": num_training_scenes,
        "num_parameters": outcome.model.num_parameters(),
        "final_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "train_seconds": outcome.results["train_seconds"],
        "total_seconds": round(time.perf_counter() - start, 1),
    }
    with replacing(folder / "results.json") as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def check_reloaded(folder: Path, model: Any, processor: Any, scenes: Sequence[Scene]) -> None:
    """See that a saved folder answers as the model it was saved from, through the Auto classes and the pipeline.

    Raises:
        RuntimeError: an answer differs.
    """
    loaded_model = AutoModelForUniversalSegmentation.from_pretrained(folder)
    loaded_processor = AutoImageProcessor.from_pretrained(folder)
    expected = segment_scenes(model, processor, scenes)
    for one, other in zip(expected, segment_scenes(loaded_model, loaded_processor, scenes), strict=True):
        if (
            not torch.equal(one["segmentation"], other["segmentation"])
            or one["segments_info"] != other["segments_info"]
        ):
            raise RuntimeError(f"the model in {folder} answers differently through the Auto classes than before saving")

    segment = pipeline("image-segmentation", model=str(folder), device="cpu")
    for scene in scenes:
        # One by one, as sums in a larger batch may differ in the last bit; and with the pipeline's own thresholds.
        thresholds = {"threshold": 0.9, "mask_threshold": 0.5, "overlap_mask_area_threshold": 0.5}
        [answer] = segment_scenes(model, processor, [scene], **thresholds)
        rows = segment(Image.fromarray(scene["image"]))
        masks = [255 * (answer["segmentation"] == row["id"]) for row in answer["segments_info"]]
        same = [row["label"] for row in rows] == [model.config.id2label[r["label_id"]] for r in answer["segments_info"]]
        if not same or any((mask.numpy() != row["mask"]).any() for mask, row in zip(masks, rows, strict=True)):
            raise RuntimeError(f"the model in {folder} answers differently through the pipeline than before saving")


def draw_answers(
    path: Path, scenes: Sequence[Scene], answers: Sequence[Mapping[str, Any]], id2label: Mapping[int, str]
) -> None:
    """A page of input, truth and prediction, two scenes a row."""
    panels = []
    for scene, answer in zip(scenes, answers, strict=False):
        image = Image.fromarray(scene["image"])
        large = image.resize((image.width * DRAWING_SCALE, image.height * DRAWING_SCALE), Image.Resampling.BICUBIC)
        truth = draw_segments(image, scene["segment_map"], scene["segments"], id2label, scale=DRAWING_SCALE)
        prediction = draw_segments(
            image, answer["segmentation"], answer["segments_info"], id2label, scale=DRAWING_SCALE
        )
        panels += [large, truth, prediction]
    rows = [panels[start : start + 6] for start in range(0, len(panels), 6)]
    with replacing(path) as partial:
        contact_sheet(rows, ["input", "truth", "prediction"] * min(2, len(scenes))).save(partial)
