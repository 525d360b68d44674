"""Table 7 of the EoMT paper in miniature: the benefit of masked attention, and the cost of annealing it.

Small models are trained from scratch on generated scenes ("medium") with masked attention always, never, or annealed as
in the paper, and scored on 200 unseen scenes with and without masks:

    python benchmarks/mask_annealing.py run annealed --seed 0 --output runs/annealing    # masked, never, annealed
    python benchmarks/mask_annealing.py table --output runs/annealing

A run uses one thread. An interrupted run resumes from its last checkpoint; a finished one is not repeated.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measuring import machine
from tables import cell, read_results, write_json
from torch.optim import AdamW
from tqdm import tqdm

from hf_segvit import EoMTConfig, EoMTForUniversalSegmentation, EoMTImageProcessor
from hf_segvit.data.generated_scenes import GeneratedScenes, scene_labels, scene_stuff_classes
from hf_segvit.demo import panoptic_quality
from hf_segvit.drawing.segments import plot_curves
from hf_segvit.evaluation import evaluate
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.training.annealing import MaskAnnealing

MODES = ("masked", "never", "annealed")
DIFFICULTY, IMAGE_SIZE, SHIFT = "medium", 96, 8  # training scenes are larger by SHIFT pixels, to be cropped at random
NUM_TRAINING_SCENES, NUM_TEST_SCENES = 6000, 200
STEPS, WARMUP_STEPS, BATCH_SIZE, LEARNING_RATE = 3000, 150, 8, 1.5e-3
POWER, WEIGHT_DECAY, MAX_GRAD_NORM = 0.9, 0.05, 1.0
CHECKPOINT_EVERY = 250  # steps


def model_config(mode: str) -> EoMTConfig:
    """A model of 1.5 million parameters: six blocks, three of which see the queries."""
    id2label = scene_labels(DIFFICULTY)
    return EoMTConfig(
        hidden_size=144,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=432,
        image_size=IMAGE_SIZE,
        patch_size=8,
        num_register_tokens=0,
        layer_scale_init_value=None,
        initializer_range=0.08,  # about 1 / sqrt(hidden_size): nothing is pretrained here
        num_queries=24,
        num_query_layers=3,
        train_num_points=256,
        masked_attention=mode != "never",
        id2label=id2label,
        label2id={name: label for label, name in id2label.items()},
    )


def draw_scenes(difficulty: str, seed: int, num_scenes: int) -> dict[str, Any]:
    """Training scenes: `pixels` (N, 3, H, W), `maps` (N, H, W) of segment ids, `labels` of the segments of each."""
    size = (IMAGE_SIZE + SHIFT, IMAGE_SIZE + SHIFT)
    scenes = GeneratedScenes(num_scenes, "train", seed=seed, size=size, difficulty=difficulty)
    rows = [scenes[index] for index in tqdm(range(len(scenes)), desc="drawing scenes", disable=None)]
    return {
        "pixels": torch.stack([torch.from_numpy(row["image"]).permute(2, 0, 1) for row in rows]),
        "maps": torch.stack([torch.from_numpy(row["segment_map"]).to(torch.int8) for row in rows]),
        "labels": [torch.tensor([segment["label_id"] for segment in row["segments"]]) for row in rows],
    }


class TrainingScenes:
    """Batches of scenes, cropped at random and mirrored half of the time; batch `step` depends on nothing else.

    Args:
        content: of `draw_scenes`.
        seed: of order, crops and mirroring.
    """

    def __init__(self, content: dict[str, Any], seed: int) -> None:
        self.pixels, self.maps, self.labels, self.seed = content["pixels"], content["maps"], content["labels"], seed
        processor = EoMTImageProcessor()
        self.mean = 255 * torch.tensor(processor.image_mean)[:, None, None]
        self.std = 255 * torch.tensor(processor.image_std)[:, None, None]

    def batch(self, step: int) -> dict[str, Any]:
        """`pixel_values`, `mask_labels` and `class_labels` of a step."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        images, masks, classes = [], [], []
        for index in torch.randint(len(self.pixels), (BATCH_SIZE,), generator=generator).tolist():
            top, left = torch.randint(SHIFT + 1, (2,), generator=generator).tolist()
            window = (..., slice(top, top + IMAGE_SIZE), slice(left, left + IMAGE_SIZE))
            image, id_map = self.pixels[index][window], self.maps[index][window]
            if torch.rand((), generator=generator) < 0.5:
                image, id_map = image.flip(-1), id_map.flip(-1)
            ids = torch.unique(id_map)
            ids = ids[ids >= 0]
            images.append(image)
            masks.append(id_map[None] == ids[:, None, None])
            classes.append(self.labels[index][ids.long()])
        pixel_values = (torch.stack(images) - self.mean) / self.std
        return {"pixel_values": pixel_values, "mask_labels": masks, "class_labels": classes}


def scene_processor(difficulty: str) -> EoMTImageProcessor:
    """The image processor of models of these scenes."""
    return EoMTImageProcessor(
        task="panoptic",
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        stuff_classes=scene_stuff_classes(difficulty),
        num_labels=len(scene_labels(difficulty)),
        threshold=0.5,
    )


def score_scenes(model: Any, difficulty: str, num_scenes: int) -> dict[str, float]:
    """Panoptic quality of a model, as it is, on unseen scenes."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    test_set = GeneratedScenes(num_scenes, "test", seed=0, size=size, difficulty=difficulty)
    segmenter = Segmenter(model, scene_processor(difficulty), task="panoptic", device="cpu")
    stuff_classes = scene_stuff_classes(difficulty)
    result = evaluate(segmenter, test_set, model.config.id2label, stuff_classes=stuff_classes, batch_size=25)
    return panoptic_quality(result)


def run(mode: str, seed: int, output: Path, steps: int) -> None:
    """Train and score one model."""
    folder = output / f"{mode}-{seed}"
    if (folder / "results.json").exists():
        print(f"{folder} is finished")
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = EoMTForUniversalSegmentation(model_config(mode))
    scenes = TrainingScenes(draw_scenes(DIFFICULTY, seed, NUM_TRAINING_SCENES), seed)
    losses, seconds = train(model, scenes, mode, steps, folder / "checkpoint.pt")
    model.save_pretrained(folder / "model")
    scene_processor(DIFFICULTY).save_pretrained(folder / "model")
    results = {
        "mode": mode,
        "seed": seed,
        "steps": steps,
        "losses": losses,
        "seconds": round(seconds),
        "machine": machine(),
        "scores": score(model),
    }
    write_json(folder / "results.json", results, indent=None)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    print({name: values["pq"] for name, values in results["scores"].items()})


def train(
    model: EoMTForUniversalSegmentation, scenes: TrainingScenes, mode: str, steps: int, checkpoint: Path
) -> tuple[list[float], float]:
    """Train a model; return the loss of every step and the processor seconds used."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1 and parameter.shape[0] > 1]
    others = [parameter for parameter in model.parameters() if not (parameter.ndim > 1 and parameter.shape[0] > 1)]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    annealing = MaskAnnealing.by_rule(steps, model.config.num_query_layers)
    losses, seconds = [], 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses, seconds = state["losses"], state["seconds"]
        torch.set_rng_state(state["rng"])
    model.train()
    start = time.process_time()
    for step in tqdm(range(len(losses), steps), initial=len(losses), total=steps, desc=mode, disable=None):
        if mode != "never":
            probabilities = annealing.probabilities(step) if mode == "annealed" else 1.0
            model.set_masked_attention_probabilities(probabilities)
        warm = (step + 1) / (WARMUP_STEPS + 1)
        cooled = (1 - max(step - WARMUP_STEPS, 0) / (steps - WARMUP_STEPS)) ** POWER
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(warm, cooled)
        loss = model(**scenes.batch(step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % CHECKPOINT_EVERY == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "losses": losses,
                "seconds": seconds + time.process_time() - start,
                "rng": torch.get_rng_state(),
            }
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
    if mode == "annealed":
        model.set_masked_attention_probabilities(0.0)
    model.eval()
    return losses, seconds + time.process_time() - start


def score(model: EoMTForUniversalSegmentation) -> dict[str, Any]:
    """Panoptic quality on the unseen scenes, "unmasked" and, where the model knows masks, "masked"."""
    scores = {}
    trained_with = model.config.masked_attention_probabilities
    for name, probability in (("unmasked", 0.0), ("masked", 1.0)):
        if name == "masked" and not model.config.masked_attention:
            continue
        if model.config.masked_attention:
            model.set_masked_attention_probabilities(probability)
        scores[name] = score_scenes(model, DIFFICULTY, NUM_TEST_SCENES)
    if model.config.masked_attention:
        model.set_masked_attention_probabilities(trained_with)
    return scores


ROWS = (
    ("masked", "masked", "masked training, masked test"),
    ("masked", "unmasked", "masked training, unmasked test"),
    ("never", "unmasked", "never masked"),
    ("annealed", "unmasked", "annealed training, unmasked test"),
)


def table(output: Path) -> None:
    """Print means and spreads over the seeds, and draw the losses of the first."""
    results = read_results(output, "*/results.json")
    print(f"{results[0]['steps']} steps; {results[0]['machine']}; mean (lowest - highest) over the seeds\n")
    print("| | seeds | PQ | PQ things | PQ stuff | SQ | RQ | CPU seconds |\n|---|---|---|---|---|---|---|---|")
    for mode, test, title in ROWS:
        runs = [result for result in results if result["mode"] == mode]
        if not runs:
            continue
        cells = [
            cell([run["scores"][test][name] for run in runs]) for name in ("pq", "pq_things", "pq_stuff", "sq", "rq")
        ]
        seconds = statistics.mean(run["seconds"] for run in runs)
        print(f"| {title} | {len(runs)} | {' | '.join(cells)} | {seconds:.0f} |")

    first = {result["mode"]: result for result in results if result["seed"] == results[0]["seed"]}
    smooth = {mode: _averaged(result["losses"]) for mode, result in first.items()}
    plot_curves({f"loss/{mode}": points for mode, points in smooth.items()}, output / "mask_annealing.png")


def _averaged(losses: list[float], window: int = 50) -> list[tuple[int, float]]:
    """Means over windows of steps, at the last step of each."""
    starts = range(0, len(losses) - window + 1, window)
    return [(start + window, statistics.mean(losses[start : start + window])) for start in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train and score one model")
    one.add_argument("mode", choices=MODES)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--steps", type=int, default=STEPS)
    one.add_argument("--output", type=Path, required=True)
    commands.add_parser("table", help="print the table").add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.mode, arguments.seed, arguments.output, arguments.steps)
    else:
        table(arguments.output)


if __name__ == "__main__":
    main()
