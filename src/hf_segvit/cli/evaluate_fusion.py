"""`hf-segvit evaluate` with a ViT-P: its weight alpha, and how much of the gap to perfect labels it closes.

A part of the subcommand in evaluate.py. With `--sweep-alpha`, or `--oracle`, generator and ViT-P are asked once for
each picture and scored with several alphas; with `--output`, counts of all of them are kept for going on, and
results.json, results.txt and alpha.png are written at the end.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model_options import add_classifier_options, check_classifier_options, numbers

if TYPE_CHECKING:
    from ..evaluation import Predictor

ALL = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1"


def add_fusion_options(parser: Any) -> None:
    """Add the classifier and its weights."""
    add_classifier_options(parser)
    parser.add_argument(
        "--sweep-alpha",
        nargs="?",
        const=ALL,
        metavar="A,A,...",
        help="score with each of these weights, from one pass, and draw the curve (default 0, 0.1, ... 1)",
    )


def check_fusion_options(args: argparse.Namespace) -> None:
    """Refuse what cannot be scored.

    Raises:
        ValueError: naming the option and the remedy.
    """
    check_classifier_options(args)
    given = args.classifier is not None or args.alpha is not None or args.sweep_alpha is not None
    if given and args.task == "points":
        raise ValueError(
            "--classifier, --alpha and --sweep-alpha are for segmentation; for points name the ViT-P --model"
        )
    if args.sweep_alpha is None:
        return
    if args.alpha is not None:
        raise ValueError("--alpha is one weight and --sweep-alpha several; leave one of them out")
    for alpha in numbers(args.sweep_alpha, "--sweep-alpha"):
        if not 0 <= alpha <= 1:
            raise ValueError(f"--sweep-alpha {args.sweep_alpha}: {alpha:g} is outside [0, 1]")


def alphas_to_score(args: argparse.Namespace, predictor: "Predictor") -> list[float] | None:
    """The alphas to compare, 0 among them; `None` for a model that is scored as it is."""
    from ..inference.loading import is_fused

    if args.sweep_alpha is not None:
        return sorted({0.0, *numbers(args.sweep_alpha, "--sweep-alpha")})
    if args.oracle and is_fused(predictor.model):
        return sorted({0.0, predictor.model.config.alpha_of(args.task)})
    return None


def run_sweep(
    args: argparse.Namespace,
    predictor: "Predictor",
    alphas: list[float],
    dataset: Any,
    id2label: Mapping[int, str],
    about: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> int:
    """Score a fused model with several alphas, print and write the results.

    Args:
        args: the command's.
        predictor: of the fused model.
        alphas: rising from 0.
        dataset: entries of our readers.
        id2label: the data set's classes.
        about: what is evaluated, for the JSON file.
        settings: of `evaluate_variants`.

    Returns:
        0.

    Raises:
        ValueError: as `evaluate`, or the model has no classifier.
    """
    from accelerate import PartialState

    from ..evaluation.alpha_sweep import plot_sweep, sweep_alphas, sweep_content, sweep_text
    from ..evaluation.counts import delete_partial_results
    from ..evaluation.predictor import AlphaPredictor
    from ..evaluation.report import write_content

    sweep = sweep_alphas(AlphaPredictor(predictor, alphas), dataset, id2label, **settings)
    if not PartialState().is_main_process:
        return 0
    print(sweep_text(sweep, args.rows))
    content = {**about, **sweep_content(sweep)}
    if args.json is not None:
        write_content(args.json, content)
    if args.output is not None:
        write_content(args.output / "results.json", content)
        (args.output / "results.txt").write_text(sweep_text(sweep, len(id2label)) + "\n", encoding="utf-8")
        plot_sweep(args.output / "alpha.png", sweep, title=f"{Path(args.model).name} and ViT-P: {args.data}")
        delete_partial_results(settings["partial_folder"])
    return 0
