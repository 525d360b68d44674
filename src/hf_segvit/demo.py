"""The demo: a tiny EoMT trained on generated scenes, measured, saved, loaded back and drawn.

`run_demo` does all of it; `demo_config` is the model. It computes on the CPU in float32, so that it does the same
everywhere. The recipe is tuned for two minutes of two cores: many small steps, a high learning rate, and scenes that
are shifted and mirrored, since a few thousand are soon known by heart.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation, pipeline

from .atomic_files import replacing
from .data.generated_scenes import GeneratedScenes
from .metrics.panoptic_quality import PanopticQuality
from .model_loading import quiet_transformers
from .models.configuration_eomt import EoMTConfig
from .models.image_processing_eomt import EoMTImageProcessor
from .models.modeling_eomt import EoMTForUniversalSegmentation
from .training.demo_loop import learning_rate_factor, masked_attention_probabilities, train
from .visualize import contact_sheet, draw_segments, plot_curves

STEPS, WARMUP_STEPS, BATCH_SIZE, LEARNING_RATE = 1500, 50, 8, 2e-3
NUM_TRAINING_SCENES, NUM_TEST_SCENES, NUM_DRAWN_SCENES = 3000, 200, 8
IMAGE_SIZE, SHIFT = 64, 8  # pixels; training scenes are larger by the latter, to be cropped at random
DRAWING_SCALE = 4

Scene = Mapping[str, Any]  # a row of GeneratedScenes


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
        folder: where `model/`, `demo.png`, `loss.png` and `results.json` go; it must be there.
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
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    report(f"drawing {num_training_scenes} scenes to train on and {num_test_scenes} others to test on")
    size = (IMAGE_SIZE + SHIFT, IMAGE_SIZE + SHIFT)
    train_scenes = GeneratedScenes(num_training_scenes, "train", seed=seed, size=size)
    test_set = GeneratedScenes(num_test_scenes, "test", seed=seed, size=(IMAGE_SIZE, IMAGE_SIZE))
    test_scenes = [test_set[index] for index in range(num_test_scenes)]
    processor = EoMTImageProcessor(
        task="panoptic",
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        stuff_classes=train_scenes.stuff_classes,
        num_labels=len(train_scenes.id2label),
        threshold=0.5,
    )
    model = EoMTForUniversalSegmentation(demo_config(train_scenes.id2label))
    num_parameters = model.num_parameters()
    report(f"training a model of {num_parameters / 1e6:.1f} million parameters for {steps} steps")
    batches = RandomBatches(train_scenes, processor, seed)
    train_start = time.perf_counter()
    losses = train(
        model,
        batches,
        steps=steps,
        learning_rate=LEARNING_RATE,
        warmup_steps=min(WARMUP_STEPS, steps // 4),
        betas=(0.9, 0.95),
        on_step=on_step,
    )
    train_seconds = time.perf_counter() - train_start

    answers = segment_scenes(model, processor, test_scenes)
    quality = panoptic_quality(answers, test_scenes, train_scenes.id2label, train_scenes.stuff_classes)
    report(f"panoptic quality on {num_test_scenes} unseen scenes: {quality['pq']:.3f}")
    with quiet_transformers():
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        check_reloaded(folder / "model", model, processor, test_scenes[:4])
    report("saved, loaded back through the Auto classes and the pipeline: same answers")

    draw_answers(folder / "demo.png", test_scenes[:NUM_DRAWN_SCENES], answers, train_scenes.id2label)
    plot_training(folder / "loss.png", losses, model.config.num_query_layers)
    results = {
        **quality,
        "num_test_scenes": num_test_scenes,
        "seed": seed,
        "steps": steps,
        "num_training_scenes": num_training_scenes,
        "num_parameters": num_parameters,
        "final_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(time.perf_counter() - start, 1),
    }
    with replacing(folder / "results.json") as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


class RandomBatches:
    """Batches of scenes in random order, each scene cropped at a random place and mirrored half of the time.

    Args:
        scenes: larger than the model's input by `SHIFT` pixels.
        processor: prepares pictures and maps.
        seed: of order, places and mirroring.
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
        self.generator = torch.Generator().manual_seed(seed)
        self.order: list[int] = []

    def __call__(self, step: int) -> dict[str, Any]:
        """The arguments of the model for the next step; `step` is not looked at, as scenes come in rounds."""
        while len(self.order) < BATCH_SIZE:
            self.order += torch.randperm(len(self.pixel_values), generator=self.generator).tolist()
        batch, self.order = self.order[:BATCH_SIZE], self.order[BATCH_SIZE:]
        pictures, masks, classes = [], [], []
        for index, (top, left, mirrored) in zip(batch, self._places(), strict=True):
            window = (..., slice(top, top + IMAGE_SIZE), slice(left, left + IMAGE_SIZE))
            picture, scene_masks = self.pixel_values[index][window], self.mask_labels[index][window]
            if mirrored:
                picture, scene_masks = picture.flip(-1), scene_masks.flip(-1)
            visible = scene_masks.flatten(1).any(1)
            pictures.append(picture)
            masks.append(scene_masks[visible])
            classes.append(self.class_labels[index][visible])
        return {"pixel_values": torch.stack(pictures), "mask_labels": masks, "class_labels": classes}

    def _places(self) -> list[list[int]]:
        corners = torch.randint(SHIFT + 1, (BATCH_SIZE, 2), generator=self.generator)
        mirrored = torch.randint(2, (BATCH_SIZE, 1), generator=self.generator)
        return torch.cat([corners, mirrored], dim=1).tolist()


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


def plot_training(path: Path, losses: Sequence[float], num_query_layers: int) -> None:
    """Loss, learning rate and the annealing of masked attention, by step."""
    steps = len(losses)
    warmup_steps = min(WARMUP_STEPS, steps // 4)
    # Few enough points that the schedules are drawn as they are: longer histories are smoothed.
    some = range(0, steps, -(-steps // 40))
    history = {
        "loss": list(enumerate(losses, start=1)),
        "learning rate": [(s + 1, LEARNING_RATE * learning_rate_factor(s, steps, warmup_steps)) for s in some],
    }
    for layer in range(num_query_layers):
        history[f"masked attention probability/query layer {layer + 1}"] = [
            (s + 1, masked_attention_probabilities(s, steps, num_query_layers)[layer]) for s in some
        ]
    plot_curves(history, path)
