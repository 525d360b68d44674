"""Tables 1 and C of the EoMT paper in miniature: what each part of Mask2Former is worth.

Small models are trained on generated scenes, from random weights or from a ViT that was pretrained here: rows 0 to 3,
which lose ViT-Adapter, pixel decoder and multi-scale features one after the other, and EoMT with masks always (row 4)
or annealed (row 5); row 0 and EoMT also never masked, and row 0 annealed (Table C).

    python benchmarks/ladder.py run --output runs/ladder                        # what is missing of all runs
    python benchmarks/ladder.py run --output runs/ladder --start autoencoder --difficulties hard
    python benchmarks/ladder.py table --output runs/ladder
    python benchmarks/ladder.py time S; python benchmarks/ladder.py time L --repeats 1

`run` uses one thread and processor time, writes a JSON file after each run, and skips runs that have one.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mask_annealing import IMAGE_SIZE, TrainingScenes, draw_scenes, score_scenes
from matplotlib.figure import Figure
from measuring import PeakResidentMemory, machine, time_interleaved
from tables import cell, read_results, write_json
from torch import Tensor, nn
from torch.optim import AdamW
from tqdm import tqdm

from hf_segvit import (
    EoMTConfig,
    EoMTForUniversalSegmentation,
    Mask2FormerViTConfig,
    Mask2FormerViTForUniversalSegmentation,
    PlainViTConfig,
    PlainViTModel,
)
from hf_segvit.atomic_files import replacing
from hf_segvit.data.generated_scenes import scene_labels
from hf_segvit.training.annealing import MaskAnnealing
from hf_segvit.training.optimizers import BACKBONE, parameter_role

DIFFICULTIES, PROTOCOLS, STARTS = ("medium", "hard"), ("steps", "time"), ("scratch", "classifier", "autoencoder")
NUM_TRAINING_SCENES, NUM_TEST_SCENES = 1500, 200
STEPS, SECONDS = 400, 90.0
PRETRAINING_STEPS, MASKED_SHARE = 1500, 0.6
LEARNING_RATE, PRETRAINED_FACTOR, WARMUP_SHARE, POWER = 1e-3, 0.3, 0.05, 0.9
WEIGHT_DECAY, MAX_GRAD_NORM = 0.05, 1.0
VIT = {
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": IMAGE_SIZE,
    "patch_size": 16,
    "num_register_tokens": 0,
    "layer_scale_init_value": None,
    "initializer_range": 0.08,  # about 1 / sqrt(hidden_size)
}
QUERIES = {"num_queries": 24, "train_num_points": 256}
MASK2FORMER = {
    "decoder_hidden_size": 96,
    "num_decoder_layers": 4,
    "num_decoder_attention_heads": 6,
    "decoder_intermediate_size": 384,
    "num_pixel_decoder_layers": 2,
    "pixel_decoder_intermediate_size": 192,
    "adapter_stem_channels": 32,
}
NUM_QUERY_LAYERS = 3
SCHEDULE = 10_000  # parts of a run, for the phases of annealing


@dataclass(frozen=True)
class Row:
    """A line of a table: an architecture and how its attention is masked in training."""

    name: str
    title: str
    removed: str | None  # None: EoMT
    mode: str  # masked, never or annealed
    frames: float | None = None  # a second, in the paper
    paper: float | None = None  # PQ, in the paper


ROWS = (
    Row("row0", "(0) ViT-Adapter + Mask2Former", "nothing", "masked", 29, 57.1),
    Row("row1", "(1) without ViT-Adapter", "adapter", "masked", 36, 56.7),
    Row("row2", "(2) without pixel decoder", "pixel_decoder", "masked", 61, 56.9),
    Row("row3", "(3) without multi-scale", "multi_scale", "masked", 64, 56.7),
    Row("row4", "(4) without transformer decoder", None, "masked", 61, 56.2),
    Row("row5", "(5) without masks = EoMT", None, "annealed", 128, 56.0),
)
OTHER_MODES = (
    Row("row0_never", "(0) never masked", "nothing", "never", paper=54.0),
    Row("row0_annealed", "(0) annealed", "nothing", "annealed", paper=56.8),
    Row("eomt_never", "EoMT, never masked", None, "never"),
)
BY_NAME = {row.name: row for row in (*ROWS, *OTHER_MODES)}
TABLE_C = ("row0", "row0_never", "row0_annealed", "row4", "eomt_never", "row5")


def build(row: Row, difficulty: str, backbone: dict[str, Tensor] | None = None) -> Any:
    """The model of a row, its ViT with the weights of `backbone` if there are any."""
    labels = scene_labels(difficulty)
    shared = {**VIT, **QUERIES, "id2label": labels, "label2id": {name: label for label, name in labels.items()}}
    shared["masked_attention"] = row.mode != "never"
    model: Any
    if row.removed is None:
        model = EoMTForUniversalSegmentation(EoMTConfig(**shared, num_query_layers=NUM_QUERY_LAYERS))
    else:
        config = Mask2FormerViTConfig(**shared, **MASK2FORMER, removed=row.removed)
        model = Mask2FormerViTForUniversalSegmentation(config)
    if backbone is not None:
        other = model.base_model.load_state_dict(backbone, strict=False).unexpected_keys
        assert all(name.startswith("layernorm.") for name in other), other  # the adapter's ViT has no final norm
    return model


def cached_scenes(difficulty: str, seed: int, num_scenes: int, folder: Path) -> TrainingScenes:
    """Training scenes, drawn once and kept in `folder`."""
    path = folder / f"scenes-{difficulty}-{seed}-{num_scenes}.pt"
    if not path.exists():
        with replacing(path) as partial:
            torch.save(draw_scenes(difficulty, seed, num_scenes), partial)
    return TrainingScenes(torch.load(path, weights_only=True), seed)


def optimizer_of(model: nn.Module, factor: float) -> AdamW:
    """AdamW whose groups know their peak rate; `factor` is that of the ViT's blocks relative to the rest."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate = LEARNING_RATE * (factor if parameter_role(name) == BACKBONE else 1.0)
        groups.setdefault((parameter.ndim > 1 and parameter.shape[0] > 1, rate), []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": WEIGHT_DECAY if decayed else 0.0, "lr": rate, "peak": rate}
        for (decayed, rate), parameters in groups.items()
    ]
    return AdamW(settings, betas=(0.9, 0.98), fused=True)


def take_step(model: nn.Module, optimizer: AdamW, loss: Tensor, progress: float) -> None:
    """One step of the optimiser, at a share of the run in [0, 1]."""
    warm, cooled = progress / WARMUP_SHARE + 0.01, max(1 - progress, 0.0) ** POWER
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * min(warm, cooled)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()


def progress_of(steps: int | None, seconds: float | None) -> Iterator[float]:
    """The share of the run that is over at each step: of a number of steps, or of processor seconds."""
    start = time.process_time()
    for step in itertools.count():
        progress = step / steps if steps is not None else (time.process_time() - start) / (seconds or 1.0)
        if progress >= 1:
            return
        yield progress


def pretrain(kind: str, difficulty: str, steps: int, num_scenes: int, folder: Path) -> dict[str, Tensor]:
    """Weights of the ViT: trained to name the classes of a scene, or to fill in masked patches; kept in `folder`."""
    path = folder / f"vit-{kind}-{difficulty}-{steps}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    torch.manual_seed(0)
    # Scenes that no run sees, and many more steps than a run has.
    scenes = cached_scenes(difficulty, 1000, num_scenes, folder)
    vit = PlainViTModel(PlainViTConfig(**VIT)).train()
    patch, num_labels = VIT["patch_size"], len(scene_labels(difficulty))
    width = 3 * patch * patch if kind == "autoencoder" else num_labels
    model = nn.ModuleDict({"vit": vit, "head": nn.Linear(vit.config.hidden_size, width)})
    optimizer, losses = optimizer_of(model, 1.0), []
    for step, progress in enumerate(tqdm(progress_of(steps, None), total=steps, desc=kind, disable=None)):
        batch = scenes.batch(step)
        pixels = batch["pixel_values"]
        if kind == "classifier":
            truth = pixels.new_zeros(len(pixels), num_labels)
            for row, labels in zip(truth, batch["class_labels"], strict=True):
                row[labels] = 1.0
            loss = F.binary_cross_entropy_with_logits(model["head"](_patches(vit, pixels).mean(1)), truth)
        else:
            side = IMAGE_SIZE // patch
            hidden = torch.rand(len(pixels), side, side) < MASKED_SHARE
            covered = hidden.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
            tokens = _patches(vit, pixels.masked_fill(covered, 0.0))
            truth = F.unfold(pixels, patch, stride=patch).transpose(1, 2)
            loss = F.mse_loss(model["head"](tokens)[hidden.flatten(1)], truth[hidden.flatten(1)])
        take_step(model, optimizer, loss, progress)
        losses.append(loss.item())
    last = max(1, steps // 10)
    print(f"{kind} on {difficulty}: loss {statistics.mean(losses[:last]):.3f} to {statistics.mean(losses[-last:]):.3f}")
    with replacing(path) as partial:
        torch.save(vit.state_dict(), partial)
    return vit.state_dict()


def _patches(vit: PlainViTModel, pixels: Tensor) -> Tensor:
    return vit(pixels).last_hidden_state[:, vit.config.num_prefix_tokens :]


def train(model: Any, row: Row, scenes: TrainingScenes, limits: tuple[int | None, float | None], factor: float) -> int:
    """Train a model within (steps, processor seconds), of which one is given; the number of steps taken."""
    optimizer, steps = optimizer_of(model, factor), 0
    num_layers = len(model.config.masked_attention_probabilities)
    annealing = MaskAnnealing.by_rule(SCHEDULE, num_layers)
    model.train()
    for steps, progress in enumerate(tqdm(progress_of(*limits), total=limits[0], desc=row.name, disable=None), start=1):
        if row.mode == "annealed":
            model.set_masked_attention_probabilities(annealing.probabilities(int(progress * SCHEDULE)))
        take_step(model, optimizer, model(**scenes.batch(steps - 1)).loss, progress)
    if row.mode == "annealed":
        model.set_masked_attention_probabilities(0.0)
    model.eval()
    return steps


@dataclass(frozen=True)
class Run:
    """What a result is of."""

    difficulty: str
    protocol: str
    start: str
    row: str
    seed: int

    def path(self, output: Path) -> Path:
        """The file of its result."""
        return output / ("-".join(map(str, vars(self).values())) + ".json")


def run(arguments: argparse.Namespace) -> None:
    """Train and score what is missing of the product of all options."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    options = itertools.product(arguments.seeds, arguments.difficulties, arguments.protocols, arguments.rows)
    runs = [
        Run(difficulty, protocol, arguments.start, row, seed)
        for seed, difficulty, protocol, row in options
        if protocol == "steps" or BY_NAME[row] in ROWS  # Table C compares modes at equal steps
    ]
    missing = [each for each in runs if not each.path(arguments.output).exists()]
    if len(missing) == 1:
        run_one(missing[0], arguments)
        return
    same = [f"--{name}={getattr(arguments, name.replace('-', '_'))}" for name in SHARED_OPTIONS]
    for each in missing:
        # A process of its own, or memory that an earlier run has freed would hide what this one needs.
        own = ["--rows", each.row, "--difficulties", each.difficulty, "--protocols", each.protocol]
        own += ["--seeds", str(each.seed), "--start", each.start]
        subprocess.run([sys.executable, __file__, "run", *same, *own], check=True)


SHARED_OPTIONS = ("output", "steps", "seconds", "pretraining-steps", "pretrained-factor", "scenes", "training-scenes")


def run_one(one: Run, arguments: argparse.Namespace) -> None:
    """Train and score one model, and write its result."""
    torch.set_num_threads(1)
    row, output = BY_NAME[one.row], arguments.output
    backbone = None
    if one.start != "scratch":
        settings = (arguments.pretraining_steps, arguments.training_scenes)
        backbone = pretrain(one.start, one.difficulty, *settings, output)
    scenes = cached_scenes(one.difficulty, one.seed, arguments.training_scenes, output)
    torch.manual_seed(one.seed)
    model = build(row, one.difficulty, backbone)
    limits = (arguments.steps, None) if one.protocol == "steps" else (None, arguments.seconds)
    start = time.process_time()
    with PeakResidentMemory() as memory:
        steps = train(model, row, scenes, limits, 1.0 if backbone is None else arguments.pretrained_factor)
    seconds = time.process_time() - start
    result = {
        **vars(one),
        "steps": steps,
        "limit": arguments.steps if one.protocol == "steps" else arguments.seconds,
        "seconds": round(seconds, 2),
        "mebibytes": memory.mebibytes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "scores": score_scenes(model, one.difficulty, arguments.scenes),
        "machine": machine(),
    }
    path = one.path(output)
    write_json(path, result, indent=None)
    print(path.stem, result["scores"]["pq"], f"{steps / seconds:.2f} steps/s", flush=True)


HEADER = """| seeds | PQ | things | stuff | steps | steps/s | memory (MiB) | parameters | PQ in the paper |
|---|---|---|---|---|---|---|---|---|---|"""


def table(output: Path) -> None:
    """Print both tables as Markdown, and draw PQ by row."""
    results = read_results(output, "*.json")
    print(f"{results[0]['machine']}; mean (lowest - highest) over the seeds")
    settings = sorted({(r["start"], r["difficulty"], r["protocol"]) for r in results}, key=str)
    for start, difficulty, protocol in settings:
        chosen = [r for r in results if (r["start"], r["difficulty"], r["protocol"]) == (start, difficulty, protocol)]
        limit = f"{chosen[0]['limit']:g} {'steps' if protocol == 'steps' else 'processor seconds'} each"
        origin = "from scratch" if start == "scratch" else f"from a pretrained {start}"
        print(f"\n**{difficulty} scenes, {limit}, {origin}**\n")
        print(f"| {HEADER}")
        for row in ROWS:
            _print_row(row, chosen)
        if any(r["row"] in {row.name for row in OTHER_MODES} for r in chosen):
            print(f"\n| masks in training {HEADER}")
            for name in TABLE_C:
                _print_row(BY_NAME[name], chosen)
    draw(results, settings, output / "ladder.png")


def _print_row(row: Row, results: list[dict[str, Any]]) -> None:
    runs = [result for result in results if result["row"] == row.name]
    if not runs:
        return
    scores = [cell([run["scores"][name] for run in runs]) for name in ("pq", "pq_things", "pq_stuff")]
    memory = [run["mebibytes"] for run in runs if run["mebibytes"] is not None]
    cells = [
        row.title,
        str(len(runs)),
        *scores,
        f"{statistics.mean(run['steps'] for run in runs):.0f}",
        f"{statistics.mean(run['steps'] / run['seconds'] for run in runs):.2f}",
        f"{statistics.mean(memory):.0f}" if memory else "",
        f"{runs[0]['parameters'] / 1e6:.2f} M",
        "" if row.paper is None else f"{row.paper:.1f}",
    ]
    print(f"| {' | '.join(cells)} |")


def draw(results: list[dict[str, Any]], settings: list[tuple[str, str, str]], path: Path) -> None:
    """PQ of every run by row, with lines through the means, a panel per difficulty and protocol."""
    panels = sorted({(difficulty, protocol) for _, difficulty, protocol in settings})
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (difficulty, protocol) in zip(axes, panels, strict=True):
        for color, start in enumerate(STARTS):
            places, means = [], []
            for place, row in enumerate(ROWS):
                key = (start, difficulty, protocol, row.name)
                values = [
                    100 * r["scores"]["pq"]
                    for r in results
                    if (r["start"], r["difficulty"], r["protocol"], r["row"]) == key
                ]
                if values:
                    places.append(place)
                    means.append(statistics.mean(values))
                    axis.scatter([place] * len(values), values, s=14, color=f"C{color}")
            if places:
                axis.plot(places, means, color=f"C{color}", label=start)
        axis.set_title(f"{difficulty} scenes, equal {protocol}")
        axis.set_xticks(range(len(ROWS)), [row.title.split(")")[0] + ")" for row in ROWS])
        axis.set_ylabel("PQ")
        axis.legend()
    figure.savefig(path, dpi=120)
    print(f"\n{path}")


SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}


def full_size(row: Row, size: str) -> Any:
    """A row's model at the size of the paper, with random weights, as it runs in inference."""
    width, depth, heads = SIZES[size]
    shared = {
        **{"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads},
        **{"intermediate_size": 4 * width, "image_size": 640, "patch_size": 16, "num_labels": 133, "num_queries": 200},
    }
    torch.manual_seed(0)
    model: Any
    if row.removed is None:
        model = EoMTForUniversalSegmentation(EoMTConfig(**shared, num_query_layers=3 if depth == 12 else 4))
    else:
        model = Mask2FormerViTForUniversalSegmentation(Mask2FormerViTConfig(**shared, removed=row.removed))
    model.set_masked_attention_probabilities(0.0 if row.mode == "annealed" else 1.0)
    return model.eval()


@torch.inference_mode()
def time_rows(size: str, repeats: int, threads: int, side: int) -> None:
    """Print the time of an image of all rows, as ratios beside the paper's; interleaved if repeated."""
    torch.set_num_threads(threads)
    rows = (*ROWS, BY_NAME["row0_annealed"])
    pixels = torch.randn(1, 3, side, side)
    if repeats > 1:
        models = [full_size(row, size) for row in rows]
        seconds = time_interleaved([lambda model=model: model(pixels) for model in models], repeats)
    else:  # one model in memory at a time
        seconds = []
        for row in rows:
            model = full_size(row, size)
            seconds.append(time_interleaved([lambda model=model: model(pixels)], 1, warm_up=0)[0])
            del model
            gc.collect()
    medians = [statistics.median(values) for values in seconds]
    print(f"ViT-{size}, {side} x {side}, batch 1, float32, {threads} threads; {machine()}\n")
    print("| | ms (lowest - highest) | speed relative to row 0 | in the paper (L, H100) |\n|---|---|---|---|")
    for row, values, median in zip(rows, seconds, medians, strict=True):
        spread = f"{1e3 * median:.0f} ({1e3 * min(values):.0f} - {1e3 * max(values):.0f})"
        paper = "" if row.frames is None else f"{row.frames / (ROWS[0].frames or 1):.2f}"
        print(f"| {row.title} | {spread} | {medians[0] / median:.2f} | {paper} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train and score what is missing")
    one.add_argument("--output", type=Path, required=True, help="folder of results, one JSON file a run")
    one.add_argument(
        "--rows", nargs="+", choices=list(BY_NAME), default=list(BY_NAME), help="what to train (default: all)"
    )
    one.add_argument(
        "--difficulties",
        nargs="+",
        choices=DIFFICULTIES,
        default=list(DIFFICULTIES),
        help="of the scenes (default: both)",
    )
    one.add_argument(
        "--protocols",
        nargs="+",
        choices=PROTOCOLS,
        default=list(PROTOCOLS),
        help="equal numbers of steps, or equal processor time (default: both)",
    )
    one.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of weights and scenes (default 0 1 2)")
    one.add_argument("--start", choices=STARTS, default="scratch", help="how the ViT was pretrained")
    one.add_argument("--steps", type=int, default=STEPS, help=f"of a run with equal steps (default {STEPS})")
    one.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"processor time of a run with equal time (default {SECONDS:g})"
    )
    one.add_argument(
        "--pretraining-steps", type=int, default=PRETRAINING_STEPS, help=f"of --start (default {PRETRAINING_STEPS})"
    )
    one.add_argument(
        "--pretrained-factor",
        type=float,
        default=PRETRAINED_FACTOR,
        help=f"learning rate of pretrained blocks relative to the rest (default {PRETRAINED_FACTOR})",
    )
    one.add_argument(
        "--training-scenes", type=int, default=NUM_TRAINING_SCENES, help=f"to draw (default {NUM_TRAINING_SCENES})"
    )
    one.add_argument("--scenes", type=int, default=NUM_TEST_SCENES, help="unseen scenes to score")
    commands.add_parser("table", help="print the tables").add_argument(
        "--output", type=Path, required=True, help="folder of results"
    )
    timing = commands.add_parser("time", help="time all rows at the paper's size")
    timing.add_argument("size", choices=list(SIZES), help="of the ViT")
    timing.add_argument(
        "--repeats", type=int, default=5, help="passes of each row; with 1, models take turns in memory"
    )
    timing.add_argument("--threads", type=int, default=1, help="of PyTorch (default 1)")
    timing.add_argument("--image-size", type=int, default=640, help="side in pixels (default 640)")
    arguments = parser.parse_args(argv)
    if arguments.command == "run":
        run(arguments)
    elif arguments.command == "table":
        table(arguments.output)
    else:
        time_rows(arguments.size, arguments.repeats, arguments.threads, arguments.image_size)


if __name__ == "__main__":
    main()
