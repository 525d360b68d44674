"""`hf-segvit evaluate`: the scores that papers report, which classes cost most, and the worst images.

With `--output`, counts are kept while it runs, so that the same command goes on where an interrupted one stopped, and
the table, all numbers and a drawing of the worst images are written there. Several processes share the work under
`accelerate launch -m hf_segvit evaluate ...`. With `--metrics` classes of one's own count beside the task's metric.

With `--classifier` a ViT-P corrects the labels; with `--sweep-alpha`, or `--oracle`, generator and ViT-P are then asked
once for each image and scored with several weights alpha, and alpha.png takes the place of worst.png. With
`--task points` a ViT-P alone is scored.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..lookup import import_object
from ..models.published_labels import TASKS
from .model_options import (
    add_classifier_options,
    add_view_options,
    check_classifier_options,
    errors_name_options,
    numbers,
    refuse_missing_data,
    views_of,
)

if TYPE_CHECKING:
    from ..inference.segmenter import Segmenter

# What makes two evaluations the same, so that one may go on where the other stopped.
ABOUT = (
    *("model", "revision", "data", "split", "task", "threshold", "absent_classes", "limit"),
    *("classifier", "alpha", "label_mismatch", "tta_scales", "tta_flip"),
)


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the command line."""
    parser = subparsers.add_parser(
        "evaluate",
        help="score a model on a data set",
        description=(
            "Score a model on a data set: panoptic quality, mask AP or mean IoU, as the data sets' own evaluators do. "
            "Takes this package's models and any of Transformers' for universal segmentation; with task points, "
            "a ViT-P and its accuracy."
        ),
        epilog="With --output DIR: results.json, results.txt and worst.png; an interrupted run goes on from there.",
    )
    parser.add_argument("--model", required=True, metavar="ID_OR_FOLDER", help="Hub repository or local folder")
    parser.add_argument(
        "--data", required=True, metavar="FORMAT:PATH", help="data set; `hf-segvit check-data --help` lists the formats"
    )
    parser.add_argument(
        "--split",
        metavar="S",
        help="part of the data set; default: the first of val, validation, valid and test there is",
    )
    parser.add_argument("--task", required=True, choices=(*TASKS, "points"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers as JSON")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for results and for going on")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images at a time (default 1)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read images (default 4 on a GPU)")
    parser.add_argument("--limit", type=int, metavar="N", help="score the first N images alone")
    parser.add_argument("--threshold", type=float, metavar="X", help="score that a panoptic segment needs")
    parser.add_argument(
        "--absent-classes",
        choices=("exclude", "zero"),
        default="exclude",
        help="mean IoU: leave classes that occur nowhere out of the mean (default), or count them as zero",
    )
    parser.add_argument(
        "--oracle", action="store_true", help="beside each score, what the same masks would reach with perfect labels"
    )
    parser.add_argument(
        "--boundary", action="store_true", help="also boundary IoU (semantic) or boundary AP (instance)"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        metavar="MODULE:CLASS",
        help="metrics of your own beside the task's; what they must have: Metric in hf_segvit.metrics.accumulation",
    )
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, mps; default: the best there is")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--rows", type=int, default=20, metavar="N", help="classes in the printed table (default 20)")
    parser.add_argument("--worst", type=int, default=8, metavar="N", help="worst images to draw (default 8)")
    add_point_options(parser)
    add_fusion_options(parser)
    add_view_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate; see the module.

    Returns:
        0.

    Raises:
        ValueError: a setting, the data set or the model is at fault; the message says what and what to do.
    """
    for option, least in (("batch_size", 1), ("limit", 1), ("workers", 0), ("rows", 0), ("worst", 0)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise ValueError(f"--{option.replace('_', '-')} {value} must be at least {least}")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold} is outside [0, 1]")
    if args.threshold is not None and args.task != "panoptic":
        raise ValueError(f"--threshold {args.threshold} has no meaning for task {args.task}; leave it out")
    if args.boundary and args.task in ("panoptic", "points"):
        raise ValueError(f"--boundary is for the tasks semantic and instance, not for {args.task}; leave it out")
    if args.oracle and args.task == "points":
        raise ValueError("--oracle is for segmentation, not for points; leave it out")
    check_fusion_options(args)
    refuse_missing_data(args.data)
    views = views_of(args)
    if not views.is_plain and args.task != "semantic":
        raise ValueError(f"--tta-scales and --tta-flip are for task semantic, not for {args.task}; leave them out")
    if args.task == "points":
        return run_points(args)

    from ..data.reading import describe
    from ..evaluation import evaluate
    from ..evaluation.report import draw_worst
    from ..inference.segmenter import Segmenter

    dataset, device, settings = _prepare(args, args.task, ABOUT)
    id2label, stuff_classes = describe(dataset).id2label, describe(dataset).stuff_classes
    with errors_name_options():
        segmenter = Segmenter.from_pretrained(
            args.model,
            task=args.task,
            device=device,
            revision=args.revision,
            threshold=args.threshold,
            stuff_classes=stuff_classes,
            data_labels=id2label,
            views=views,
            classifier=args.classifier,
            alpha=args.alpha,
            label_mismatch=args.label_mismatch,
        )
    settings |= {
        "stuff_classes": stuff_classes,
        "absent": args.absent_classes,
        "more_metrics": [name for name in ("oracle", "boundary") if getattr(args, name)],
    }
    alphas = alphas_to_score(args, segmenter)
    if alphas is not None:
        return run_sweep(args, segmenter, alphas, dataset, id2label, settings)
    result = evaluate(segmenter, dataset, id2label, **settings)
    if _write(args, result, settings) and args.output is not None and args.worst:
        draw_worst(args.output / "worst.png", segmenter, dataset, id2label, result.images[: args.worst])
    return _finish(settings)


def _prepare(args: argparse.Namespace, task: str, about: tuple[str, ...]) -> tuple[Any, Any, dict[str, Any]]:
    """The data set, the device, and the settings that every evaluation has."""
    from accelerate import PartialState

    from ..atomic_files import prepare_output_folder
    from ..data.reading import load_segmentation_dataset, validation_split
    from ..inference.devices import pick_device
    from ..metrics.accumulation import METRIC_METHODS

    # A result that cannot be written is worth nothing, so this comes first.
    for folder in (args.output, args.json.parent if args.json is not None else None):
        if folder is not None:
            prepare_output_folder(folder)
    metrics = [import_object(path, "--metrics", METRIC_METHODS) for path in args.metrics]
    args.split = args.split or validation_split(args.data, "name one with --split")
    dataset = load_segmentation_dataset(args.data, split=args.split, task=task)
    if args.limit is not None:
        dataset = dataset.select(range(min(args.limit, len(dataset))))
    state = PartialState()
    device = state.device if state.num_processes > 1 and args.device is None else pick_device(args.device)
    settings = {
        "metrics": metrics,
        "batch_size": args.batch_size,
        "num_workers": args.workers if args.workers is not None else 4 if device.type == "cuda" else 0,
        "partial_folder": args.output / "partial" if args.output is not None else None,
        "about": {name: getattr(args, name) for name in about},
        "progress": True,
    }
    return dataset, device, settings


def _write(args: argparse.Namespace, result: Any, settings: Mapping[str, Any]) -> bool:
    """Print and write a result or sweep, in the main process; whether this is it."""
    from accelerate import PartialState

    from ..atomic_files import write_json
    from ..evaluation.alpha_sweep import AlphaSweep, sweep_content, sweep_text
    from ..evaluation.report import result_content, result_text

    if not PartialState().is_main_process:
        return False
    is_sweep = isinstance(result, AlphaSweep)
    text, content = (sweep_text, sweep_content) if is_sweep else (result_text, result_content)
    print(text(result, args.rows))
    numbers_of = {**settings["about"], **content(result)}
    if args.json is not None:
        write_json(args.json, numbers_of)
    if args.output is not None:
        write_json(args.output / "results.json", numbers_of)
        (args.output / "results.txt").write_text(text(result, sys.maxsize) + "\n", encoding="utf-8")
    return True


def _finish(settings: Mapping[str, Any]) -> int:
    """Delete the counts, once everything is written."""
    from accelerate import PartialState

    from ..evaluation.counts import delete_partial_results

    if PartialState().is_main_process and settings["partial_folder"] is not None:
        delete_partial_results(settings["partial_folder"])
    return 0


POINT_KINDS = ("random", "interior", "maximum")


def add_point_options(parser: Any) -> None:
    """Add what only this task heeds."""
    group = parser.add_argument_group("task points")
    group.add_argument(
        "--points",
        choices=POINT_KINDS,
        default="random",
        help=(
            "random: all classes of an image equally often (default); interior: the innermost pixel of every true "
            "segment; maximum: the highest-valued point of every mask of --generator, which is scored there too"
        ),
    )
    group.add_argument("--num-points", type=int, default=200, metavar="N", help="random points an image (default 200)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of random points (default 0)")
    group.add_argument("--generator", metavar="ID_OR_FOLDER", help="segmentation model that proposes the masks")


def run_points(args: argparse.Namespace) -> int:
    """Evaluate a point classifier.

    Returns:
        0.

    Raises:
        ValueError: a setting, the data set or a model is at fault; the message says what and what to do.
    """
    for option, least in (("num_points", 1), ("seed", 0)):
        if getattr(args, option) < least:
            raise ValueError(f"--{option.replace('_', '-')} {getattr(args, option)} must be at least {least}")
    if (args.points == "maximum") != (args.generator is not None):
        raise ValueError("--points maximum and --generator MODEL go together: give both, or neither")

    from ..data.reading import available_tasks, describe
    from ..evaluation.points import evaluate_points, point_source
    from ..inference.point_classifier import PointClassifier
    from ..inference.segmenter import Segmenter

    # Segments of one class are told apart where each is asked about.
    order = ("semantic", "panoptic") if args.points == "random" else ("panoptic", "semantic")
    tasks = [task for task in order if task in available_tasks(args.data)]
    if not tasks:
        raise ValueError(f"{args.data} has neither panoptic nor semantic labels, so that a point has no one class")
    names = ("model", "revision", "data", "split", "task", "limit", "points", "num_points", "seed", "generator")
    dataset, device, settings = _prepare(args, tasks[0], names)
    id2label = describe(dataset).id2label
    classifier = PointClassifier.from_pretrained(args.model, revision=args.revision, device=device)
    generator = None
    if args.generator is not None:
        generator = Segmenter.from_pretrained(args.generator, task="panoptic", device=device)
    source = point_source(args.points, id2label, num_points=args.num_points, seed=args.seed, generator=generator)
    _write(args, evaluate_points(classifier, dataset, id2label, source, **settings), settings)
    return _finish(settings)


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


def alphas_to_score(args: argparse.Namespace, segmenter: "Segmenter") -> list[float] | None:
    """The alphas to compare, 0 among them; `None` for a model that is scored as it is."""
    from ..inference.loading import is_fused

    if args.sweep_alpha is not None:
        return sorted({0.0, *numbers(args.sweep_alpha, "--sweep-alpha")})
    if args.oracle and is_fused(segmenter.model):
        return sorted({0.0, segmenter.model.config.alpha_of(args.task)})
    return None


def run_sweep(
    args: argparse.Namespace,
    segmenter: "Segmenter",
    alphas: list[float],
    dataset: Any,
    id2label: Mapping[int, str],
    settings: Mapping[str, Any],
) -> int:
    """Score a fused model with several alphas, print and write the results.

    Returns:
        0.

    Raises:
        ValueError: as `evaluate`, or the model has no classifier.
    """
    from ..evaluation.alpha_sweep import plot_sweep, sweep_alphas

    sweep = sweep_alphas(segmenter, alphas, dataset, id2label, **settings)
    if _write(args, sweep, settings) and args.output is not None:
        plot_sweep(args.output / "alpha.png", sweep, title=f"{Path(args.model).name} and ViT-P: {args.data}")
    return _finish(settings)
