"""Time of exported models beside PyTorch: processor time on one thread, runtimes taking turns.

    OMP_NUM_THREADS=1 python benchmarks/exported.py [--hidden 384] [--pixels 640] [--repeats 5] [--with-pt2]

Model: ViT-S at 640 pixels, 200 queries, 133 classes, random weights, batch 1. Answers are compared before anything is
timed, by the export itself. Prints medians with their ranges, and ratios to PyTorch in fp32.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from measuring import machine, spread

from hf_segvit import EoMTConfig, EoMTForUniversalSegmentation, EoMTImageProcessor
from hf_segvit.export.export import export_model
from hf_segvit.inference.exported_models import load_exported_model
from hf_segvit.inference.runtimes import RuntimeSettings


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--pixels", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--with-pt2", action="store_true", help="also AOTInductor, whose compilation takes minutes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = EoMTConfig(
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        intermediate_size=4 * args.hidden,
        image_size=args.pixels,
        num_queries=200,
        num_query_layers=3,
        num_labels=133,
        masked_attention_probabilities=[0.0] * 3,
    )
    model = EoMTForUniversalSegmentation(config).eval()
    half = EoMTForUniversalSegmentation(config).eval()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    processor = EoMTImageProcessor(size={"height": args.pixels, "width": args.pixels})
    pixels = torch.randn(1, 3, args.pixels, args.pixels)
    runners = {"PyTorch, fp32": lambda: model(pixels), "PyTorch, bf16": lambda: half(pixels.bfloat16())}
    with tempfile.TemporaryDirectory() as folder:
        for file_format in ("onnx", "openvino", *(["pt2"] if args.with_pt2 else [])):
            export_model(model, Path(folder, file_format), file_format, processor)
        settings = {
            "ONNX Runtime, fp32": ("onnx", RuntimeSettings(threads=1)),
            "OpenVINO, fp32": ("openvino", RuntimeSettings(threads=1)),
            "OpenVINO, bf16": ("openvino", RuntimeSettings(threads=1, dtype=torch.bfloat16)),
        }
        if args.with_pt2:
            settings["AOTInductor, fp32"] = ("pt2", RuntimeSettings(threads=1, allow_native_code=True))
        for name, (file_format, setting) in settings.items():
            loaded = load_exported_model(Path(folder, file_format), setting)
            runners[name] = lambda loaded=loaded: loaded(pixels)
        print(f"{machine()}; {args.hidden} channels, {args.layers} layers, {args.pixels} pixels, processor time")
        seconds: dict[str, list[float]] = {name: [] for name in runners}
        with torch.inference_mode():
            for run in runners.values():
                run()
            for _ in range(args.repeats):
                for name, run in runners.items():
                    start = time.process_time()
                    run()
                    seconds[name].append(time.process_time() - start)
        base = statistics.median(seconds["PyTorch, fp32"])
        for name, values in seconds.items():
            print(f"{name:22} {spread(values)}  ratio {statistics.median(values) / base:.2f}")


if __name__ == "__main__":
    main()
