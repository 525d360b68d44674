"""`hf-segvit app`: a page to try models in a browser, and their HTTP API."""

import argparse
from pathlib import Path
from typing import Any

from .model_options import (
    add_dtype_option,
    add_pixel_limit,
    add_runtime_options,
    apply_pixel_limit,
    check_minimum,
    errors_name_options,
    model_folder,
    refuse_missing_models,
    runtime_options,
)


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "app",
        help="a page to try models in a browser",
        description=(
            "Serve a page: an image in, its segments out, with overlay, table and downloads. The same process answers "
            'gradio_client; see docs/app.md. Needs pip install "hf-segvit[app]". Nothing leaves this machine, and '
            "nobody else reaches it unless --host says so."
        ),
        epilog="example: hf-segvit app --model eomt --model mask2former --classifier vit-p",
    )
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="ID_OR_FOLDER",
        help="Hub repository or local folder, exported or not; several may be given to choose from",
    )
    parser.add_argument(
        "--classifier", metavar="ID_OR_FOLDER", help="ViT-P that names clicked points and corrects labels"
    )
    parser.add_argument(
        "--label-mismatch",
        choices=("error", "keep"),
        default="error",
        help="if ViT-P knows other classes than a model: refuse (default), or correct only those that both know",
    )
    parser.add_argument(
        "--device", metavar="D", help="cpu, cuda, cuda:1, mps; default: the first available of CUDA, MPS, CPU"
    )
    parser.add_argument("--keep", type=int, default=2, metavar="N", help="most models in memory at a time (default 2)")
    parser.add_argument("--examples", type=Path, metavar="DIR", help="images to offer; default: generated scenes")
    add_dtype_option(parser)
    group = parser.add_argument_group("the server")
    group.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (default 127.0.0.1)")
    group.add_argument("--port", type=int, default=7860, metavar="P", help="default 7860; 0: any that is free")
    group.add_argument("--queue", type=int, default=20, metavar="N", help="most requests that may wait (default 20)")
    group.add_argument("--max-megabytes", type=int, default=20, metavar="N", help="most of an upload (default 20)")
    add_pixel_limit(group)
    add_runtime_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    check_minimum(args, keep=1, port=0, queue=1, max_megabytes=1, threads=1)
    if args.port > 65535:
        raise ValueError(f"--port {args.port} must be at most 65535")
    apply_pixel_limit(args)
    refuse_missing_models(*args.model, args.classifier)
    models = [model_folder(model) for model in args.model]
    classifier = args.classifier and model_folder(args.classifier)

    from ..app.server import serve

    with errors_name_options():
        serve(
            models,
            classifier,
            host=args.host,
            port=args.port,
            keep=args.keep,
            label_mismatch=args.label_mismatch,
            examples=args.examples,
            queue=args.queue,
            max_bytes=args.max_megabytes * 10**6,
            device=args.device,
            dtype=args.dtype,
            **runtime_options(args),
        )
    return 0
