"""The demo: train a tiny EoMT on generated scenes, then test and draw it.

`run_demo` trains, evaluates, saves and reloads the model with the same code as for real models: recipe, reader,
augmentation, training loop and evaluation. It computes on the CPU in float32, so that it does the same everywhere.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation, pipeline

from .atomic_files import replacing, replacing_folder, write_json
from .drawing.segments import class_legend, contact_sheet, draw_segments
from .evaluation import EvaluationResult, evaluate
from .inference.loading import quiet_transformers
from .inference.segmenter import Segmenter
from .training.loop import train
from .training.recipe import Recipe
from .training.tasks.eomt import EoMTTask

# Tuned for two minutes on two cores: many small steps at a high learning rate.
STEPS, WARMUP_STEPS, BATCH_SIZE, LEARNING_RATE = 1500, 50, 8, 2e-3
NUM_TRAINING_SCENES, NUM_TEST_SCENES = 3000, 200
# Pixels; training scenes are larger by SHIFT and cropped at random, as the model would soon memorise 3000 fixed ones.
IMAGE_SIZE, SHIFT = 64, 8
NUM_DRAWN_SCENES = 8
DRAWING_SCALE = 4  # labels have no room in 64 x 64 pixels

# 0.4 million parameters for 64 x 64 pixels: four blocks, two of which see the queries.
_MODEL = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "patch_size": 8,
    "num_register_tokens": 0,
    "layer_scale_init_value": None,
    "initializer_range": 0.1,  # about 1 / sqrt(hidden_size): nothing is pretrained here
    "num_queries": 12,
    "num_query_layers": 2,
    "train_num_points": 128,
}


def demo_recipe(
    output: Path,
    seed: int,
    steps: int,
    num_training_scenes: int = NUM_TRAINING_SCENES,
    num_test_scenes: int = NUM_TEST_SCENES,
) -> Recipe:
    """The recipe of the demo, which scores the model once, at the end."""
    return Recipe(
        name="demo",
        data=f"generated:easy?num_scenes={num_training_scenes}&size={IMAGE_SIZE + SHIFT}&seed={seed}",
        train_split="train",
        val_data=f"generated:easy?num_scenes={num_test_scenes}&size={IMAGE_SIZE}&seed={seed}",
        val_split="test",
        model_config=_MODEL,
        image_size=IMAGE_SIZE,
        # The scale is relative to the one that fits the image: with this one crops keep the scenes' own pixels.
        augmentation_options={"scale_range": [1 + SHIFT / IMAGE_SIZE] * 2},
        steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        betas=[0.9, 0.95],
        weight_decay_mode="matrices",
        max_grad_norm=1.0,
        warmup_steps=[min(WARMUP_STEPS, steps // 4)],
        layer_decay=1.0,
        seed=seed,
        num_workers=1,  # draws scenes on the second core; the model uses one, see `one_thread`
        evaluate_every="end",
        trackers=[],
        draw=0,
        log_every=max(1, steps // 150),
        output=str(output),
    )


class DemoTask(EoMTTask):
    """EoMT's task, which also keeps the result of the last evaluation."""

    result: EvaluationResult

    def build_model(self) -> tuple[Any, Any]:
        """Build the tiny model and its processor."""
        model, processor = super().build_model()
        processor.threshold = 0.5  # scores stay low after so short a run; the default would drop good segments
        return model, processor

    def evaluate(self, model: Any, processor: Any, device: torch.device, limit: int | None) -> dict[str, float]:
        """Panoptic quality on the test scenes."""
        dataset, data = self.validation_data(limit)
        segmenter = Segmenter(model, processor, task="panoptic", device=device)
        self.result = evaluate(segmenter, dataset, data.id2label, stuff_classes=data.stuff_classes, batch_size=50)
        return panoptic_quality(self.result)


def panoptic_quality(result: EvaluationResult) -> dict[str, float]:
    """PQ, SQ and RQ of all classes, of things and of stuff, rounded to four digits."""
    names = [name + group for group in ("", "_things", "_stuff") for name in ("pq", "sq", "rq")]
    return {name: round(result.metrics[name], 4) for name in names}


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute with one thread."""
    # With tensors as small as the demo's, threads mostly wait for each other, above all on a busy machine. One thread
    # also adds up in the same order everywhere.
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
    """Run the demo and return the content of `results.json`: panoptic quality, settings and seconds taken.

    Args:
        folder: existing folder for `model/`, `demo.png`, `curves.png` and `results.json`.
        seed: seed of the scenes, the initial weights and the training.
        on_step: called after every training step with its number, from 1, and its loss.
        report: called with lines of text for the user.

    Raises:
        ValueError: the loss diverged, or the folder cannot be written to.
        RuntimeError: the reloaded model answers differently.
        KeyboardInterrupt: the run was asked to stop.
    """
    start = time.perf_counter()
    report(f"training for {steps} steps on {num_training_scenes} scenes, which are drawn as they are needed")
    losses: list[float] = []

    def note(step: int, loss: float) -> None:
        losses.append(loss)
        if on_step is not None:
            on_step(step, loss)

    with tempfile.TemporaryDirectory() as temporary:
        task = DemoTask(demo_recipe(Path(temporary), seed, steps, num_training_scenes, num_test_scenes))
        outcome = train(task.recipe, task=task, cpu=True, on_step=note, progress=False)
        if outcome.stopped is not None:  # the loop caught the signal to save its state, which the demo does not need
            raise KeyboardInterrupt
        with replacing_folder(folder / "model") as partial:
            shutil.copytree(Path(temporary, "model"), partial, dirs_exist_ok=True)
        with replacing(folder / "curves.png") as partial:
            shutil.copyfile(Path(temporary, "curves.png"), partial)
    quality = panoptic_quality(task.result)
    report(f"panoptic quality on {num_test_scenes} unseen scenes: {quality['pq']:.3f}")
    test_scenes, data = task.validation_data(NUM_DRAWN_SCENES)
    with quiet_transformers():
        check_reloaded(folder / "model", outcome.model, outcome.processor, test_scenes[:4]["image"])
    report("saved, loaded back through the Auto classes and the pipeline: same answers")

    segmenter = Segmenter(outcome.model, outcome.processor, task="panoptic", device="cpu")
    answers = segmenter.answers(test_scenes[:]["image"])
    draw_answers(folder / "demo.png", list(test_scenes), answers, data.id2label)
    classes = sorted(task.result.classes, key=lambda row: row["label_id"])
    results = {
        **quality,
        "pq_per_class": {row["label"]: round(row["pq"], 4) for row in classes},
        "num_test_scenes": num_test_scenes,
        "seed": seed,
        "steps": steps,
        "num_training_scenes": num_training_scenes,
        "num_parameters": outcome.model.num_parameters(),
        "final_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),  # one batch of eight alone is noisy
        "train_seconds": outcome.results["train_seconds"],
        "total_seconds": round(time.perf_counter() - start, 1),
    }
    write_json(folder / "results.json", results)
    return results


def check_reloaded(folder: Path, model: Any, processor: Any, images: Sequence[Image.Image]) -> None:
    """Raise `RuntimeError` if a saved model answers differently through the Auto classes or the pipeline."""
    saved = Segmenter(model, processor, task="panoptic", device="cpu")
    loaded_model = AutoModelForUniversalSegmentation.from_pretrained(folder)
    loaded = Segmenter(loaded_model, AutoImageProcessor.from_pretrained(folder), task="panoptic", device="cpu")
    for before, after in zip(saved.answers(images), loaded.answers(images), strict=True):
        same_map = torch.equal(before["segmentation"], after["segmentation"])
        if not same_map or before["segments_info"] != after["segments_info"]:
            raise RuntimeError(f"the model in {folder} answers differently through the Auto classes than before saving")

    segment = pipeline("image-segmentation", model=str(folder), device="cpu")
    thresholds = {"threshold": 0.9, "mask_threshold": 0.5, "overlap_mask_area_threshold": 0.5}  # the pipeline's own
    for image in images:
        # One by one, as the pipeline does: in a larger batch sums may differ in the last bit.
        with torch.inference_mode():
            outputs = model(**processor(image, return_tensors="pt"))
        sizes = [(image.height, image.width)]
        (answer,) = processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes, **thresholds)
        rows = segment(image)
        masks = [255 * (answer["segmentation"] == row["id"]) for row in answer["segments_info"]]
        same = [row["label"] for row in rows] == [model.config.id2label[r["label_id"]] for r in answer["segments_info"]]
        if not same or any((mask.numpy() != row["mask"]).any() for mask, row in zip(masks, rows, strict=True)):
            raise RuntimeError(f"the model in {folder} answers differently through the pipeline than before saving")


def draw_answers(
    path: Path, scenes: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]], id2label: Mapping[int, str]
) -> None:
    """Draw input, truth and prediction of all scenes, two scenes a row, into a file."""
    panels = []
    for scene, answer in zip(scenes, answers, strict=True):
        image = scene["image"]
        large = image.resize((image.width * DRAWING_SCALE, image.height * DRAWING_SCALE), Image.Resampling.BICUBIC)
        truth = draw_segments(image, scene["segment_map"], scene["segments"], id2label, scale=DRAWING_SCALE)
        prediction = draw_segments(
            image, answer["segmentation"], answer["segments_info"], id2label, scale=DRAWING_SCALE
        )
        panels += [large, truth, prediction]
    rows = [panels[start : start + 6] for start in range(0, len(panels), 6)]
    titles = ["input", "truth", "prediction"] * min(2, len(scenes))
    drawn = [*(scene["segments"] for scene in scenes), *(answer["segments_info"] for answer in answers)]
    with replacing(path) as partial:
        contact_sheet(rows, titles, entries=class_legend(drawn, id2label)).save(partial)
