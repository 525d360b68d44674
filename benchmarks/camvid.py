"""CamVid from scratch: a small EoMT, SegFormer-B0 and Mask2Former Swin-T with the same computing time.

    python benchmarks/camvid.py floors --output OUT
    python benchmarks/camvid.py train eomt segformer mask2former --split official --minutes 10 --seed 0 --output OUT
    python benchmarks/camvid.py table --output OUT

FOLDER of `--data` (default: `camvid` in the sample data, see tests/conftest.py) holds `images/{train,val}` and
`annotations/{train,val}`: 11 classes, void not counted. All models see the same crops, of 144 x 192 pixels, and are
scored at full size over the whole split. The budget of each model is processor time of one thread for everything a step
needs, crops included; with `--device cuda` it is wall time. Scoring is not counted. On a shared machine a step
takes up to twice the processor time; the models of one command take turns, so that this affects all alike.
Learning rate and annealing follow the share of the budget that is used.

A finished model is not trained again. Each writes its result as JSON and its weights, with the image processor,
to `models/`; keep those out of version control. `table` prints Markdown and draws `camvid.png`.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from camvid_data import INPUT, LABELS, SPLITS, Frame, TrainingCrops, floors, mean_iou, read_split
from camvid_models import RECIPES, Recipe, learning_rate_factor, make_optimizer, predict
from camvid_report import FLOORS, draw_curves, markdown_table, read_results, result_file
from measuring import machine, synchronize
from tables import write_json
from torchvision.transforms.v2 import functional

from hf_segvit.atomic_files import prepare_output_folder
from hf_segvit.data.collation import normalize_pixels

ROOT = Path(__file__).resolve().parents[1]
NUM_SCORES = 8  # of the curve, evenly over the budget
NUM_LOSSES = 50
SCORE_EVERY = 4  # frames, for the curve


class Budget:
    """Time to train, on a clock that runs only inside `with budget.running()`."""

    def __init__(self, seconds: float, clock: Any = time.process_time) -> None:
        if not seconds > 0:
            raise ValueError(f"the budget is {seconds} s; give --minutes above 0")
        self.seconds, self.clock, self.used = seconds, clock, 0.0

    @property
    def share(self) -> float:
        """Share of the budget used so far; slightly above 1 at the end."""
        return self.used / self.seconds

    @contextmanager
    def running(self):
        start = self.clock()
        try:
            yield
        finally:
            self.used += self.clock() - start


def take_turns(trainings: Sequence[Generator[Budget, None, Any]]) -> list[Any]:
    """Run trainings to their end, always a step of the one that has used the least; return their results."""
    results: list[Any] = [None] * len(trainings)
    used = dict.fromkeys(range(len(trainings)), 0.0)
    while used:
        place = min(used, key=lambda place: used[place])
        try:
            used[place] = next(trainings[place]).used
        except StopIteration as end:
            results[place] = end.value
            del used[place]
    return results


def training(
    name: str,
    frames: list[Frame],
    scored: list[Frame],
    budget: Budget,
    seed: int,
    device: str = "cpu",
    workers: int = 0,
    learning_rate: float | None = None,
) -> Generator[Budget, None, tuple[Any, dict[str, Any]]]:
    """Train the model of a recipe until its budget is used.

    Yields:
        The budget, after every step.

    Returns:
        The model in evaluation mode, and its report except for the final score.

    Raises:
        ValueError: the loss stopped being finite; the message names model and step.
    """
    recipe = RECIPES[name]
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    model = recipe.build().to(device).train()
    optimizer = make_optimizer(model, recipe)
    highest = recipe.learning_rate if learning_rate is None else learning_rate
    batches = iter(TrainingCrops(frames, recipe.batch_size, seed, workers))
    losses: list[tuple[float, float]] = []
    scores: list[tuple[float, float]] = []
    while budget.share < 1:
        with budget.running():
            recipe.on_progress(model, budget.share)
            for group in optimizer.param_groups:
                group["lr"] = highest * learning_rate_factor(budget.share)
            batch = _moved(recipe.collate(next(batches)), device)
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append((budget.used, loss.item()))
        if not np.isfinite(losses[-1][1]):
            raise ValueError(f"{name}: the loss is {losses[-1][1]} at step {len(losses)}; use a lower learning rate")
        if budget.share * NUM_SCORES >= len(scores) + 1 or budget.share >= 1:
            score = evaluate(model, recipe, scored[::SCORE_EVERY], device)["mean_iou"]
            scores.append((budget.used, score))
            recent = statistics.mean(loss for _, loss in losses[-20:])
            print(
                f"{name:12s} {budget.used:5.0f} s, step {len(losses)}: loss {recent:.3f}, mIoU {100 * score:.1f}",
                flush=True,
            )
        yield budget
    recipe.on_progress(model, 1.0)
    record = {
        "seconds": budget.used,
        "steps": len(losses),
        "batch_size": recipe.batch_size,
        "crops": len(losses) * recipe.batch_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "learning_rate": highest,
        "learning_rates_tried": recipe.tried,
        "losses": _averaged(losses, NUM_LOSSES),
        "scores": scores,
    }
    return model.eval(), record


def evaluate(model: Any, recipe: Recipe, frames: list[Frame], device: str = "cpu") -> dict[str, Any]:
    """`MeanIoU` over frames at full size; the model is left in the mode it was in."""
    was_training = model.training
    model.eval()
    predictions = []
    for frame in frames:
        image = frame.image.resize((INPUT[1], INPUT[0]), 2)  # bilinear, as the training frames
        pixels = functional.pil_to_tensor(image)[None].to(device)
        predictions.append(predict(model, recipe, normalize_pixels(pixels), frame.labels.shape)[0].cpu())
    model.train(was_training)
    return mean_iou(predictions, frames)


def _moved(batch: dict[str, Any], device: str) -> dict[str, Any]:
    return {
        key: [item.to(device) for item in value] if isinstance(value, list) else value.to(device)
        for key, value in batch.items()
    }


def _averaged(points: list[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    """At most `count` points, each the mean of neighbours."""
    parts = np.array_split(np.array(points), min(count, len(points)))
    return [(round(x, 2), round(y, 5)) for x, y in (part.mean(0).tolist() for part in parts)]


def run_train(args: argparse.Namespace) -> None:
    prepare_output_folder(args.output)
    paths = {name: result_file(args.output, args.split, name, args.seed) for name in args.models}
    for name, path in list(paths.items()):
        if path.exists():
            if (known := json.loads(path.read_text()))["minutes"] != args.minutes:
                raise ValueError(
                    f"{path} is of {known['minutes']} minutes, not {args.minutes}; choose another --output"
                )
            print(f"{path} is there already: mIoU {100 * known['mean_iou']:.1f}")
            del paths[name]
    if not paths:
        return
    torch.set_num_threads(1)
    frames, scored = read_split(args.data, args.split)
    settings = {
        "seed": args.seed,
        "device": args.device,
        "workers": args.workers,
        "learning_rate": args.learning_rate,
    }
    clock = time.process_time if args.device == "cpu" else _synchronized_time
    trained = take_turns(
        [training(name, frames, scored, Budget(60 * args.minutes, clock), **settings) for name in paths]
    )
    for (name, path), (model, record) in zip(paths.items(), trained, strict=True):
        result = evaluate(model, RECIPES[name], scored, args.device)
        folder = args.output / "models" / path.stem
        model.save_pretrained(folder)
        RECIPES[name].processor().save_pretrained(folder)
        facts = {
            "model": name,
            "split": args.split,
            "seed": args.seed,
            "minutes": args.minutes,
            "clock": "processor time of one thread" if args.device == "cpu" else "wall time",
            "trained_beside": [other for other in paths if other != name],
            "input": INPUT,
            "machine": machine(),
            "mean_iou": result["mean_iou"],
            "pixel_accuracy": result["pixel_accuracy"],
            "iou": {LABELS[label]: row["iou"] for label, row in result["per_class"].items()},
        }
        write_json(path, facts | record)
        print(f"{name}, split {args.split}, seed {args.seed}: mIoU {100 * result['mean_iou']:.1f} ({path})")


def _synchronized_time() -> float:
    synchronize()
    return time.perf_counter()


def run_floors(args: argparse.Namespace) -> None:
    prepare_output_folder(args.output)
    found = {split: floors(*read_split(args.data, split)) for split in SPLITS}
    write_json(args.output / FLOORS, found)
    for split, values in found.items():
        for name, value in values.items():
            print(f"split {split}: {name} {100 * value:.1f}")


def run_table(args: argparse.Namespace) -> None:
    results = read_results(args.output)
    if not (args.output / FLOORS).exists():
        run_floors(args)
    table = markdown_table(results, json.loads((args.output / FLOORS).read_text()))
    draw_curves(results, args.output / "camvid.png")
    runs = [run for found in results.values() for run in found]
    print("\n".join(sorted({f"{run['minutes']:g} minutes of {run['clock']}; {run['machine']}" for run in runs})))
    print(f"\n{table}")


def main(arguments: list[str] | None = None) -> int:
    sample = Path(os.environ.get("HF_SEGVIT_SAMPLE_DATA", ROOT.parent / "shared" / "data"))
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--output", type=Path, required=True, help="folder of results")
    shared.add_argument("--data", type=Path, default=sample / "camvid", help="folder of CamVid")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", parents=[shared], help="train and score models")
    command.add_argument("models", nargs="+", choices=RECIPES, metavar="MODEL", help=", ".join(RECIPES))
    command.add_argument("--split", choices=SPLITS, default="official")
    command.add_argument("--minutes", type=float, default=10.0, help="budget of each model")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="cpu", help="cpu or cuda")
    command.add_argument(
        "--workers", type=int, default=0, help="processes that prepare crops; 0 on a CPU, as their time is not counted"
    )
    command.add_argument("--learning-rate", type=float, help="another than the recipe's")
    command.set_defaults(run=run_train)
    commands.add_parser("table", parents=[shared], help="print all results").set_defaults(run=run_table)
    commands.add_parser("floors", parents=[shared], help="print the floors").set_defaults(run=run_floors)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"camvid.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
