"""The cost of all confidences for an image of 1024 x 2048 pixels, beside the forward pass of EoMT with ViT-L.

    python benchmarks/anomaly_cost.py                                  # counts alone
    python benchmarks/anomaly_cost.py --measure [--device cuda] [--repeats 5]

As for Cityscapes: 19 classes, 100 queries, two windows of 1024 x 1024 pixels. "Labels" is the semantic map alone,
which a segmentation needs anyway; "scores" is what all confidences of models/confidence.py add to it. Counted are
multiply-adds, and an exponential, logarithm, tanh or division as one each; on a CPU the label map leaves out classes
that cannot win, which confidences cannot do, so that the measured difference is the larger one. The goal is 5 % of the
forward pass.
"""

import argparse
import statistics
import sys

import torch
from measuring import machine, spread, time_pair
from model_sizes import BACKBONES, QUERY_LAYERS
from torch.utils.flop_counter import FlopCounterMode

from hf_segvit.models.confidence import CONFIDENCES, Confidence
from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.image_geometry import windows_of
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation
from hf_segvit.models.semantic_segments import semantic_segments_from_windows

SIZE, WINDOW, NUM_QUERIES = (1024, 2048), 1024, 100
GOAL = 0.05
WANTED = [Confidence(name) for name in CONFIDENCES]
# Operations for each class of a pixel: difference to the largest, exponential, sum, and their product for the entropy;
# tanh and sum for RbA; the largest for three of them. And for each query: a product and the largest for rejection.
PER_CLASS, PER_PIXEL, PER_QUERY = 8, 6, 2


def build(num_labels: int) -> EoMTForUniversalSegmentation:
    """EoMT-L for this input."""
    config = EoMTConfig(
        **BACKBONES["L"],
        num_query_layers=QUERY_LAYERS["L"],
        num_queries=NUM_QUERIES,
        num_labels=num_labels,
        image_size=WINDOW,
        masked_attention_probabilities=[0.0] * QUERY_LAYERS["L"],
    )
    return EoMTForUniversalSegmentation(config).eval()


def forward_operations(num_labels: int, windows: int) -> int:
    """Multiply-adds of the model for an image, counted on the meta device."""
    with torch.device("meta"):
        model = build(num_labels)
        model.set_attn_implementation("eager")  # as two matrix products, which the counter sees
        pixels = torch.empty(1, 3, WINDOW, WINDOW)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=pixels)
    return windows * counter.get_total_flops() // 2


def score_operations(num_labels: int) -> tuple[int, int]:
    """Operations of the class scores of all pixels, which labels need, and of all confidences from them."""
    pixels = SIZE[0] * SIZE[1]
    # Two linear interpolations and a sigmoid for each query, and a product for each query and class.
    labels = pixels * (NUM_QUERIES * 5 + NUM_QUERIES * num_labels)
    return labels, pixels * (PER_CLASS * num_labels + PER_PIXEL + PER_QUERY * NUM_QUERIES)


def logits(num_labels: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs such as a trained model's: most queries are no object, and masks are blobs."""
    generator = torch.Generator().manual_seed(0)
    windows = len(windows_of([SIZE], (WINDOW, WINDOW)))
    classes = torch.randn(windows, NUM_QUERIES, num_labels + 1, generator=generator)
    classes[:, 40:, -1] += 8
    masks = torch.nn.functional.interpolate(
        8 * torch.randn(windows, NUM_QUERIES, 8, 8, generator=generator) - 4, (256, 256), mode="bicubic"
    )
    return classes.to(device), masks.to(device)


def measure(num_labels: int, device: str, repeats: int) -> None:
    """Print seconds of the forward pass, of labels, and of labels with all confidences."""
    torch.manual_seed(0)
    windows = windows_of([SIZE], (WINDOW, WINDOW))
    model = build(num_labels).to(device)
    pixels = torch.randn(1, 3, WINDOW, WINDOW, device=device)
    arguments = (*logits(num_labels, device), windows, [SIZE], [SIZE])

    def finish(result: object) -> object:
        if device != "cpu":
            torch.cuda.synchronize()
        return result

    @torch.inference_mode()
    def forward() -> object:
        for _ in windows:  # one at a time, as a batch of two takes as long
            model(pixel_values=pixels)
        return finish(None)

    @torch.inference_mode()
    def labels() -> object:
        return finish(semantic_segments_from_windows(*arguments, window_size=WINDOW))

    @torch.inference_mode()
    def confidences() -> object:
        return finish(semantic_segments_from_windows(*arguments, window_size=WINDOW, confidences=WANTED))

    clock = "cpu" if device == "cpu" else "wall"  # processor time, as a machine may have other work
    plain, scored = time_pair(labels, confidences, repeats, clock)
    passes, _ = time_pair(forward, lambda: None, max(1, repeats // 3), clock)
    extra = statistics.median(scored) - statistics.median(plain)
    share = extra / statistics.median(passes)
    times = f"forward {spread(passes)}, labels {spread(plain)}, with all {spread(scored)}"
    print(f"{num_labels} classes, {device}, {clock} time: {times}")
    print(f"  all confidences add {extra:.3f} s, {100 * share:.2f} % of the forward pass ({verdict(share)})")


def verdict(share: float) -> str:
    return f"goal {100 * GOAL:g} %: {'met' if share <= GOAL else 'MISSED'}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[19, 150])
    parser.add_argument("--measure", action="store_true", help="also measure, which takes minutes on a CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(arguments)
    print(machine())
    windows = len(windows_of([SIZE], (WINDOW, WINDOW)))
    for num_labels in args.classes:
        passes, (labels, scores) = forward_operations(num_labels, windows), score_operations(num_labels)
        print(
            f"{num_labels} classes, counted: forward {passes / 1e9:.0f} G, labels {labels / 1e9:.2f} G, all "
            f"confidences {scores / 1e9:.2f} G, {100 * scores / passes:.3f} % of the forward pass "
            f"({verdict(scores / passes)})",
            flush=True,
        )
        if args.measure:
            measure(num_labels, args.device, args.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
