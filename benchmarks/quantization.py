"""What quantisation costs in quality and saves in time, in one table.

    python benchmarks/quantization.py [--model FOLDER] [--scenes 400] [--no-timing]

Panoptic quality and mean IoU on generated scenes that the model has not seen (of the demo's kind) in fp32 and bf16, as
they are and quantised. Without --model the demo is trained first, which takes some minutes. Time is the processor's,
one thread, interleaved, for a forward pass of a ViT-S at 640 pixels with random weights: the demo's model is too small
to time. "weights" are the bytes of that ViT-S in memory.
"""

import argparse
import copy
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from compare_transformers import make_pair
from measuring import machine, time_interleaved
from transformers import logging

from hf_segvit.data.reading import describe, load_segmentation_dataset
from hf_segvit.demo import run_demo
from hf_segvit.evaluation import evaluate
from hf_segvit.inference.quantization import quantize_model
from hf_segvit.inference.segmenter import Segmenter

VARIANTS = [
    (dtype, method)
    for dtype in (torch.float32, torch.bfloat16)
    for method in (None, "int8", "int8-weight-only", "fp8")
    if method != "fp8" or (torch.cuda.is_available() and dtype == torch.bfloat16)
]


def score(folder: str, dtype: torch.dtype, method: str | None, scenes: int, device: str) -> dict[str, float]:
    """PQ and mIoU in percent."""
    found = {}
    for task, metric in (("panoptic", "pq"), ("semantic", "mean_iou")):
        data = load_segmentation_dataset(f"generated:easy?num_scenes={scenes}&size=64&seed=0", split="test", task=task)
        about = describe(data)
        segmenter = Segmenter.from_pretrained(folder, task=task, device=device, dtype=dtype, quantization=method)
        settings = {"stuff_classes": about.stuff_classes} if task == "panoptic" else {}
        result = evaluate(segmenter, data, about.id2label, batch_size=50, **settings)
        found[metric] = 100 * result.metrics[metric]
    return found


@torch.inference_mode()
def times(repeats: int, device: str) -> tuple[list[list[float]], list[float]]:
    """Seconds of each variant, and MiB of its weights."""
    models = {dtype: make_pair("S", dtype=dtype)[0].to(device) for dtype in (torch.float32, torch.bfloat16)}
    calls, sizes = [], []
    for dtype, method in VARIANTS:
        model = copy.deepcopy(models[dtype])
        if method is not None:
            quantize_model(model, method)
        pixels = torch.randn(1, 3, 640, 640, dtype=dtype, device=device)
        calls.append(partial(model, pixels))
        sizes.append(sum(weight_bytes(parameter) for parameter in model.parameters()) / 2**20)
    return time_interleaved(calls, repeats, "wall" if device != "cpu" else "cpu"), sizes


def weight_bytes(weight: torch.Tensor) -> int:
    if type(weight) in (torch.Tensor, torch.nn.Parameter):
        return weight.nbytes
    names, _ = weight.data.__tensor_flatten__()  # values and scales of a quantised weight
    return sum(weight_bytes(getattr(weight, name)) for name in names)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", metavar="FOLDER", help="panoptic model of the demo's classes; default: train one")
    parser.add_argument("--scenes", type=int, default=400, metavar="N", help="test scenes (default 400)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed passes of each variant (default 5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-timing", action="store_true", help="scores only")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.model
        if folder is None:
            run_demo(Path(temporary))
            folder = str(Path(temporary, "model"))
        scores = [score(folder, dtype, method, args.scenes, args.device) for dtype, method in VARIANTS]
    seconds, sizes = (None, None) if args.no_timing else times(args.repeats, args.device)
    print(machine())
    print(f"{args.scenes} scenes; processor time of one thread" if args.device == "cpu" else f"{args.scenes} scenes")
    print(
        "| weights | quantisation | PQ | mIoU | ViT-S 640, ms | spread | weights, MiB |\n|---|---|---|---|---|---|---|"
    )
    for index, ((dtype, method), found) in enumerate(zip(VARIANTS, scores, strict=True)):
        cells = [str(dtype).removeprefix("torch."), method or "none", f"{found['pq']:.2f}", f"{found['mean_iou']:.2f}"]
        if seconds is not None and sizes is not None:
            taken = [1e3 * value for value in seconds[index]]
            cells += [f"{statistics.median(taken):.0f}", f"{min(taken):.0f} - {max(taken):.0f}", f"{sizes[index]:.1f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
