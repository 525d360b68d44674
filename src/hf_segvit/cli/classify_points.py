"""`hf-segvit classify-points`: name what is at points and in boxes of an image.

Prints a table; writes an image and JSON on request. The JSON file holds

    {"format": "hf-segvit points", "version": 1, "model": "...", "picture": "cat.jpg", "width": 640, "height": 480,
     "prompts": [{"point": [x, y], "classes": [{"label_id": 15, "label": "cat", "score": 0.98}, ...]},
                 {"box": [x0, y0, x1, y1], "classes": [...]}]}

in pixels of the upright image (EXIF orientation applied), with the best classes first.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..lookup import printable
from .model_options import (
    add_dtype_option,
    add_model_options,
    add_pixel_limit,
    add_runtime_options,
    apply_pixel_limit,
    check_minimum,
    errors_name_options,
    model_folder,
    refuse_missing_models,
    runtime_options,
)

FORMAT, VERSION = "hf-segvit points", 1
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "classify-points",
        help="name what is at points and in boxes of an image",
        description=(
            "Name what is at points and in boxes of an image, with a ViT-P model. Coordinates are pixels from the "
            "upper left corner, x to the right, y down. If a model's prompts attend to each other, an answer depends "
            "on the other prompts of the same call."
        ),
        epilog="example: hf-segvit classify-points street.jpg --points 120,80 400,310 --model vit-p --output named.png",
    )
    parser.add_argument("image", metavar="IMAGE", help="image file")
    parser.add_argument("--points", nargs="+", type=str.strip, default=[], metavar="X,Y", help="points")
    parser.add_argument("--boxes", nargs="+", type=str.strip, default=[], metavar="X0,Y0,X1,Y1", help="boxes")
    add_model_options(parser)
    add_pixel_limit(parser)
    add_dtype_option(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="image to write, with the prompts and answers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument("--top-k", type=int, default=3, metavar="K", help="classes to report per prompt (default 3)")
    add_runtime_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Classify the prompts."""
    points = [_numbers(text, 2, "--points") for text in args.points]
    boxes = [_numbers(text, 4, "--boxes") for text in args.boxes]
    if not points and not boxes:
        raise ValueError("no prompts; give --points X,Y ... or --boxes X0,Y0,X1,Y1 ...")
    check_minimum(args, top_k=1, threads=1)
    apply_pixel_limit(args)
    if args.output is not None and args.output.suffix.lower() not in IMAGE_ENDINGS:
        raise ValueError(f"--output {args.output}: its ending must be one of {', '.join(IMAGE_ENDINGS)}")
    if not args.image.startswith(("http://", "https://")) and not Path(args.image).exists():
        raise ValueError(f"{args.image}: no such file; check the path (it is read from {Path.cwd()})")
    refuse_missing_models(args.model)
    args.model = model_folder(args.model)

    from ..atomic_files import prepare_output_folder, replacing, write_json
    from ..inference.devices import describe_device, pick_device
    from ..inference.loading import is_exported
    from ..inference.memory import is_out_of_memory
    from ..inference.point_classifier import PointClassifier
    from ..models.image_claims import FREE_FOR_INFERENCE
    from ..models.image_decoding import image_size, is_address, open_image, to_pixels
    from ..models.image_files import open_image_file

    # Before the model is loaded, which knows how its images are read.
    stored = None if is_address(args.image) else open_image_file(args.image, free_pixels=FREE_FOR_INFERENCE)
    for path in (args.output, args.json):
        if path is not None:
            prepare_output_folder(path.parent)
            if path.is_dir():
                raise ValueError(f"cannot write {path}: it is a folder; name a file in it")
    # An exported model's runtime has devices of its own.
    device = args.device if is_exported(args.model, args.revision) else pick_device(args.device)
    with errors_name_options():
        classifier = PointClassifier.from_pretrained(
            args.model, revision=args.revision, device=device, dtype=args.dtype, **runtime_options(args)
        )
    if stored is None:
        image = open_image(args.image, settings=classifier.file_settings, free_pixels=FREE_FOR_INFERENCE)
    else:
        image = to_pixels(stored, args.image, classifier.file_settings)
    where = getattr(classifier.model, "description", None) or describe_device(classifier.device)
    print(f"points classified with {args.model} on {where}", file=sys.stderr)
    try:
        answers = classifier.classify(image, points, boxes, top_k=args.top_k)
    except ValueError as error:  # of prompts, such as one outside the image
        raise ValueError(f"{args.image}: {error}") from error
    # Each prompt is a token in every block, so many of them need memory.
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(f"{device} ran out of memory; ask fewer points at once, or try --device cpu") from error
    prompts: list[dict[str, Any]] = [{"point": point} for point in points] + [{"box": box} for box in boxes]
    rows = [{**prompt, "classes": classes} for prompt, classes in zip(prompts, answers, strict=True)]
    print(_table(rows))
    if args.output is not None:
        from ..drawing.segments import draw_prompts

        best = [row["classes"][0] for row in rows]
        texts = [f"{answer['label']} {answer['score']:.2f}" for answer in best]
        with replacing(args.output) as partial:
            draw_prompts(image, points, boxes, [answer["label_id"] for answer in best], texts).save(partial)
    if args.json is not None:
        header = {"format": FORMAT, "version": VERSION, "model": args.model}
        height, width = image_size(image)
        size = {"width": width, "height": height}
        write_json(args.json, {**header, "picture": args.image, **size, "prompts": rows})
    return 0


def _numbers(text: str, count: int, option: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        form = "X,Y" if count == 2 else "X0,Y0,X1,Y1"
        raise ValueError(f"{option} {text}: expected {form}, numbers with commas and no spaces between")
    # Whole numbers stay integers in the table and in JSON.
    return [int(number) if number.is_integer() else number for number in numbers]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per prompt: its position, then its classes with their scores, in columns."""
    cells = [
        [
            ",".join(f"{number:g}" for number in (row["point"] if "point" in row else row["box"])),
            *(f"{answer['score']:6.1%} {printable(answer['label'])}" for answer in row["classes"]),
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
