"""Time, and scores, of exported models beside PyTorch: processor time on one thread, runtimes taking turns.

    OMP_NUM_THREADS=1 python benchmarks/exported.py [--hidden 384] [--layers 12] [--pixels 640] [--repeats 5]
        [--formats onnx openvino pt2] [--calibration FORMAT:PATH]
    OMP_NUM_THREADS=1 python benchmarks/exported.py --model FOLDER --data FORMAT:PATH --calibration FORMAT:PATH

Model: ViT-S at 640 pixels, 200 queries, 133 classes, random weights, batch 1; or a trained EoMT, which is also scored
on a data set, in PQ and mIoU. `--calibration` adds int8. Answers in float32 are compared before anything is timed, by
the export itself. Prints medians with their ranges, and ratios to PyTorch in fp32.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import machine, spread

from hf_segvit import EoMTConfig, EoMTForUniversalSegmentation, EoMTImageProcessor, Segmenter
from hf_segvit.data.reading import describe, load_segmentation_dataset
from hf_segvit.evaluation import evaluate
from hf_segvit.export.export import export_model
from hf_segvit.inference.loading import load_segmentation_model

# Name of a row, the exported folder, and how it is run.
ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("ONNX Runtime, fp32", "onnx", {}),
    ("ONNX Runtime, int8", "onnx-int8", {}),
    ("OpenVINO, fp32", "openvino", {}),
    ("OpenVINO, bf16", "openvino", {"dtype": torch.bfloat16}),
    ("OpenVINO, int8", "openvino-int8", {}),
    ("OpenVINO, int8 + bf16", "openvino-int8", {"dtype": torch.bfloat16}),
    ("AOTInductor, fp32", "pt2", {"allow_native_code": True}),
]


def random_model(args: argparse.Namespace) -> tuple[Any, Any]:
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
    processor = EoMTImageProcessor(size={"height": args.pixels, "width": args.pixels})
    return EoMTForUniversalSegmentation(config).eval(), processor


def scores(models: dict[str, Any], processor: Any, data: str) -> dict[str, str]:
    """PQ and mIoU of each model, in percent."""
    found: dict[str, str] = {}
    dataset = load_segmentation_dataset(data, split="test" if data.startswith("generated:") else "val", task="panoptic")
    about = describe(dataset)
    for name, model in models.items():
        numbers = []
        for task, metric in (("panoptic", "pq"), ("semantic", "mean_iou")):
            segmenter = Segmenter(model, processor, task=task, device="cpu")
            result = evaluate(segmenter, dataset, about.id2label, stuff_classes=about.stuff_classes, batch_size=10)
            numbers.append(100 * result.metrics[metric])
        found[name] = f"PQ {numbers[0]:5.2f}  mIoU {numbers[1]:5.2f}  "
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--pixels", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=("onnx", "openvino", "pt2"),
        default=["onnx", "openvino"],
        help="what to export to; pt2, AOTInductor, takes minutes to compile",
    )
    parser.add_argument("--model", help="folder of a trained EoMT instead")
    parser.add_argument("--data", metavar="FORMAT:PATH", help="panoptic data set to score --model on")
    parser.add_argument("--calibration", metavar="FORMAT:PATH", help="data set for int8; default: no int8")
    parser.add_argument("--calibration-images", type=int, default=64)
    args = parser.parse_args()
    if args.data is not None and args.model is None:
        parser.error("--data scores a trained model; name one with --model")
    torch.set_num_threads(1)
    model, processor = random_model(args) if args.model is None else load_segmentation_model(args.model)
    half = EoMTForUniversalSegmentation(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    models: dict[str, Any] = {"PyTorch, fp32": model, "PyTorch, bf16": half}
    with tempfile.TemporaryDirectory() as folder:
        for file_format in args.formats:
            export_model(model, Path(folder, file_format), file_format, processor)
            if args.calibration is None or file_format == "pt2":
                continue
            record = export_model(
                *(model, Path(folder, f"{file_format}-int8"), file_format, processor),
                quantize="int8",
                calibration=args.calibration,
                calibration_images=args.calibration_images,
            )
            print(f"{file_format}: {record.quantization}")
        for name, exported, settings in ROWS:
            if Path(folder, exported).is_dir():
                loaded = Segmenter.from_pretrained(str(Path(folder, exported)), threads=1, **settings)
                models[name] = loaded.model
        size = processor.size
        pixels = torch.randn(1, 3, size["height"], size["width"])
        print(f"{machine()}; {model.config.hidden_size} channels, {model.config.num_hidden_layers} layers, ", end="")
        print(f"{size['height']} x {size['width']} pixels, processor time")
        seconds: dict[str, list[float]] = {name: [] for name in models}
        inputs = {name: pixels.bfloat16() if name == "PyTorch, bf16" else pixels for name in models}
        with torch.inference_mode():
            for name, run in models.items():
                run(inputs[name])
            for _ in range(args.repeats):
                for name, run in models.items():
                    start = time.process_time()
                    run(inputs[name])
                    seconds[name].append(time.process_time() - start)
        scored = scores(models, processor, args.data) if args.data else {}
        base = statistics.median(seconds["PyTorch, fp32"])
        for name, values in seconds.items():
            ratio = statistics.median(values) / base
            print(f"{name:22} {scored.get(name, '')}{spread(values)}  ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
