"""The demo: a tiny EoMT trained on generated scenes, measured, saved, loaded back and drawn.

`run_demo` does all of it, on the training loop that real models are trained on; demo_task.py says what is trained. It
computes on the CPU in float32, so that it does the same everywhere.
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
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation, pipeline

from .atomic_files import replacing
from .demo_task import NUM_TEST_SCENES, NUM_TRAINING_SCENES, STEPS, DemoTask, Scene, demo_recipe, segment_scenes
from .drawing.segments import contact_sheet, draw_segments
from .inference.loading import quiet_transformers
from .training.loop import train

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
