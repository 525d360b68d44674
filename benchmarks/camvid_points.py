"""ViT-P on CamVid from scratch: point accuracy compared with a linear classifier and the EoMT of camvid.py.

    python benchmarks/camvid_points.py train --split official --seed 0 --output OUT [--eomt FOLDER]
    python benchmarks/camvid_points.py table --output OUT

Both splits, frames and input size are camvid.py's. All are scored at the same points: 100
random points of each frame, all its classes equally often, and the innermost point of every class. One thread; a
finished model is not trained again, and its weights stay in OUT, for fusion.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from camvid_data import INPUT, LABELS, SPLITS, array_entry, read_split
from measuring import machine
from torch.optim import AdamW
from tqdm import tqdm
from vit_p_scenes import as_prompts, pixel_values, write_json
from vit_p_scenes_peers import eomt_accuracy, linear_accuracy, score
from vit_p_scenes_report import markdown_table, read_results
from vit_p_scenes_start import place_aware

from hf_segvit.data.augmentation import AugmentedDataset
from hf_segvit.data.collation import PointCollator
from hf_segvit.data.prompts import PointAugmentation
from hf_segvit.models.configuration_vit_p import ViTPConfig
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor
from hf_segvit.models.modeling_vit_p import ViTPForPointClassification
from hf_segvit.training.data_order import StepOrder
from hf_segvit.training.optimizers import learning_rate_factor

STEPS, BATCH_SIZE, NUM_POINTS, NUM_TEST_POINTS = 1000, 8, 48, 100
LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY, MAX_GRAD_NORM = 1.5e-3, 50, 0.05, 1.0
SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data"


def build_model() -> ViTPForPointClassification:
    """A model of 1.3 million parameters: six blocks, 192 patches."""
    return place_aware(
        ViTPForPointClassification(
            ViTPConfig(
                hidden_size=144,
                num_hidden_layers=6,
                num_attention_heads=6,
                intermediate_size=432,
                image_size=list(INPUT),
                patch_size=12,
                layer_scale_init_value=None,
                initializer_range=0.08,
                prompt_attention="joint",
                id2label=LABELS,
                label2id={name: label for label, name in LABELS.items()},
            )
        )
    )


def train(entries: list[dict[str, Any]], steps: int, seed: int) -> tuple[ViTPForPointClassification, dict[str, Any]]:
    """Train a model; return it with its history and processor time."""
    torch.manual_seed(seed)
    model, collate, history = build_model().train(), PointCollator(), []
    augment = PointAugmentation(INPUT, num_points=NUM_POINTS, max_rotation=0.0)
    samples = AugmentedDataset(entries, augment, seed=seed)
    order = StepOrder(len(samples), BATCH_SIZE, seed)
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    start = time.process_time()
    for step in tqdm(range(steps), desc=f"ViT-P, seed {seed}", disable=None):
        factor = learning_rate_factor(step, idle=0, warmup=WARMUP_STEPS, total_steps=steps, schedule="cosine")
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        loss = model(**collate([samples[key] for key in order.step_samples(step)])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0:
            history.append([step + 1, loss.item()])
    return model.eval(), {"seconds": time.process_time() - start, "history": history}


@torch.inference_mode()
def accuracy(model: ViTPForPointClassification, tests: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores by kind of points."""
    return score(
        tests,
        len(LABELS),
        NUM_TEST_POINTS,
        lambda entry, points: model(pixel_values(entry), as_prompts(points)).logits[0],
    )


def run(args: argparse.Namespace) -> None:
    """Train and score what has no result yet."""
    folder = args.output / args.split
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    frames = read_split(args.data, args.split)
    entries, tests = ([array_entry(frame) for frame in part] for part in frames)
    for cell in ("joint", "linear baseline", *(["EoMT"] if args.eomt else [])):
        path = folder / f"{cell.replace(' ', '-')}-seed{args.seed}.json"
        if path.exists():
            print(f"{path} is there already")
            continue
        if cell == "EoMT":
            result = eomt_accuracy(args.eomt, tests, NUM_TEST_POINTS)
        elif cell == "joint":
            model, about = train(entries, args.steps, args.seed)
            model.save_pretrained(path.with_suffix(""))
            size = {"height": INPUT[0], "width": INPUT[1]}
            ViTPImageProcessor(size=size, patch_size=model.config.patch_size).save_pretrained(path.with_suffix(""))
            result = {**about, "parameters": model.num_parameters(), "scores": accuracy(model, tests)}
        else:
            size = (args.steps, BATCH_SIZE, NUM_POINTS)
            result = linear_accuracy(entries, tests, len(LABELS), args.seed, size)
        facts = {"cell": cell, "split": args.split, "seed": args.seed, "steps": args.steps, "machine": machine()}
        write_json(path, facts | result)
        print(cell, {kind: round(100 * scores["top_1"], 1) for kind, scores in result["scores"].items()}, flush=True)


def table(args: argparse.Namespace) -> None:
    """Print all results, one table per split."""
    for split in SPLITS:
        if results := read_results(args.output / split)[0]:
            print(f"Split {split}\n\n{markdown_table(results, None)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="train and score")
    command.add_argument("--split", choices=SPLITS, default="official")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=int, default=STEPS)
    command.add_argument("--eomt", metavar="FOLDER", help="EoMT that camvid.py trained on this split")
    sample = Path(os.environ.get("HF_SEGVIT_SAMPLE_DATA", SAMPLE))
    command.add_argument("--data", type=Path, default=sample / "camvid", help="folder of CamVid")
    command.add_argument("--output", type=Path, required=True)
    command.set_defaults(run=run)
    command = commands.add_parser("table", help="print the results")
    command.add_argument("--output", type=Path, required=True)
    command.set_defaults(run=table)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
