"""`hf-segvit evaluate`: the scores that papers report, which classes cost most, and the worst pictures.

With `--output`, counts are kept while it runs, so that the same command goes on where an interrupted one stopped, and
the table, all numbers and a drawing of the worst pictures are written there. Several processes share the work under
`accelerate launch -m hf_segvit evaluate ...`. With `--classifier` a ViT-P corrects the labels: evaluate_fusion.py.
"""

import argparse
from pathlib import Path
from typing import Any

from .evaluate_fusion import add_fusion_options, alphas_to_score, check_fusion_options, run_sweep
from .evaluate_points import add_point_options, run_points
from .model_options import add_view_options, errors_name_options, views_of

TASKS = ("panoptic", "instance", "semantic", "points")
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
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers as JSON")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for results and for going on")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="pictures at a time (default 1)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read pictures (default 4 on a GPU)")
    parser.add_argument("--limit", type=int, metavar="N", help="score the first N pictures alone")
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
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, mps; default: the best there is")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--rows", type=int, default=20, metavar="N", help="classes in the printed table (default 20)")
    parser.add_argument("--worst", type=int, default=8, metavar="N", help="worst pictures to draw (default 8)")
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
    views = views_of(args)
    if not views.is_plain and args.task != "semantic":
        raise ValueError(f"--tta-scales and --tta-flip are for task semantic, not for {args.task}; leave them out")
    if args.task == "points":
        return run_points(args)

    from accelerate import PartialState

    from ..atomic_files import prepare_output_folder
    from ..data.reading import describe, load_segmentation_dataset, validation_split
    from ..evaluation import evaluate, load_predictor
    from ..evaluation.counts import delete_partial_results
    from ..evaluation.report import draw_worst, result_text, write_json
    from ..inference.devices import pick_device

    # A result that cannot be written is worth nothing, so this comes first.
    for folder in (args.output, args.json.parent if args.json is not None else None):
        if folder is not None:
            prepare_output_folder(folder)
    args.split = args.split or validation_split(args.data, "name one with --split")
    dataset = load_segmentation_dataset(args.data, split=args.split, task=args.task)
    description = describe(dataset)
    id2label, stuff_classes = description.id2label, description.stuff_classes
    if args.limit is not None:
        dataset = dataset.select(range(min(args.limit, len(dataset))))
    state = PartialState()
    device = state.device if state.num_processes > 1 and args.device is None else pick_device(args.device)
    with errors_name_options():
        predictor = load_predictor(
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
    about = {name: getattr(args, name) for name in ABOUT}
    partial_folder = args.output / "partial" if args.output is not None else None
    settings: dict[str, Any] = {
        "stuff_classes": stuff_classes,
        "batch_size": args.batch_size,
        "num_workers": args.workers if args.workers is not None else 4 if device.type == "cuda" else 0,
        "absent": args.absent_classes,
        "more_metrics": [name for name in ("oracle", "boundary") if getattr(args, name)],
        "partial_folder": partial_folder,
        "about": about,
        "progress": True,
    }
    alphas = alphas_to_score(args, predictor)
    if alphas is not None:
        return run_sweep(args, predictor, alphas, dataset, id2label, about, settings)
    result = evaluate(predictor, dataset, id2label, **settings)
    if not state.is_main_process:
        return 0
    print(result_text(result, args.rows))
    if args.json is not None:
        write_json(args.json, result, about)
    if args.output is not None and partial_folder is not None:
        write_json(args.output / "results.json", result, about)
        (args.output / "results.txt").write_text(result_text(result, len(id2label)) + "\n", encoding="utf-8")
        if args.worst:
            draw_worst(args.output / "worst.png", predictor, dataset, id2label, result.pictures[: args.worst])
        delete_partial_results(partial_folder)
    return 0
