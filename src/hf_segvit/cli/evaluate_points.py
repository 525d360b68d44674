"""Task points of `hf-segvit evaluate`: its options, and how it runs."""

import argparse
from typing import Any

from .evaluation_setup import finish, identity, prepare, write_result
from .model_options import check_minimum, errors_name_options, runtime_options


def add_point_options(parser: Any) -> None:
    """Add the options of task points."""
    group = parser.add_argument_group("task points")
    group.add_argument(
        "--points",
        choices=("random", "interior", "maximum"),  # evaluation.points.POINT_KINDS, whose import takes seconds
        default="random",
        help=(
            "random: all classes of an image equally often (default); interior: the innermost pixel of every true "
            "segment; maximum: the highest-valued point of every mask of --generator, which is scored there too"
        ),
    )
    group.add_argument("--num-points", type=int, default=200, metavar="N", help="random points per image (default 200)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of random points (default 0)")
    group.add_argument("--generator", metavar="ID_OR_FOLDER", help="segmentation model that proposes the masks")


def run_points(args: argparse.Namespace) -> int:
    """Evaluate a point classifier."""
    check_minimum(args, num_points=1, seed=0)
    if args.token_merging is not None:
        raise ValueError("--token-merging is for segmentation with EoMT; a ViT-P has none, so leave it out")
    if (args.points == "maximum") != (args.generator is not None):
        raise ValueError("--points maximum and --generator MODEL go together: give both, or neither")

    from ..data.reading import available_tasks, describe
    from ..evaluation.points import evaluate_points, point_source
    from ..inference.point_classifier import PointClassifier
    from ..inference.segmenter import Segmenter

    # The other kinds ask about each segment, and panoptic labels keep segments of one class apart.
    order = ("semantic", "panoptic") if args.points == "random" else ("panoptic", "semantic")
    tasks = [task for task in order if task in available_tasks(args.data)]
    if not tasks:
        raise ValueError(f"{args.data} has neither panoptic nor semantic labels, so that a point has no one class")
    names = (
        "model",
        "revision",
        "dtype",
        "data",
        "split",
        "task",
        "limit",
        "points",
        "num_points",
        "seed",
        "generator",
    )
    dataset, device, settings = prepare(args, tasks[0], names)
    id2label = describe(dataset).id2label
    with errors_name_options():
        classifier = PointClassifier.from_pretrained(
            args.model, revision=args.revision, device=device, dtype=args.dtype, **runtime_options(args)
        )
    generator = None
    if args.generator is not None:
        generator = Segmenter.from_pretrained(args.generator, task="panoptic", device=device, dtype=args.dtype)
    settings |= {"identity": identity(args, dataset, {"": classifier, "generator": generator})}
    settings |= {"more_metrics": ["calibration"] if args.calibration else []}
    source = point_source(args.points, id2label, num_points=args.num_points, seed=args.seed, generator=generator)
    write_result(args, evaluate_points(classifier, dataset, id2label, source, **settings), settings)
    return finish(settings)
