"""`hf-segvit export MODEL DST --format F`: models out of PyTorch, checked in the other runtime."""

import argparse
from pathlib import Path
from typing import Any

from ..export.formats import FORMATS, check_format, check_packages, check_quantization, parse_size
from .model_options import check_minimum, errors_name_options, model_folder, refuse_missing_data, refuse_missing_models

_EPILOG = """formats:
{formats}

The folder is used like any other model's: `hf-segvit segment --model DST ...`.
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "export",
        help="export a model to ONNX, OpenVINO, AOTInductor or ExecuTorch",
        description=(
            "Export an EoMT, a ViT-P or a fused model. One file takes any batch and any height and width that are "
            "multiples of the patch size. Each export is compared with PyTorch at several sizes before the folder "
            "appears; its export.json has the differences."
        ),
        epilog=_EPILOG.format(formats="\n".join(f"  {name:<11} {each.description}" for name, each in FORMATS.items())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="Hub repository or local folder")
    parser.add_argument("destination", metavar="DST", help="folder to write")
    parser.add_argument("--format", default="onnx", metavar="F", help=f"{', '.join(FORMATS)} (default onnx); see below")
    parser.add_argument("--size", metavar="HxW", help="take only this height and width; default: any")
    parser.add_argument(
        "--max-size", metavar="HxW", help="largest height and width for executorch; default: the model's longer side"
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help="take only N images at a time; default: any, executorch 1"
    )
    parser.add_argument(
        "--semantic-map", action="store_true", help="add an output with the class of every input pixel, uint8"
    )
    parser.add_argument("--opset", type=int, metavar="N", help="version of ONNX's operators, for older runtimes")
    parser.add_argument(
        "--quantize",
        metavar="Q",
        help="int8: an EoMT, or the generator of a fused model, in onnx or openvino; needs --calibration",
    )
    parser.add_argument(
        "--calibration",
        metavar="FORMAT:PATH",
        help="data set like those the model will see; `hf-segvit check-data --help` lists the formats",
    )
    parser.add_argument(
        "--calibration-images", type=int, default=64, metavar="N", help="how many of its images (default 64)"
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model folder at DST")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export the model, and print what was done."""
    check_format(args.format)
    check_minimum(args, batch=1, calibration_images=1)
    size, max_size = (None if text is None else parse_size(text) for text in (args.size, args.max_size))
    refuse_missing_models(args.model)
    check_packages(args.format)
    with errors_name_options():
        check_quantization(args.quantize, args.calibration, args.format)
    if args.calibration is not None:
        refuse_missing_data(args.calibration)
    args.model = model_folder(args.model)

    from ..export.export import export_model

    if Path(args.model).exists() and Path(args.model).resolve() == Path(args.destination).resolve():
        raise ValueError(f"{args.destination} is the source; choose another destination")
    export_model(
        args.model,
        args.destination,
        args.format,
        size=size,
        max_size=max_size,
        batch=args.batch,
        semantic_map=args.semantic_map,
        opset=args.opset,
        quantize=args.quantize,
        calibration=args.calibration,
        calibration_images=args.calibration_images,
        overwrite=args.overwrite,
        revision=args.revision,
        progress=lambda line: print(line, flush=True),
    )
    print(f"wrote {args.destination}")
    return 0
