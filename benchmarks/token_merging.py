"""Token merging: what it gains in throughput, and what it costs in quality.

    OMP_NUM_THREADS=1 python benchmarks/token_merging.py speed --output benchmarks/results/token_merging_speed
    OMP_NUM_THREADS=1 python benchmarks/token_merging.py quality MODEL --output benchmarks/results/token_merging_quality

`speed` times an EoMT-S with random weights against itself without merging, at equal precision; the two take turns, and
processor time counts. Its images are flat in one part, where all windows merge, and noise in the other, where none
does. `quality` scores MODEL, such as the one that `hf-segvit demo --output DIR` leaves in DIR/model, on generated
scenes over thresholds, image by image, with its throughput beside that without merging. Each writes OUTPUT.json and
OUTPUT.md.
"""

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import machine, time_pair

from hf_segvit import EoMTForUniversalSegmentation
from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.evaluation import evaluate
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.token_merging import MergedTokens

VIT_S = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "position_embedding_type": "rope",  # learned ones, at random, would tell flat patches apart
    "num_query_layers": 3,
    "num_labels": 133,
    "masked_attention": False,
}
THRESHOLD = 0.9
THRESHOLDS = (0.99, 0.97, 0.95, 0.9, 0.85, 0.8, 0.7, 0.5)
ENDS = ("queries", "upscaling")


@contextmanager
def kept_shares() -> Iterator[list[float]]:
    """Collects the share of the patches' tokens that is left at the end of each pass with merging."""
    shares: list[float] = []
    unmerge = MergedTokens.unmerge

    def recorded(self: MergedTokens, hidden_states: torch.Tensor) -> torch.Tensor:
        rows, columns = self.grid_size
        shares.append((hidden_states.shape[1] - self.num_prefix_tokens) / (rows * columns))
        return unmerge(self, hidden_states)

    MergedTokens.unmerge = recorded  # type: ignore[method-assign]
    try:
        yield shares
    finally:
        MergedTokens.unmerge = unmerge  # type: ignore[method-assign]


@torch.inference_mode()
def speed(sizes: list[int], dtypes: list[str], flat_shares: list[float], repeats: int) -> list[dict[str, Any]]:
    """Seconds with and without merging, by input size, precision, share of flat image, and end."""
    rows = []
    for size in sizes:
        for name in dtypes:
            dtype = getattr(torch, name)
            torch.manual_seed(0)
            config = EoMTConfig(**VIT_S, image_size=size)
            plain = EoMTForUniversalSegmentation(config).eval().to(dtype)
            merging = EoMTForUniversalSegmentation(config.from_dict(config.to_dict())).eval().to(dtype)
            merging.load_state_dict(plain.state_dict())
            for flat in flat_shares:
                pixels = torch.randn(1, 3, size, size, dtype=dtype)
                pixels[..., : round(size * flat / 32) * 32] = 0.5
                for end in ENDS:
                    merging.merge_tokens(THRESHOLD, end=end)
                    with kept_shares() as shares:
                        seconds, before = time_pair(partial(merging, pixels), partial(plain, pixels), repeats, "cpu")
                    row = {
                        "input": size,
                        "dtype": name,
                        "flat": flat,
                        "tokens kept": round(shares[0], 3),
                        "back on the grid before": end,
                        "seconds": round(statistics.median(seconds), 3),
                        "range": [round(min(seconds), 3), round(max(seconds), 3)],
                        "seconds without": round(statistics.median(before), 3),
                        "range without": [round(min(before), 3), round(max(before), 3)],
                        "throughput": round(statistics.median(before) / statistics.median(seconds), 2),
                    }
                    print(row, file=sys.stderr, flush=True)
                    rows.append(row)
    return rows


@torch.inference_mode()
def _pass_over(model: Any, inputs: list[torch.Tensor]) -> None:
    for pixel_values in inputs:
        model(pixel_values)


def quality(source: str, num_scenes: int) -> list[dict[str, Any]]:
    """PQ and mIoU over thresholds, on unseen scenes of the model's own size."""
    rows = []
    segmenters = {task: Segmenter.from_pretrained(source, task=task, device="cpu") for task in ("panoptic", "semantic")}
    size = segmenters["panoptic"].model.config.image_height_width[0]
    scenes = GeneratedScenes(num_scenes, "test", size=(size, size))
    plain = Segmenter.from_pretrained(source, task="panoptic", device="cpu")
    inputs = [plain.processor(scenes[i]["image"], return_tensors="pt")["pixel_values"] for i in range(20)]
    last = segmenters["panoptic"].model.config.merging_layers[-1]
    settings: list[tuple[float | None, str, list[int]]] = [(None, "queries", [])]
    settings += [(threshold, "queries", [1]) for threshold in THRESHOLDS]
    settings += [(threshold, end, [1, last]) for end in ENDS for threshold in THRESHOLDS]
    for threshold, end, layers in settings:
        row: dict[str, Any] = {"threshold": threshold, "merging": ["none", "local", "local, global"][len(layers)]}
        row["back on the grid before"] = end if threshold else None
        for task, segmenter in segmenters.items():
            segmenter.model.merge_tokens(threshold, layers=layers or None, end=end, batch="per_image")
            with kept_shares() as shares:
                stuff = scenes.stuff_classes if task == "panoptic" else ()
                metrics = evaluate(segmenter, scenes, scenes.id2label, stuff_classes=stuff, batch_size=50).metrics
            row["tokens kept"] = round(statistics.mean(shares), 3) if shares else 1.0
            if task == "panoptic":
                row |= {name: round(100 * metrics[name], 1) for name in ("pq", "pq_things", "pq_stuff")}
            else:
                row["mIoU"] = round(100 * metrics["mean_iou"], 1)
        passes = (partial(_pass_over, each.model, inputs) for each in (segmenters["panoptic"], plain))
        seconds, before = time_pair(*passes, repeats=5, clock="cpu")
        row["throughput"] = round(statistics.median(before) / statistics.median(seconds), 2)
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names)]
    lines += [["" if row[name] is None else str(row[name]) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="written with the endings .json and .md")
    parts = parser.add_subparsers(dest="part", required=True)
    timed = parts.add_parser("speed")
    timed.add_argument("--sizes", type=int, nargs="+", default=[640, 1024])
    timed.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    timed.add_argument("--flat", type=float, nargs="+", default=[0.0, 0.5, 0.9], help="flat share of the image")
    timed.add_argument("--repeats", type=int, default=3)
    scored = parts.add_parser("quality")
    scored.add_argument("model")
    scored.add_argument("--scenes", type=int, default=200)
    for part in (timed, scored):
        part.add_argument("--output", type=Path, default=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "speed":
        rows = speed(args.sizes, args.dtypes, args.flat, args.repeats)
    else:
        rows = quality(args.model, args.scenes)
    about = {
        "command": "OMP_NUM_THREADS=1 python benchmarks/token_merging.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
    }
    print(table(rows))
    if args.output is not None:
        args.output.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        text = f"`{about['command']}`, {about['date']}, {about['machine']}\n\n{table(rows)}\n"
        args.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
