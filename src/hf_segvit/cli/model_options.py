"""Options that several subcommands share: a classifier of labels, several views, and data that must be there."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_READERS = Path(__file__).parents[1] / "data" / "readers"


def add_classifier_options(parser: Any) -> None:
    """Add what joins the model with a ViT-P."""
    group = parser.add_argument_group("labels by ViT-P")
    group.add_argument(
        "--classifier",
        metavar="ID_OR_FOLDER",
        help=(
            "ViT-P that corrects the labels of --model's masks; --model may then be any universal segmentation model "
            "of Transformers, such as a Mask2Former"
        ),
    )
    group.add_argument(
        "--alpha", type=float, metavar="A", help="weight of ViT-P, from 0 (none) to 1; default 0.4, or the checkpoint's"
    )
    group.add_argument(
        "--label-mismatch",
        choices=("error", "keep"),
        default="error",
        help="where ViT-P knows other classes than --model: stop (default), or correct those that both know",
    )


def add_view_options(parser: Any) -> None:
    """Add test-time augmentation."""
    group = parser.add_argument_group("test-time augmentation (semantic segmentation)")
    group.add_argument(
        "--tta-scales",
        metavar="S,S,...",
        help="average over these factors of the input size, as 0.5,1,1.5; default 1",
    )
    group.add_argument("--tta-flip", action="store_true", help="average over each image and its mirror image")


def check_classifier_options(args: argparse.Namespace) -> None:
    """Refuse an alpha that is none.

    Raises:
        ValueError: naming it.
    """
    if args.alpha is not None and not 0 <= args.alpha <= 1:
        raise ValueError(f"--alpha {args.alpha} is outside [0, 1]: 0 is the generator's answer, 1 is ViT-P's")
    if args.label_mismatch == "keep" and args.classifier is None:
        raise ValueError("--label-mismatch keep is about a --classifier; name one")


def refuse_missing_data(spec: str) -> None:
    """Refuse FORMAT:PATH where nothing is at PATH, before the seconds that importing its reader takes.

    What is no path on disk, or a format from elsewhere, is left to the reader.

    Raises:
        ValueError: naming the path.
    """
    name, _, path = spec.partition(":")
    name = name.strip().lower().replace("-", "_")
    if name in ("hub", "generated") or not path or not (_READERS / f"{name}.py").is_file():
        return
    # Options may follow a `?`, which may also be part of a name.
    paths = [Path(text).expanduser() for text in (path, path.partition("?")[0])]
    if not any(file.exists() for file in paths):
        raise ValueError(f"{paths[1]}: no such file or folder; check the path (it is read from {Path.cwd()})")


def views_of(args: argparse.Namespace) -> Any:
    """The views that the options ask for.

    Raises:
        ValueError: a scale is no number or out of range.
    """
    from ..inference.views import Views

    return Views(numbers(args.tta_scales, "--tta-scales") if args.tta_scales is not None else (1.0,), args.tta_flip)


@contextmanager
def errors_name_options() -> Iterator[None]:
    """Say errors of loading, which name arguments of functions, in terms of the options that stand for them."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for argument, option in (
            ("label_mismatch='keep'", "--label-mismatch keep"),
            ("task='semantic'", "--task semantic"),
        ):
            text = text.replace(argument, option)
        raise ValueError(text) from error


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers separated by commas.

    Raises:
        ValueError: naming the option and what is no number.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} {text}: give numbers separated by commas, as 0.5,1,1.5") from error
