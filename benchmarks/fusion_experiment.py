"""Benefit of ViT-P to a trained generator: scores of the generator alone, with ViT-P, and with perfect labels.

    python benchmarks/fusion_experiment.py run --data scenes --seed 0 --output runs/fusion --name EoMT \\
        --generator runs/annealing/annealed-0/model --classifier runs/vit_p/joint-seed0
    python benchmarks/fusion_experiment.py run --data camvid:FOLDER --split drive --seed 0 --output runs/fusion ...
    python benchmarks/fusion_experiment.py table --output runs/fusion

`scenes` are the 200 unseen ones that `mask_annealing.py` scores ("medium", 96 pixels), `camvid:FOLDER` the frames that
`camvid.py` scores. Generator and ViT-P were trained on other images of the same data, from scratch: this shows what a
second classifier adds to small models without pretraining, and nothing about large pretrained ones.

A run uses one thread and runs each part once per image, whatever the number of alphas; a finished run is not
repeated. `table` prints means and spreads over seeds, and draws the curves over alpha.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from camvid_data import LABELS, SPLITS, read_split
from mask_annealing import DIFFICULTY, IMAGE_SIZE, NUM_TEST_SCENES
from measuring import machine
from tables import cell, read_results, write_json

from hf_segvit.data.generated_scenes import GeneratedScenes, scene_labels, scene_stuff_classes
from hf_segvit.drawing.segments import plot_curves
from hf_segvit.evaluation.alpha_sweep import DEFAULT_ALPHAS, sweep_alphas, sweep_content, sweep_text
from hf_segvit.inference.loading import load_universal_model
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor
from hf_segvit.models.image_processing_vit_p_fusion import ViTPFusionImageProcessor
from hf_segvit.models.modeling_vit_p import ViTPForPointClassification
from hf_segvit.models.modeling_vit_p_fusion import ViTPFusionForUniversalSegmentation

SHOWN_ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # in the table
SCORES = {"panoptic": ("pq", "PQ"), "semantic": ("mean_iou", "mIoU")}


def load_fused(generator: str, classifier: str) -> tuple[Any, Any]:
    """A fused model of two folders; a ViT-P without image processor gets one of its own size."""
    model, processor = load_universal_model(generator)
    vit_p = ViTPForPointClassification.from_pretrained(classifier)
    if (Path(classifier) / "preprocessor_config.json").is_file():
        vit_p_processor = ViTPImageProcessor.from_pretrained(classifier)
    else:
        side = vit_p.config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        vit_p_processor = ViTPImageProcessor(
            size={"height": height, "width": width}, patch_size=vit_p.config.patch_size
        )
    fused = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(
        model, vit_p, task=getattr(processor, "task", "panoptic")
    )
    return fused, ViTPFusionImageProcessor.from_generator_and_classifier(
        processor, vit_p_processor, config=fused.config
    )


def read_data(data: str, split: str, limit: int | None) -> tuple[list[dict[str, Any]], dict[int, str], list[int], Any]:
    """Entries to score, their classes, which of those are stuff, and the tasks that they have labels for."""
    if data == "scenes":
        size = (IMAGE_SIZE, IMAGE_SIZE)
        scenes = GeneratedScenes(limit or NUM_TEST_SCENES, "test", seed=0, size=size, difficulty=DIFFICULTY)
        entries = [scenes[index] for index in range(len(scenes))]
        return entries, scene_labels(DIFFICULTY), scene_stuff_classes(DIFFICULTY), ("panoptic", "semantic")
    kind, _, folder = data.partition(":")
    if kind != "camvid" or not folder:
        raise SystemExit(f"--data {data}: it is scenes, or camvid:FOLDER")
    frames = read_split(folder, split)[1][:limit]
    entries = [
        {
            "image_id": frame.name,
            "image": frame.image,
            "segment_map": frame.labels,
            "segments": [{"id": label, "label_id": label, "is_crowd": False} for label in LABELS],
        }
        for frame in frames
    ]
    return entries, LABELS, [], ("semantic",)


def run(args: argparse.Namespace) -> None:
    """Score one generator with one ViT-P."""
    setting = "scenes" if args.data == "scenes" else f"camvid-{args.split}"
    path = args.output / f"{setting}-{args.name}-seed{args.seed}.json"
    if path.exists():
        print(f"{path} is finished")
        return
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model, processor = load_fused(args.generator, args.classifier)
    entries, id2label, stuff_classes, tasks = read_data(args.data, args.split, args.limit)
    result: dict[str, Any] = {
        "setting": setting,
        "name": args.name,
        "seed": args.seed,
        "pictures": len(entries),
        "generator": Path(args.generator).name,
        "classifier": Path(args.classifier).name,
        "parameters": {
            part: sum(parameter.numel() for parameter in getattr(model, part).parameters())
            for part in ("generator", "classifier")
        },
        "machine": machine(),
        "tasks": {},
    }
    start = time.process_time()
    for task in tasks:
        segmenter = Segmenter(model, processor, task=task, device="cpu", stuff_classes=stuff_classes)
        settings = {"stuff_classes": stuff_classes, "more_metrics": ["oracle"], "batch_size": 8}
        sweep = sweep_alphas(segmenter, DEFAULT_ALPHAS, entries, id2label, **settings, progress=True)
        print(sweep_text(sweep))
        content = sweep_content(sweep)
        for values in content["results"].values():
            del values["pictures"]  # thousands of rows that nobody reads
        result["tasks"][task] = content
    result["seconds"] = round(time.process_time() - start)
    write_json(path, result)


def table(output: Path) -> str:
    """Means and spreads over seeds as Markdown; draws the curves over alpha into the folder."""
    results = read_results(output)
    lines = [f"{results[0]['machine']}; mean (lowest - highest) over the seeds, percent", ""]
    heads = ["generator alone", *[f"alpha {alpha:g}" for alpha in SHOWN_ALPHAS[1:]], "perfect labels", "gap closed"]
    lines += [f"| | seeds | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    curves: dict[str, list[tuple[float, float]]] = {}
    for setting, name in sorted({(result["setting"], result["name"]) for result in results}):
        group = [result for result in results if (result["setting"], result["name"]) == (setting, name)]
        for task in group[0]["tasks"]:
            label = SCORES[task][1]
            sweeps = [result["tasks"][task] for result in group]
            alphas = sweeps[0]["alphas"]
            columns = {alpha: [sweep["scores"][place] for sweep in sweeps] for place, alpha in enumerate(alphas)}
            oracles = [sweep["oracle"] for sweep in sweeps]
            cells = [cell(columns[alpha]) for alpha in SHOWN_ALPHAS] + [cell(oracles)]
            # The alpha that is published, since the best one would have been chosen on the images it is scored on.
            gains = [new - old for new, old in zip(columns[0.4], columns[0.0], strict=True)]
            gaps = [oracle - old for oracle, old in zip(oracles, columns[0.0], strict=True)]
            closed = [gain / gap for gain, gap in zip(gains, gaps, strict=True) if gap > 0]
            cells.append(f"{100 * statistics.mean(closed):.0f} % at 0.4" if closed else "-")
            lines.append(f"| {setting}, {name}, {label} | {len(group)} | {' | '.join(cells)} |")
            panel = f"{label}, {setting}"
            curves[f"{panel}/{name}"] = [(alpha, 100 * statistics.mean(columns[alpha])) for alpha in alphas]
            level = 100 * statistics.mean(oracles)
            curves[f"{panel}/{name}, perfect labels"] = [(alphas[0], level), (alphas[-1], level)]
    plot_curves(curves, output / "alpha.png", title="Mean over the seeds", x_label="alpha, the weight of ViT-P")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="score a generator with a ViT-P")
    one.add_argument("--generator", required=True, metavar="FOLDER")
    one.add_argument("--classifier", required=True, metavar="FOLDER")
    one.add_argument("--name", default="EoMT", help="of the generator, in the table")
    one.add_argument("--data", default="scenes", metavar="scenes|camvid:FOLDER")
    one.add_argument("--split", choices=SPLITS, default="official", help="of CamVid")
    one.add_argument("--seed", type=int, default=0, help="that both were trained with")
    one.add_argument("--limit", type=int, help="score the first images alone")
    one.add_argument("--output", type=Path, required=True)
    commands.add_parser("table", help="print the table").add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.command == "run":
        run(args)
    else:
        print(table(args.output))


if __name__ == "__main__":
    main()
