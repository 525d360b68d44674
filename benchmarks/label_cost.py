"""Cheap labels for ViT-P: what they add to a generator that has few masks, over the time that annotation takes.

    python benchmarks/label_cost.py run --data scenes --masks 60 --labels coarse --seed 0 --output runs/label_cost
    python benchmarks/label_cost.py run --data camvid:FOLDER --masks 50 --labels coarse --seed 0 --output ...
    python benchmarks/label_cost.py table --output runs/label_cost

A generator learns from the masks of few images: EoMT, or with `--generator row0` ViT-Adapter + Mask2Former. ViT-P
starts from the blocks of the EoMT and learns from the same masks and, one by one in `LABELS`, from cheaper labels of
all other images. Both are fused over alpha and scored on unseen images, beside the bound with perfect labels.
`--generator FOLDER --name NAME` takes another trained model instead; ViT-P then starts from `--start FOLDER`, an EoMT
trained on the same masks.

Everything is trained from scratch on one thread; what is finished in the output folder is not repeated.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from camvid_data import INPUT, array_entry, read_split
from camvid_data import LABELS as CAMVID_LABELS
from fusion_experiment import load_fused
from ladder import MASK2FORMER
from measuring import machine
from tables import cell, read_results, write_json
from torch import nn
from torch.optim import AdamW
from tqdm import tqdm
from vit_p_scenes import Scenes
from vit_p_scenes_start import from_eomt

from hf_segvit import (
    EoMTConfig,
    EoMTForUniversalSegmentation,
    EoMTImageProcessor,
    Mask2FormerViTConfig,
    Mask2FormerViTForUniversalSegmentation,
)
from hf_segvit.atomic_files import replacing
from hf_segvit.data.augmentation import AugmentedDataset, augmentation
from hf_segvit.data.collation import MaskCollator, PointCollator
from hf_segvit.data.generated_scenes import scene_labels, scene_stuff_classes
from hf_segvit.data.mixture import MixedDataset, MixturePart
from hf_segvit.data.prompts import PointAugmentation
from hf_segvit.evaluation.alpha_sweep import sweep_alphas, sweep_content
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.models.configuration_vit_p import ViTPConfig
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor
from hf_segvit.training.data_order import StepOrder
from hf_segvit.training.optimizers import learning_rate_factor

ALPHAS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6)
DIFFICULTY, IMAGE_SIZE, NUM_SCENES, NUM_TEST = "medium", 96, 3000, 200
BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY, MAX_GRAD_NORM = 8, 1.5e-3, 50, 0.05, 1.0
NUM_POINTS, CHEAP_SHARE = 64, 3.0  # prompts of an image; samples with cheap labels for one with masks
# Seconds of annotation of a segment. Mask and box: the ViT-P paper's "1 to 2 minutes" and "10 seconds". Coarse: as much
# less than a mask as Cityscapes' coarse annotation took, 7 minutes an image instead of 90.
SECONDS = {"mask": 90.0, "coarse": 90.0 * 7 / 90, "box": 10.0}
TRAINED = ("eomt", "row0")
LABELS: dict[str, str | None] = {"masks": None, "coarse": "coarse", "boxes": "box"}  # source of the cheap prompts


class Data:
    """Images to train on and to score, and what the models need to know of them.

    Args:
        name: `scenes`, or `camvid:FOLDER`.
        seed: of the scenes, or of the order in which frames get their masks.
        limit: images to train on and to score, for a trial.
    """

    def __init__(self, name: str, seed: int, limit: int | None = None) -> None:
        kind, _, folder = name.partition(":")
        if kind == "scenes":
            self.train = Scenes("train", limit or NUM_SCENES, seed, DIFFICULTY).rows
            self.test = Scenes("test", limit or NUM_TEST, 0, DIFFICULTY).rows
            self.size, self.patch_size, self.task = (IMAGE_SIZE, IMAGE_SIZE), 8, "panoptic"
            self.id2label, self.stuff_classes = scene_labels(DIFFICULTY), scene_stuff_classes(DIFFICULTY)
        elif kind == "camvid" and folder:
            parts = read_split(folder, "official")
            self.train, self.test = ([array_entry(frame) for frame in part[:limit]] for part in parts)
            # Neighbouring frames of a drive are nearly one image.
            self.train = [self.train[index] for index in np.random.default_rng(seed).permutation(len(self.train))]
            self.size, self.patch_size, self.task = INPUT, 12, "semantic"
            self.id2label, self.stuff_classes = CAMVID_LABELS, []
        else:
            raise SystemExit(f"--data {name}: it is scenes, or camvid:FOLDER")
        self.setting = kind

    def minutes(self, images: Sequence[Any], kind: str) -> float:
        """What annotators need for all segments of images."""
        return sum(len(image["segments"]) for image in images) * SECONDS[kind] / 60


def train_generator(data: Data, kind: str, num_masks: int, steps: int, seed: int, folder: Path) -> None:
    """Train an EoMT without masked attention, or row 0 with it, on the first images; saved with its processor."""
    if (folder / "config.json").exists():
        return
    torch.manual_seed(seed)
    shared: dict[str, Any] = {
        "hidden_size": 144,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "intermediate_size": 432,
        "image_size": list(data.size),
        "num_register_tokens": 0,
        "layer_scale_init_value": None,
        "initializer_range": 0.08,
        "num_queries": 24,
        "train_num_points": 256,
        "id2label": data.id2label,
        "label2id": {name: label for label, name in data.id2label.items()},
    }
    model: Any
    if kind == "eomt":
        config = EoMTConfig(**shared, patch_size=data.patch_size, num_query_layers=3, masked_attention=False)
        model = EoMTForUniversalSegmentation(config)
    else:
        model = Mask2FormerViTForUniversalSegmentation(Mask2FormerViTConfig(**shared, **MASK2FORMER, patch_size=16))
    recipe = "eomt_coco_panoptic" if data.task == "panoptic" else "eomt_semantic"
    augment = augmentation(recipe, data.size, scale_range=(0.7, 1.4))
    samples = AugmentedDataset(data.train[:num_masks], augment, seed=seed)
    optimize(model, samples, MaskCollator(with_loss_mask=True), steps, seed, f"{kind}, {num_masks} masks")
    processor = EoMTImageProcessor(
        task=data.task,
        size={"height": data.size[0], "width": data.size[1]},
        do_split_image=False,
        stuff_classes=data.stuff_classes,
        num_labels=len(data.id2label),
        threshold=0.5,
    )
    processor.save_pretrained(folder)
    model.save_pretrained(folder)


def train_classifier(
    data: Data, num_masks: int, labels: str, steps: int, seed: int, start: Path, folder: Path
) -> list[float]:
    """Train a ViT-P on the blocks of an EoMT; saved with its processor. Returns the losses."""
    torch.manual_seed(seed)
    config = ViTPConfig(
        image_size=list(data.size),
        patch_size=data.patch_size,
        layer_scale_init_value=None,
        initializer_range=0.08,
        id2label=data.id2label,
        label2id={name: label for label, name in data.id2label.items()},
    )
    model = from_eomt(str(start), config)
    source = LABELS[labels]

    def prompts(kind: str) -> PointAugmentation:
        return PointAugmentation(data.size, num_points=NUM_POINTS, source=kind, max_rotation=0.0)

    fine, rest = data.train[:num_masks], data.train[num_masks:]
    samples: Any = AugmentedDataset(fine, prompts("mask"), seed=seed)
    if source is not None:
        parts = [MixturePart(fine, prompts("mask"), 1.0), MixturePart(rest, prompts(source), CHEAP_SHARE)]
        samples = MixedDataset(parts, seed=seed)
    losses = optimize(model, samples, PointCollator(), steps, seed, f"ViT-P, {num_masks} masks, {labels}")
    model.save_pretrained(folder)
    size = {"height": data.size[0], "width": data.size[1]}
    ViTPImageProcessor(size=size, patch_size=data.patch_size).save_pretrained(folder)
    return losses


def optimize(model: Any, samples: Any, collate: Any, steps: int, seed: int, title: str) -> list[float]:
    """Train with one schedule for all models; return the mean losses of windows of 10 steps."""
    order = StepOrder(len(samples), BATCH_SIZE, seed)
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    losses = []
    model.train()
    for step in tqdm(range(steps), desc=title, disable=None):
        factor = learning_rate_factor(step, idle=0, warmup=WARMUP_STEPS, total_steps=steps, schedule="cosine")
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        loss = model(**collate([samples[key] for key in order.step_samples(step)])).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return [statistics.mean(losses[start : start + 10]) for start in range(0, len(losses), 10)]


def run(args: argparse.Namespace) -> None:
    """Train what is missing of one cell, and score it."""
    data_name, args.name = args.data.partition(":")[0], args.name or args.generator
    if args.generator not in TRAINED and (args.start is None or args.name == args.generator):
        raise SystemExit(f"--generator {args.generator} needs --name, and --start, an EoMT trained on the same masks")
    name = f"{data_name}-{args.name}-{args.masks}-{args.labels}-seed{args.seed}"
    path = args.output / f"{name}.json"
    if path.exists():
        print(f"{path} is finished")
        return
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    data = Data(args.data, args.seed, args.limit)
    if args.masks >= len(data.train):
        raise SystemExit(f"--masks {args.masks}: there are {len(data.train)} images; leave some for cheap labels")
    begin = time.process_time()
    folders = {kind: args.output / f"{data_name}-{kind}-{args.masks}-seed{args.seed}" for kind in TRAINED}
    for kind in TRAINED:
        if kind == args.generator or (kind == "eomt" and args.start is None):
            train_generator(data, kind, args.masks, args.steps, args.seed, folders[kind])
    classifier = args.output / name
    losses = train_classifier(
        data, args.masks, args.labels, args.classifier_steps, args.seed, args.start or folders["eomt"], classifier
    )
    model, processor = load_fused(str(folders.get(args.generator, args.generator)), str(classifier))
    tasks = {}
    for task in ("panoptic", "semantic") if data.task == "panoptic" else ("semantic",):
        segmenter = Segmenter(model, processor, task=task, device="cpu", stuff_classes=data.stuff_classes)
        settings = {"stuff_classes": data.stuff_classes, "more_metrics": ["oracle"], "batch_size": 8}
        content = sweep_content(sweep_alphas(segmenter, ALPHAS, data.test, data.id2label, **settings))
        tasks[task] = {key: content[key] for key in ("alphas", "scores", "oracle")}
    fine, rest = data.train[: args.masks], data.train[args.masks :]
    result = {
        "setting": data.setting,
        "generator": args.name,
        "masks": args.masks,
        "labels": args.labels,
        "seed": args.seed,
        "steps": [args.steps, args.classifier_steps],
        "minutes": data.minutes(fine, "mask"),
        "cheap_minutes": 0.0 if LABELS[args.labels] is None else data.minutes(rest, str(LABELS[args.labels])),
        "images": len(data.train),
        "tasks": tasks,
        "losses": losses,
        "seconds": round(time.process_time() - begin),
        "machine": machine(),
    }
    write_json(path, result)
    print({task: [round(100 * score, 1) for score in content["scores"]] for task, content in tasks.items()})


def table(output: Path) -> str:
    """Means and ranges over seeds as Markdown; draws scores over minutes of annotation into the folder."""
    results = read_results(output)
    heads = ["generator alone", *[f"alpha {alpha:g}" for alpha in ALPHAS[1:]], "perfect labels"]
    lines = [
        f"{results[0]['machine']}; mean (lowest - highest) over the seeds, percent",
        "",
        f"| | masks | labels of ViT-P | hours of annotation | seeds | {' | '.join(heads)} |",
        "|---" * (len(heads) + 5) + "|",
    ]
    keys = sorted({(r["setting"], r["generator"], r["masks"], r["labels"]) for r in results})
    curves: dict[str, list[tuple[float, float]]] = {}
    alone: dict[str, dict[int, dict[int, tuple[float, float]]]] = {}  # by masks and seed, whatever ViT-P learned from
    for key in keys:
        group = [r for r in results if (r["setting"], r["generator"], r["masks"], r["labels"]) == key]
        setting, generator, masks, labels = key
        hours = statistics.mean(r["minutes"] + r["cheap_minutes"] for r in group) / 60
        for task in group[0]["tasks"]:
            scores = [r["tasks"][task] for r in group]
            columns = [[each["scores"][index] for each in scores] for index in range(len(ALPHAS))]
            cells = [cell(column) for column in columns] + [cell([each["oracle"] for each in scores])]
            score_name = "PQ" if task == "panoptic" else "mIoU"
            title = f"{setting}, {generator}, {score_name}"
            lines.append(f"| {title} | {masks} | {labels} | {hours:.1f} | {len(group)} | {' | '.join(cells)} |")
            panel = f"{score_name}, {setting}"
            alone.setdefault(f"{panel}/{generator} alone", {}).setdefault(masks, {}).update(
                {each["seed"]: (each["minutes"] / 60, 100 * each["tasks"][task]["scores"][0]) for each in group}
            )
            fused = 100 * statistics.mean(columns[ALPHAS.index(0.4)])
            curves.setdefault(f"{panel}/{generator} and ViT-P of {labels}, alpha 0.4", []).append((hours, fused))
    for name, by_masks in alone.items():
        curves[name] = [tuple(map(statistics.mean, zip(*seeds.values(), strict=True))) for seeds in by_masks.values()]
    curves = {name: sorted(points) for name, points in curves.items()}
    draw(curves, output / "label_cost.png")
    return "\n".join(lines)


def draw(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Scores over hours of annotation, a panel for each score."""
    from matplotlib.figure import Figure

    panels = sorted({name.split("/")[0] for name in curves})
    figure = Figure(figsize=(5 * len(panels), 3.6), dpi=130, layout="constrained")
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for name, points in curves.items():
            if name.startswith(panel + "/"):
                hours, scores = zip(*points, strict=True)
                axes.plot(hours, scores, marker="o", markersize=4, label=name.split("/", 1)[1])
        axes.set_title(panel, fontsize=10)
        axes.set_xlabel("hours of annotation")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train and score one cell")
    one.add_argument("--data", default="scenes", metavar="scenes|camvid:FOLDER")
    one.add_argument("--masks", type=int, default=60, help="images with masks")
    one.add_argument("--labels", choices=LABELS, default="coarse", help="of the other images, for ViT-P")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--steps", type=int, default=1200, help="of the generator")
    one.add_argument("--classifier-steps", type=int, default=1500)
    one.add_argument(
        "--generator", default="eomt", metavar="eomt|row0|FOLDER", help="trained here, or another model (default: eomt)"
    )
    one.add_argument("--name", help="of another generator, in the table")
    one.add_argument("--start", type=Path, metavar="FOLDER", help="EoMT whose blocks ViT-P starts from")
    one.add_argument("--limit", type=int, help="images to train on and to score, for a trial")
    one.add_argument("--output", type=Path, required=True)
    commands.add_parser("table", help="print the table").add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.command == "run":
        run(args)
    else:
        print(table(args.output))


if __name__ == "__main__":
    main()
