"""`hf-segvit evaluate --task points`: the accuracy of a point classifier; a part of the subcommand in evaluate.py."""

import argparse
from typing import Any

POINT_KINDS = ("random", "interior", "maximum")


def add_point_options(parser: Any) -> None:
    """Add what only this task heeds."""
    group = parser.add_argument_group("task points")
    group.add_argument(
        "--points",
        choices=POINT_KINDS,
        default="random",
        help=(
            "random: all classes of a picture equally often (default); interior: the innermost pixel of every true "
            "segment; maximum: the highest-valued point of every mask of --generator, which is scored there too"
        ),
    )
    group.add_argument("--num-points", type=int, default=200, metavar="N", help="random points a picture (default 200)")
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

    from accelerate import PartialState

    from ..atomic_files import prepare_output_folder
    from ..data.reading import available_tasks, describe, load_segmentation_dataset, validation_split
    from ..evaluation.counts import delete_partial_results
    from ..evaluation.points import PointPredictor, evaluate_points, point_source
    from ..evaluation.predictor import load_predictor
    from ..evaluation.report import result_text, write_json
    from ..inference.devices import pick_device
    from ..inference.loading import load_point_classifier

    for folder in (args.output, args.json.parent if args.json is not None else None):
        if folder is not None:
            prepare_output_folder(folder)
    # Segments of one class are told apart where each is asked about.
    order = ("semantic", "panoptic") if args.points == "random" else ("panoptic", "semantic")
    tasks = [task for task in order if task in available_tasks(args.data)]
    if not tasks:
        raise ValueError(f"{args.data} has neither panoptic nor semantic labels, so that a point has no one class")
    args.split = args.split or validation_split(args.data, "name one with --split")
    dataset = load_segmentation_dataset(args.data, split=args.split, task=tasks[0])
    id2label = describe(dataset).id2label
    if args.limit is not None:
        dataset = dataset.select(range(min(args.limit, len(dataset))))
    state = PartialState()
    device = state.device if state.num_processes > 1 and args.device is None else pick_device(args.device)
    model, processor = load_point_classifier(args.model, revision=args.revision)
    generator = None
    if args.generator is not None:
        generator = load_predictor(args.generator, task="panoptic", device=device)
    source = point_source(args.points, id2label, num_points=args.num_points, seed=args.seed, generator=generator)
    names = ("model", "revision", "data", "split", "task", "limit", "points", "num_points", "seed", "generator")
    about = {name: getattr(args, name) for name in names}
    partial_folder = args.output / "partial" if args.output is not None else None
    result = evaluate_points(
        PointPredictor(model, processor, device),
        dataset,
        id2label,
        source,
        batch_size=args.batch_size,
        num_workers=args.workers if args.workers is not None else 4 if device.type == "cuda" else 0,
        partial_folder=partial_folder,
        about=about,
        progress=True,
    )
    if not state.is_main_process:
        return 0
    print(result_text(result, args.rows))
    if args.json is not None:
        write_json(args.json, result, about)
    if args.output is not None and partial_folder is not None:
        write_json(args.output / "results.json", result, about)
        (args.output / "results.txt").write_text(result_text(result, len(id2label)) + "\n", encoding="utf-8")
        delete_partial_results(partial_folder)
    return 0
