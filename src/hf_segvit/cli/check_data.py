"""`hf-segvit check-data`: read a data set once and report problems.

Exit code 0: none that would hurt training; 1: some; 2: the data set cannot be read at all.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .model_options import add_pixel_limit, apply_pixel_limit, check_minimum, refuse_missing_data


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "check-data",
        help="look for problems in a data set",
        description="Read a data set once: counts, problems with file and id, and a contact sheet with masks drawn.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action=_HelpWithFormats, help="show this help and the formats, and exit")
    parser.add_argument("data", metavar="FORMAT:PATH", help="such as coco:/data/coco or mask_folder:streets, see below")
    parser.add_argument("--split", help="split to read (default: all, which also finds images that are in two)")
    parser.add_argument("--task", choices=("semantic", "instance", "panoptic"), help="default: the format's first")
    parser.add_argument("--classes", metavar="FILE", help="names by value in masks, if the data set has none")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, with all problems")
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="for the contact sheet (default .)")
    parser.add_argument("--samples", type=int, default=12, metavar="N", help="images on the sheet (default 12)")
    parser.add_argument("--augment", metavar="RECIPE", help="also draw each sample as this recipe augments it")
    parser.add_argument("--size", type=int, default=640, metavar="N", help="side of augmented images (default 640)")
    add_pixel_limit(parser)
    parser.set_defaults(run=run)


class _HelpWithFormats(argparse.Action):
    """The help with the list of formats below it."""

    def __init__(self, option_strings: list[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        """Print and exit."""
        from ..data.readers import format_list  # reads the source of all readers, so only on request

        parser.epilog = format_list()
        parser.print_help()
        parser.exit()


def run(args: argparse.Namespace) -> int:
    """Check the data, draw the contact sheet and return the exit code."""
    check_minimum(args, samples=0, size=1)
    apply_pixel_limit(args)
    refuse_missing_data(args.data)

    from tqdm import tqdm

    from ..atomic_files import prepare_output_folder, replacing
    from ..data.checking import check_dataset
    from ..data.data_report import report_text, sample_sheet

    prepare_output_folder(args.output)

    def progress(rows: Iterable[Any], name: str) -> Iterable[Any]:
        return tqdm(rows, desc=name, unit="image", disable=None)

    options = {"classes": args.classes} if args.classes else {}
    report = check_dataset(
        args.data, split=args.split, task=args.task, num_samples=args.samples, progress=progress, **options
    )
    # Only the report goes to stdout, so that it can be piped.
    print(json.dumps(report.as_dict(), indent=1) if args.json else report_text(report))
    if args.samples and report.samples:
        sheet = sample_sheet(report.samples, args.augment, args.size)
        with replacing(args.output / "contact_sheet.png") as partial:
            sheet.save(partial)
        print(f"samples drawn in {args.output / 'contact_sheet.png'}", file=sys.stderr)
    return 1 if report.problems.errors else 0
