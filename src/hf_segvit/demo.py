"""The demo: a tiny EoMT trained on generated scenes, measured, saved, loaded back and drawn.

`run_demo` does all of it with what real models are trained with: a recipe, the reader of generated scenes, EoMT's
augmentation, the training loop and the evaluation. It computes on the CPU in float32, so that it does the same
everywhere. The recipe is tuned for two minutes of two cores: many small steps, a high learning rate, and scenes that
are shifted and mirrored, since a few thousand are soon known by heart.
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

from .atomic_files import replacing, write_json
from .drawing.segments import contact_sheet, draw_segments
from .evaluation import EvaluationResult, evaluate
from .inference.loading import quiet_transformers
from .inference.segmenter import Segmenter
from .training.loop import train
from .training.recipe import Recipe
from .training.tasks.eomt import EoMTTask

STEPS, WARMUP_STEPS, BATCH_SIZE, LEARNING_RATE = 1500, 50, 8, 2e-3
NUM_TRAINING_SCENES, NUM_TEST_SCENES = 3000, 200
IMAGE_SIZE, SHIFT = 64, 8  # pixels; training scenes are larger by the latter, to be cropped at random
NUM_DRAWN_SCENES = 8
DRAWING_SCALE = 4

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
    """How the demo trains, and on what; it is scored once, at the end."""
    return Recipe(
        name="demo",
        data=f"generated:easy?num_scenes={num_training_scenes}&size={IMAGE_SIZE + SHIFT}&seed={seed}",
        train_split="train",
        val_data=f"generated:easy?num_scenes={num_test_scenes}&size={IMAGE_SIZE}&seed={seed}",
        val_split="test",
        model_config=_MODEL,
        image_size=IMAGE_SIZE,
        # The scale is relative to the one that fits: at this one crops keep the scenes' pixels.
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
        num_workers=1,  # draws scenes on the core that the model leaves free
        evaluate_every=1e9,
        trackers=[],
        draw=0,
        log_every=max(1, steps // 150),
        output=str(output),
    )


class DemoTask(EoMTTask):
    """EoMT's task, with all that the evaluation at the end finds.

    Attributes:
        result: of the last evaluation.
    """

    result: EvaluationResult

    def build_model(self) -> tuple[Any, Any]:
        """The tiny model and its processor; a segment counts from a score of 0.5, as so short a training doubts."""
        model, processor = super().build_model()
        processor.threshold = 0.5
        return model, processor

    def evaluate(self, model: Any, processor: Any, device: torch.device, limit: int | None) -> dict[str, float]:
        """Panoptic quality on the test scenes."""
        dataset, data = self.validation_data(limit)
        segmenter = Segmenter(model, processor, task="panoptic", device=device)
        self.result = evaluate(segmenter, dataset, data.id2label, stuff_classes=data.stuff_classes, batch_size=50)
        return panoptic_quality(self.result)


def panoptic_quality(result: EvaluationResult) -> dict[str, float]:
    """PQ, SQ and RQ of all classes, things and stuff, rounded."""
    names = [name + group for group in ("", "_things", "_stuff") for name in ("pq", "sq", "rq")]
    return {name: round(result.metrics[name], 4) for name in names}


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
    report(f"training for {steps} steps on {num_training_scenes} scenes, which are drawn as they are needed")
    losses: list[float] = []

    def note(step: int, loss: float) -> None:
        losses.append(loss)
        if on_step is not None:
            on_step(step, loss)

    with tempfile.TemporaryDirectory() as temporary:
        task = DemoTask(demo_recipe(Path(temporary), seed, steps, num_training_scenes, num_test_scenes))
        outcome = train(task.recipe, task=task, cpu=True, on_step=note, progress=False)
        if outcome.stopped is not None:
            raise KeyboardInterrupt
        shutil.copytree(Path(temporary, "model"), folder / "model", dirs_exist_ok=True)
        shutil.copy(Path(temporary, "curves.png"), folder)
    quality = panoptic_quality(task.result)
    report(f"panoptic quality on {num_test_scenes} unseen scenes: {quality['pq']:.3f}")
    test_scenes, data = task.validation_data(NUM_DRAWN_SCENES)
    with quiet_transformers():
        check_reloaded(folder / "model", outcome.model, outcome.processor, test_scenes[:4]["image"])
    report("saved, loaded back through the Auto classes and the pipeline: same answers")

    answers = Segmenter(outcome.model, outcome.processor, task="panoptic", device="cpu").answers(
        test_scenes[:]["image"]
    )
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
        "final_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "train_seconds": outcome.results["train_seconds"],
        "total_seconds": round(time.perf_counter() - start, 1),
    }
    write_json(folder / "results.json", results)
    return results


def check_reloaded(folder: Path, model: Any, processor: Any, images: Sequence[Image.Image]) -> None:
    """See that a saved folder answers as the model it was saved from, through the Auto classes and the pipeline.

    Raises:
        RuntimeError: an answer differs.
    """
    segmenter = Segmenter(model, processor, task="panoptic", device="cpu")
    loaded_model = AutoModelForUniversalSegmentation.from_pretrained(folder)
    again = Segmenter(loaded_model, AutoImageProcessor.from_pretrained(folder), task="panoptic", device="cpu")
    for one, other in zip(segmenter.answers(images), again.answers(images), strict=True):
        if (
            not torch.equal(one["segmentation"], other["segmentation"])
            or one["segments_info"] != other["segments_info"]
        ):
            raise RuntimeError(f"the model in {folder} answers differently through the Auto classes than before saving")

    ask = pipeline("image-segmentation", model=str(folder), device="cpu")
    for image in images:
        # One by one, as sums in a larger batch may differ in the last bit; and with the pipeline's own thresholds.
        thresholds = {"threshold": 0.9, "mask_threshold": 0.5, "overlap_mask_area_threshold": 0.5}
        with torch.inference_mode():
            outputs = model(**processor(image, return_tensors="pt"))
        sizes = [(image.height, image.width)]
        (answer,) = processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes, **thresholds)
        rows = ask(image)
        masks = [255 * (answer["segmentation"] == row["id"]) for row in answer["segments_info"]]
        same = [row["label"] for row in rows] == [model.config.id2label[r["label_id"]] for r in answer["segments_info"]]
        if not same or any((mask.numpy() != row["mask"]).any() for mask, row in zip(masks, rows, strict=True)):
            raise RuntimeError(f"the model in {folder} answers differently through the pipeline than before saving")


def draw_answers(
    path: Path, scenes: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]], id2label: Mapping[int, str]
) -> None:
    """A page of input, truth and prediction, two scenes a row."""
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
    with replacing(path) as partial:
        contact_sheet(rows, ["input", "truth", "prediction"] * min(2, len(scenes))).save(partial)
