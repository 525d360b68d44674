"""`hf-segvit check-data`: reads a data set once and tells what would hurt training.

Exit code 0: nothing would; 1: something would; 2: it cannot be read at all.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .model_options import refuse_missing_data


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
    parser.add_argument("--split", help="the one to read (default: all, which finds images that are in two)")
    parser.add_argument("--task", choices=("semantic", "instance", "panoptic"), help="default: the format's first")
    parser.add_argument("--classes", metavar="FILE", help="names by value in masks, where the data set does not say")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, with all problems")
    parser.add_argument(
        "--output", type=Path, default=Path("."), metavar="DIR", help="for the contact sheet (default .)"
    )
    parser.add_argument("--samples", type=int, default=12, metavar="N", help="images on the sheet (default 12)")
    parser.add_argument(
        "--augment", metavar="RECIPE", help="draw each sample augmented, too (such as eomt_coco_panoptic)"
    )
    parser.add_argument("--size", type=int, default=640, metavar="N", help="of augmented images (default 640)")
    parser.set_defaults(run=run)


class _HelpWithFormats(argparse.Action):
    """The help with the list of formats below it, which is made only when it is asked for."""

    def __init__(self, option_strings: list[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        """Print and end."""
        from ..data.readers import format_list

        parser.epilog = format_list()
        parser.print_help()
        parser.exit()


def run(args: argparse.Namespace) -> int:
    """Check the data; see the module.

    Returns:
        0, or 1 if there are problems that would hurt training.

    Raises:
        ValueError: nothing can be read, or an option is wrong.
    """
    if args.samples < 0 or args.size < 1:
        raise ValueError(f"--samples {args.samples} and --size {args.size} cannot be; give positive numbers")
    refuse_missing_data(args.data)

    from tqdm import tqdm

    from ..atomic_files import prepare_output_folder, replacing
    from ..data.checking import check_dataset, report_text, sample_sheet

    prepare_output_folder(args.output)

    def progress(rows: Iterable[Any], name: str) -> Iterable[Any]:
        return tqdm(rows, desc=name, unit="image", disable=None)

    options = {"classes": args.classes} if args.classes else {}
    report = check_dataset(
        args.data, split=args.split, task=args.task, num_samples=args.samples, progress=progress, **options
    )
    print(json.dumps(report.as_dict(), indent=1) if args.json else report_text(report))
    if args.samples and report.samples:
        sheet = sample_sheet(report.samples, args.augment, args.size)
        with replacing(args.output / "contact_sheet.png") as partial:
            sheet.save(partial)
        print(f"samples drawn in {args.output / 'contact_sheet.png'}", file=sys.stderr)
    return 1 if report.problems.errors else 0
