"""`hf-segvit evaluate`: the scores that papers report, the costliest classes and the worst images.

With `--output`, counts are saved during the run, so that the same command resumes an interrupted one, if model and data
are still the same (evaluation/identity.py). The table, all numbers and a drawing of the worst images are written there.
Several processes share the work under `accelerate launch -m hf_segvit evaluate ...`.

With `--classifier` a ViT-P corrects the labels. With `--sweep-alpha`, or `--oracle`, generator and ViT-P run once per
image and are scored with several weights alpha, and alpha.png replaces worst.png. `--task points` scores a ViT-P alone,
`--task anomaly` how well confidences tell anomalous pixels from known ones.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.published_labels import TASKS
from .evaluate_anomaly import add_anomaly_options, run_anomaly
from .evaluate_points import add_point_options, run_points
from .evaluation_setup import ABOUT, class_ids, finish, identity, load_segmenter, prepare, write_result
from .model_options import (
    add_cache_option,
    add_classifier_options,
    add_dtype_option,
    add_model_options,
    add_pixel_limit,
    add_quantization_option,
    add_runtime_options,
    add_token_merging_option,
    add_view_options,
    apply_pixel_limit,
    check_minimum,
    check_model_options,
    model_folder,
    numbers,
    refuse_missing_data,
    refuse_missing_models,
    views_of,
)

if TYPE_CHECKING:
    from ..inference.segmenter import Segmenter


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "evaluate",
        help="score a model on a data set",
        description=(
            "Score a model on a data set: panoptic quality, mask AP or mean IoU, as the data sets' own evaluators do. "
            "Takes this package's models and any of Transformers' for universal segmentation; with task points, "
            "a ViT-P and its accuracy; with task anomaly, how well a model knows what it does not know."
        ),
        epilog="With --output DIR: results.json, results.txt and worst.png; an interrupted run resumes from there.",
    )
    add_model_options(parser)
    add_dtype_option(parser)
    add_token_merging_option(parser)
    add_quantization_option(parser)
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        metavar="FORMAT:PATH",
        help="data set; `hf-segvit check-data --help` lists the formats; task anomaly takes --data several times",
    )
    parser.add_argument(
        "--split", metavar="S", help="part of the data set; default: the first of val, validation, valid and test"
    )
    parser.add_argument("--task", choices=(*TASKS, "points", "anomaly"), help="default: what the model was trained for")
    parser.add_argument(
        "--classes",
        metavar="NAME,NAME",
        help=(
            "score only these classes of the data set; the means are over them. Task anomaly: the classes that are "
            "anomalies, in a data set that has others than known and anomaly"
        ),
    )
    parser.add_argument(
        "--max-detections",
        type=int,
        metavar="N",
        help="mask AP: count the best N objects of a class in an image, and let the model answer as many (default 100)",
    )
    add_cache_option(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers as JSON")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for results and for resuming")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images at a time (default 1)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read images (default 4 on a GPU)")
    parser.add_argument("--limit", type=int, metavar="N", help="score only the first N images")
    parser.add_argument("--threshold", type=float, metavar="X", help="score that a panoptic segment needs")
    parser.add_argument(
        "--absent-classes",
        choices=("exclude", "zero"),
        default="exclude",
        help="mean IoU: exclude classes that occur nowhere from the mean (default), or count them as zero",
    )
    parser.add_argument("--oracle", action="store_true", help="also the score of the same masks with perfect labels")
    parser.add_argument(
        "--boundary", action="store_true", help="also boundary IoU (semantic) or boundary AP (instance)"
    )
    parser.add_argument(
        "--calibration",
        action="store_true",
        help=(
            "also whether scores (task semantic: the largest class score of a pixel) are as high as the share of right "
            "answers: ECE on one half of the images, before and after a temperature found on the other; reliability.png"
        ),
    )
    parser.add_argument(
        "--save-temperature",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="with --calibration: save the temperature in the image processor of FOLDER (default: of --model)",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        metavar="MODULE:CLASS",
        help="your own metrics beside the task's; for their methods see Metric in hf_segvit.metrics.accumulation",
    )
    parser.add_argument("--rows", type=int, default=20, metavar="N", help="classes in the printed table (default 20)")
    parser.add_argument("--worst", type=int, default=8, metavar="N", help="worst images to draw (default 8)")
    add_pixel_limit(parser)
    add_point_options(parser)
    add_anomaly_options(parser)
    add_classifier_options(parser)
    parser.add_argument(
        "--sweep-alpha",
        nargs="?",
        const="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1",
        metavar="A,A,...",
        help="score with each of these weights, from one pass, and draw the curve (default 0, 0.1, ... 1)",
    )
    add_view_options(parser)
    add_runtime_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the options and evaluate."""
    check_minimum(args, batch_size=1, limit=1, workers=0, rows=0, worst=0, max_detections=1, threads=1)
    check_model_options(args)
    apply_pixel_limit(args)
    refuse_missing_models(args.model, args.classifier, args.generator)
    for data in args.data:
        refuse_missing_data(data)
    specs, args.data = args.data, args.data[0]
    if args.task is not None:  # before the seconds that imports take
        check_task_options(args)
    args.model = model_folder(args.model)
    args.classifier, args.generator = (name and model_folder(name) for name in (args.classifier, args.generator))
    if args.task is None:
        from ..data.reading import available_tasks
        from ..inference.task_settings import task_of_checkpoint

        tasks = available_tasks(args.data)
        own, args.task = (task_of_checkpoint(args.model, *of, revision=args.revision) for of in ((), (tasks,)))
        if args.task not in (*tasks, "points"):
            raise ValueError(
                f"{args.data} has labels for {' and '.join(tasks)} segmentation, and {args.model} is for {args.task} "
                "segmentation alone; give --data that has such labels, or another --model"
            )
        lacking = f", which have no {own} labels" if own != args.task else ""
        print(f"hf-segvit evaluate: task {args.task}, as of {args.model} and the data{lacking}", file=sys.stderr)
        check_task_options(args)
    if len(specs) > 1 and args.task != "anomaly":
        raise ValueError(f"--data is given {len(specs)} times, which is for task anomaly, not for {args.task}")
    with _alone(args.output):
        if args.task == "anomaly":
            return run_anomaly(args, specs)
        return run_points(args) if args.task == "points" else run_segmentation(args)


@contextmanager
def _alone(folder: Path | None) -> Iterator[None]:
    """Keep other evaluations out of the output folder; the main process does so for all processes of this one."""
    from accelerate import PartialState

    from ..atomic_files import only_writer, prepare_output_folder

    if folder is None or not PartialState().is_main_process:
        yield
        return
    prepare_output_folder(folder)
    with only_writer(folder):
        yield


def run_segmentation(args: argparse.Namespace) -> int:
    """Evaluate a segmentation model."""
    from ..data.reading import describe
    from ..evaluation import evaluate
    from ..evaluation.alpha_sweep import plot_sweep, sweep_alphas
    from ..evaluation.report import draw_worst

    dataset, device, settings = prepare(args, args.task, ABOUT)
    id2label, stuff_classes = describe(dataset).id2label, describe(dataset).stuff_classes
    classes = None if args.classes is None else class_ids(args.classes, id2label)
    segmenter = load_segmenter(
        args,
        device,
        task=args.task,
        threshold=args.threshold,
        stuff_classes=stuff_classes,
        data_labels=id2label,
        max_segments=_more_than_default(args.max_detections),
    )
    settings |= {"identity": identity(args, dataset, {"": segmenter})}
    more_metrics = [name for name in ("oracle", "boundary", "calibration") if getattr(args, name)]
    settings |= {"stuff_classes": stuff_classes, "absent": args.absent_classes, "more_metrics": more_metrics}
    settings |= {"max_detections": args.max_detections, "classes": classes}
    alphas = alphas_to_score(args, segmenter)
    if alphas is not None:
        if args.calibration:
            raise ValueError("--calibration is for one answer to each image; leave --sweep-alpha and --oracle out")
        sweep = sweep_alphas(segmenter, alphas, dataset, id2label, **settings)
        if write_result(args, sweep, settings) and args.output is not None:
            plot_sweep(args.output / "alpha.png", sweep, title=f"{Path(args.model).name} and ViT-P: {args.data}")
        return finish(settings)
    result = evaluate(segmenter, dataset, id2label, **settings)
    if write_result(args, result, settings) and args.output is not None and args.worst:
        draw_worst(args.output / "worst.png", segmenter, dataset, id2label, result.images[: args.worst])
    return finish(settings)


def check_task_options(args: argparse.Namespace) -> None:
    """Refuse options that the task has no use for."""
    if args.threshold is not None and args.task != "panoptic":
        raise ValueError(f"--threshold {args.threshold} has no meaning for task {args.task}; leave it out")
    if args.max_detections is not None and args.task != "instance":
        raise ValueError(f"--max-detections {args.max_detections} is for task instance, not for {args.task}")
    for name in ("scores", "components"):
        if getattr(args, name) is not None and args.task != "anomaly":
            raise ValueError(f"--{name} is for task anomaly, not for {args.task}; leave it out")
    if args.save_temperature is not None:
        _check_temperature_folder(args)
    for name in ("oracle", "calibration", "sweep_alpha"):
        if args.task == "anomaly" and getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is about answers, not about anomalies; leave it out")
    if args.calibration and args.sweep_alpha is not None:
        raise ValueError("--calibration is for one answer to each image; leave --sweep-alpha out")
    if args.boundary and args.task in ("panoptic", "points", "anomaly"):
        raise ValueError(f"--boundary is for the tasks semantic and instance, not for {args.task}; leave it out")
    for name in ("oracle", "classes", "quantization"):
        if getattr(args, name) and args.task == "points":
            raise ValueError(f"--{name} is for segmentation, not for points; leave it out")
    check_fusion_options(args)
    if not views_of(args).is_plain and args.task not in ("semantic", "anomaly"):
        raise ValueError(f"--tta-scales and --tta-flip are for task semantic, not for {args.task}; leave them out")


def _check_temperature_folder(args: argparse.Namespace) -> None:
    """Refuse to save a temperature where none is found, or where it cannot be stored."""
    from ..evaluation.calibration import temperature_file

    if not args.calibration:
        raise ValueError("--save-temperature needs --calibration, which finds it")
    if args.classifier is not None:
        raise ValueError("--save-temperature is for one checkpoint; save the fused model first, and name it --model")
    temperature_file(args.save_temperature or model_folder(args.model))


def _more_than_default(max_detections: int | None) -> int | None:
    """The objects to ask of the model, where the default of its processor would be too few."""
    from ..metrics.mask_average_precision import MAX_DETECTIONS

    return max_detections if max_detections is not None and max_detections > MAX_DETECTIONS else None


def check_fusion_options(args: argparse.Namespace) -> None:
    """Refuse combinations of classifier, alpha and alphas that cannot be scored."""
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
    """The alphas to compare, including 0; `None` for a model that is scored as it is."""
    from ..inference.loading import is_fused

    if args.sweep_alpha is not None:
        # Alpha 0, the generator alone, is what the others are compared with.
        return sorted({0.0, *numbers(args.sweep_alpha, "--sweep-alpha")})
    if args.oracle and is_fused(segmenter.model):
        return sorted({0.0, segmenter.model.config.alpha_of(args.task)})
    return None
