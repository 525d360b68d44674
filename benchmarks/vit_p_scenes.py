"""ViT-P in miniature: small point classifiers on generated scenes, from scratch, with different labels.

    python benchmarks/vit_p_scenes.py classes --output runs/vit_p --seed 0 [--eomt FOLDER]
    python benchmarks/vit_p_scenes.py attention --output runs/vit_p --seed 0
    python benchmarks/vit_p_scenes.py boxes --output runs/vit_p --seed 0
    python benchmarks/vit_p_scenes.py "mixed boxes" --output runs/vit_p --seed 0    # boxes beside fine labels
    python benchmarks/vit_p_scenes.py coarse --output runs/vit_p --seed 0
    python benchmarks/vit_p_scenes.py alone --output runs/vit_p --seed 0    # boxes and coarse labels without fine ones
    python benchmarks/vit_p_scenes.py pretrained --output runs/vit_p --seed 0 --eomt FOLDER
    python benchmarks/vit_p_scenes.py timing --output runs/vit_p
    python benchmarks/vit_p_scenes.py table --output runs/vit_p

Each experiment trains the cells that it compares, on one thread; a finished cell is not repeated, so that experiments
may share one. All cells of a seed take as many steps of as many points. "Few" cells have fine labels of FEW scenes;
boxes and coarse labels are those of other scenes. "pretrained" starts from the encoder of an EoMT, as the two models
start from the same backbone where there is one. Scores are of 200 unseen scenes: at random points, all classes
equally often, asked together as in training; and at the innermost point of every segment.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import machine
from torch import Tensor
from torch.optim import AdamW
from tqdm import tqdm
from vit_p_scenes_peers import eomt_accuracy, linear_accuracy, score
from vit_p_scenes_report import draw_curves, markdown_table, read_results
from vit_p_scenes_start import from_eomt, place_aware
from vit_p_scenes_timing import time_prompts

from hf_segvit.atomic_files import replacing
from hf_segvit.data.augmentation import AugmentedDataset
from hf_segvit.data.collation import PointCollator, normalize_pixels
from hf_segvit.data.generated_scenes import GeneratedScenes, scene_labels
from hf_segvit.data.mixture import MixedDataset, MixturePart
from hf_segvit.data.prompts import PointAugmentation, segment_boxes
from hf_segvit.evaluation.points import labelled_segments
from hf_segvit.metrics.point_accuracy import PointAccuracy
from hf_segvit.models.configuration_vit_p import ViTPConfig
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor
from hf_segvit.models.modeling_vit_p import ViTPForPointClassification
from hf_segvit.training.data_order import StepOrder
from hf_segvit.training.optimizers import learning_rate_factor

IMAGE_SIZE, NUM_TEST_SCENES = 96, 200
NUM_SCENES, FEW = 3000, 60  # with any labels, and with fine ones where these are few
NUM_POINTS, BATCH_SIZE = 32, 8
LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY, MAX_GRAD_NORM = 1.5e-3, 50, 0.05, 1.0
RECORD_EVERY = 10  # steps


@dataclass(frozen=True)
class Labels:
    """Labels of scenes `start` to `stop`, and their share of the samples."""

    source: str
    start: int = 0
    stop: int = NUM_SCENES
    share: float = 1.0


@dataclass(frozen=True)
class Stage:
    """A part of training on labels of some kinds, with a schedule of its own."""

    labels: tuple[Labels, ...]
    share: float = 1.0  # of the steps
    rate: float = 1.0  # of the learning rate


FINE, FEW_FINE = Labels("mask"), Labels("mask", 0, FEW)
BOXES, COARSE = Labels("box", FEW), Labels("coarse", FEW)
# Boxes as prompts without points anywhere in them, whose labels are wrong wherever a box covers another segment.
BOX_PROMPTS = Labels("box prompts", FEW)
CELLS: dict[str, tuple[str, tuple[Stage, ...]]] = {
    "joint": ("joint", (Stage((FINE,)),)),
    "isolated": ("isolated", (Stage((FINE,)),)),
    "few fine": ("joint", (Stage((FEW_FINE,)),)),
    "boxes, then few fine": ("joint", (Stage((BOXES,), 0.7), Stage((FEW_FINE,), 0.3))),
    "boxes, then few fine gently": ("joint", (Stage((BOXES,), 0.7), Stage((FEW_FINE,), 0.3, rate=0.3))),
    "few fine + boxes": ("joint", (Stage((FEW_FINE, Labels("box", FEW, share=3.0))),)),
    "few fine + box prompts": ("joint", (Stage((FEW_FINE, Labels("box prompts", FEW, share=3.0))),)),
    "few fine + coarse": ("joint", (Stage((FEW_FINE, Labels("coarse", FEW, share=3.0))),)),
    "boxes alone": ("joint", (Stage((BOXES,)),)),
    "box prompts alone": ("joint", (Stage((BOX_PROMPTS,)),)),
    "coarse alone": ("joint", (Stage((COARSE,)),)),
    "EoMT's encoder": ("joint", (Stage((FINE,)),)),
}
EXPERIMENTS = {
    "classes": ("joint",),
    "attention": ("joint", "isolated"),
    "boxes": ("few fine", "boxes, then few fine"),
    "mixed boxes": ("few fine", "boxes, then few fine gently", "few fine + boxes", "few fine + box prompts"),
    "coarse": ("few fine", "few fine + coarse"),
    "alone": ("boxes alone", "box prompts alone", "coarse alone"),
    "pretrained": ("EoMT's encoder",),
}


class Scenes:
    """Scenes of a difficulty, each drawn once."""

    def __init__(self, split: str, number: int, seed: int, difficulty: str) -> None:
        scenes = GeneratedScenes(number, split, seed=seed, size=(IMAGE_SIZE, IMAGE_SIZE), difficulty=difficulty)
        self.rows = [scenes[index] for index in tqdm(range(number), desc=f"drawing {split} scenes", disable=None)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def model_config(attention: str, difficulty: str) -> ViTPConfig:
    """A model of six blocks."""
    id2label = scene_labels(difficulty)
    return ViTPConfig(
        hidden_size=144,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=432,
        image_size=IMAGE_SIZE,
        patch_size=12,
        layer_scale_init_value=None,
        initializer_range=0.08,  # about 1 / sqrt(hidden_size): nothing is pretrained here
        prompt_attention=attention,
        id2label=id2label,
        label2id={name: label for label, name in id2label.items()},
    )


def training_samples(stage: Stage, scenes: Scenes, seed: int, num_points: int) -> Any:
    """The samples of a stage; images are cropped and mirrored, not turned."""
    parts = []
    for labels in stage.labels:
        augment = PointAugmentation(
            (IMAGE_SIZE, IMAGE_SIZE),
            num_points=num_points,
            source="box" if labels.source == "box prompts" else labels.source,
            box_share=1.0 if labels.source == "box prompts" else 0.5,
            max_rotation=0.0,
        )
        parts.append(MixturePart(scenes.rows[labels.start : labels.stop], augment, labels.share))
    if len(parts) == 1:
        return AugmentedDataset(parts[0].dataset, parts[0].augmentation, seed=seed)
    return MixedDataset(parts, seed=seed)


def train(
    cell: str, scenes: Scenes, difficulty: str, steps: int, seed: int, eomt: str | None = None, points: int = NUM_POINTS
) -> tuple[Any, dict[str, Any]]:
    """Train the model of a cell; return it with its history and processor time."""
    attention, stages = CELLS[cell]
    torch.manual_seed(seed)
    config = model_config(attention, difficulty)
    if cell == "EoMT's encoder":
        if eomt is None:
            raise SystemExit("give --eomt FOLDER, the EoMT whose encoder is to be taken")
        model = from_eomt(eomt, config).train()
    else:
        model = place_aware(ViTPForPointClassification(config)).train()
    collate, history, done, start = PointCollator(), [], 0, time.process_time()
    for number, stage in enumerate(stages):
        samples = training_samples(stage, scenes, seed + number, points)
        order = StepOrder(len(samples), BATCH_SIZE, seed + number)
        stage_steps = steps - done if stage is stages[-1] else round(stage.share * steps)
        optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
        for step in tqdm(range(stage_steps), desc=f"{cell}, seed {seed}", disable=None):
            factor = learning_rate_factor(step, idle=0, warmup=WARMUP_STEPS, total_steps=stage_steps, schedule="cosine")
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * stage.rate * factor
            outputs = model(**collate([samples[key] for key in order.step_samples(step)]))
            outputs.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            if (done + step + 1) % RECORD_EVERY == 0:
                history.append([done + step + 1, float(outputs.loss.detach())])
        done += stage_steps
    return model.eval(), {"seconds": time.process_time() - start, "history": history}


@torch.inference_mode()
def accuracy(model: Any, tests: Scenes) -> dict[str, Any]:
    """Scores by kind of points, and of boxes around the segments."""
    results = score(
        tests,
        model.config.num_labels,
        NUM_POINTS,
        lambda entry, points: model(pixel_values(entry), as_prompts(points)).logits[0],
    )
    metric = PointAccuracy(model.config.num_labels)
    for index in range(len(tests)):
        segment_map, labels = labelled_segments(tests[index])
        boxes, present = segment_boxes(segment_map)
        corners, size = torch.from_numpy(boxes[:, :2]), torch.from_numpy(boxes[:, 2:] - boxes[:, :2])
        prompts = torch.cat([corners + size / 2, size], dim=1).float()[None]
        metric.add_batch(
            predictions=[model(pixel_values(tests[index]), prompts).logits[0]],
            references=[torch.from_numpy(np.asarray(labels)[present].astype(np.int64))],
        )
    results["boxes"] = {"top_1": metric.compute()["top_1"]}
    return results


def pixel_values(entry: Any) -> Tensor:
    """(1, 3, H, W) of a scene."""
    return normalize_pixels(torch.from_numpy(entry["image"]).permute(2, 0, 1)[None].contiguous())


def as_prompts(points: Tensor) -> Tensor:
    """(1, N, 4) prompts of points (N, 2)."""
    return torch.cat([points, torch.zeros_like(points)], dim=1)[None]


def run_cell(cell: str, args: argparse.Namespace, scenes: dict[str, Scenes]) -> None:
    """Train and score a cell, unless that is done."""
    name = cell.replace("'", "").replace(", ", "-").replace(" + ", "-and-").replace(" ", "-")
    path = args.output / f"{name}-seed{args.seed}.json"
    facts = {"cell": cell, "seed": args.seed, "steps": args.steps, "difficulty": args.difficulty}
    if path.exists():
        found = json.loads(path.read_text())
        if {key: found[key] for key in facts} != facts:
            raise SystemExit(f"{path} is of another setting; choose another --output")
        print(f"{cell}, seed {args.seed}: finished before")
        return
    draw_scenes(scenes, args)
    if cell == "linear baseline":
        size = (args.steps, BATCH_SIZE, NUM_POINTS)
        result = linear_accuracy(scenes["train"], scenes["test"], len(scene_labels(args.difficulty)), args.seed, size)
    elif cell == "EoMT":
        result = eomt_accuracy(args.eomt, scenes["test"], NUM_POINTS)
    else:
        model, about = train(cell, scenes["train"], args.difficulty, args.steps, args.seed, args.eomt, args.points)
        model.save_pretrained(path.with_suffix(""))
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        processor = ViTPImageProcessor(size=size, patch_size=model.config.patch_size)
        processor.save_pretrained(path.with_suffix(""))
        stages = [asdict(stage) for stage in CELLS[cell][1]]
        parameters = sum(parameter.numel() for parameter in model.parameters())
        result = {**about, "stages": stages, "parameters": parameters, "scores": accuracy(model, scenes["test"])}
    write_json(path, {**facts, **result, "machine": machine()})
    shown = {kind: round(100 * scores["top_1"], 1) for kind, scores in result["scores"].items()}
    print(f"{cell}, seed {args.seed}: top-1 {shown}, {result.get('seconds', 0):.0f} s of processor time", flush=True)


def draw_scenes(scenes: dict[str, Scenes], args: argparse.Namespace) -> None:
    """Draw training and test scenes once they are needed."""
    if not scenes:
        scenes["train"] = Scenes("train", args.scenes, args.seed, args.difficulty)
        scenes["test"] = Scenes("test", args.test_scenes, 0, args.difficulty)


def write_json(path: Path, values: Any) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(values, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "all", "timing", "table"])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000, help="of each cell")
    parser.add_argument("--difficulty", default="medium", help="of the scenes")
    parser.add_argument("--scenes", type=int, default=NUM_SCENES, help=argparse.SUPPRESS)
    parser.add_argument("--test-scenes", type=int, default=NUM_TEST_SCENES, help=argparse.SUPPRESS)
    parser.add_argument("--eomt", metavar="FOLDER", help="trained EoMT to compare with or to start from")
    parser.add_argument("--large", action="store_true", help="timing: also of a ViT-S at 518 pixels, random weights")
    parser.add_argument("--points", type=int, default=NUM_POINTS, help="of an image in training")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if args.experiment == "timing":
        write_json(args.output / "timing.json", time_prompts(model_config, args.difficulty, args.large))
    if args.experiment in ("timing", "table"):
        results, timing = read_results(args.output)
        print(markdown_table(results, timing))
        if results:
            draw_curves(results, args.output / "curves.png")
        return
    experiments = list(EXPERIMENTS) if args.experiment == "all" else [args.experiment]
    cells = list(dict.fromkeys(cell for name in experiments for cell in EXPERIMENTS[name]))
    if "classes" in experiments:
        cells += ["linear baseline", *(["EoMT"] if args.eomt else [])]
    scenes: dict[str, Scenes] = {}
    for cell in cells:
        run_cell(cell, args, scenes)


if __name__ == "__main__":
    main()
