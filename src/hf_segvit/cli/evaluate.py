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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..lookup import import_object, suggestion
from ..models.published_labels import TASKS
from .model_options import (
    CONFIDENCES,
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
    errors_name_options,
    model_folder,
    name_of_dtype,
    numbers,
    refuse_missing_data,
    refuse_missing_models,
    runtime_options,
    views_of,
)

if TYPE_CHECKING:
    from ..inference.segmenter import Segmenter

# An evaluation resumes from saved counts only if all of these are the same.
ABOUT = (
    *("model", "revision", "data", "split", "task", "threshold", "absent_classes", "limit"),
    *("dtype", "classifier", "alpha", "label_mismatch", "tta_scales", "tta_flip", "classes", "max_detections"),
    *("runtime", "token_merging", "quantization"),
)
# evaluation.anomaly.DEFAULT_SCORES, whose import takes seconds
DEFAULT_SCORES = "msp,maxlogit,entropy,energy,rba"


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
    group = parser.add_argument_group("task anomaly")
    group.add_argument(
        "--scores",
        metavar="NAME,NAME",
        help=(
            f"confidences whose negative is the anomaly score: {', '.join(CONFIDENCES)}; NAME@T with a temperature; "
            f"the first one also ranks images (default {DEFAULT_SCORES})"
        ),
    )
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
        from ..inference.segmenter import task_of_checkpoint

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

    dataset, device, settings = _prepare(args, args.task, ABOUT)
    id2label, stuff_classes = describe(dataset).id2label, describe(dataset).stuff_classes
    classes = None if args.classes is None else class_ids(args.classes, id2label)
    segmenter = _segmenter(
        args,
        device,
        task=args.task,
        threshold=args.threshold,
        stuff_classes=stuff_classes,
        data_labels=id2label,
        max_segments=_more_than_default(args.max_detections),
    )
    settings |= {"identity": _identity(args, dataset, {"": segmenter})}
    more_metrics = [name for name in ("oracle", "boundary", "calibration") if getattr(args, name)]
    settings |= {"stuff_classes": stuff_classes, "absent": args.absent_classes, "more_metrics": more_metrics}
    settings |= {"max_detections": args.max_detections, "classes": classes}
    alphas = alphas_to_score(args, segmenter)
    if alphas is not None:
        if args.calibration:
            raise ValueError("--calibration is for one answer to each image; leave --sweep-alpha and --oracle out")
        sweep = sweep_alphas(segmenter, alphas, dataset, id2label, **settings)
        if _write(args, sweep, settings) and args.output is not None:
            plot_sweep(args.output / "alpha.png", sweep, title=f"{Path(args.model).name} and ViT-P: {args.data}")
        return _finish(settings)
    result = evaluate(segmenter, dataset, id2label, **settings)
    if _write(args, result, settings) and args.output is not None and args.worst:
        draw_worst(args.output / "worst.png", segmenter, dataset, id2label, result.images[: args.worst])
    return _finish(settings)


def _segmenter(args: argparse.Namespace, device: Any, **settings: Any) -> "Segmenter":
    """The model that the options name."""
    from ..inference.segmenter import Segmenter

    with errors_name_options():
        return Segmenter.from_pretrained(
            args.model,
            device=device,
            dtype=args.dtype,
            quantization=args.quantization,
            revision=args.revision,
            views=views_of(args),
            classifier=args.classifier,
            alpha=args.alpha,
            label_mismatch=args.label_mismatch,
            token_merging=args.token_merging,
            **settings,
            **runtime_options(args),
        )


def run_anomaly(args: argparse.Namespace, specs: list[str]) -> int:
    """Evaluate the anomaly scores of a model on each data set."""
    from accelerate import PartialState

    from ..atomic_files import replacing, write_json
    from ..data.reading import describe
    from ..evaluation.anomaly import (
        anomalous_classes,
        anomaly_content,
        anomaly_text,
        draw_worst_anomalies,
        evaluate_anomalies,
        plot_anomaly_curves,
    )
    from ..inference.segmenter import checked_confidence
    from ..models.confidence import confidences_named

    with errors_name_options():
        wanted = confidences_named((args.scores or DEFAULT_SCORES).split(","))
        for each in wanted:
            checked_confidence("semantic", each, views_of(args))
    split, segmenter = args.split, None
    runs: list[tuple[str, Any, dict[int, str], Any, dict[str, Any]]] = []
    for number, spec in enumerate(specs, start=1):
        args.data, args.split = spec, split
        dataset, device, settings = _prepare(args, "semantic", (*ABOUT, "scores"))
        id2label = describe(dataset).id2label
        settings["classes"] = None if args.classes is None else class_ids(args.classes, id2label)
        with errors_name_options():
            anomalous_classes(id2label, settings["classes"])  # of all data sets before the first image
        if settings.pop("metrics"):
            raise ValueError("--metrics are for segmentation and points, not for anomaly; leave them out")
        if args.output is not None:
            settings["partial_folder"] = args.output / f"partial-{number}"
        name = f"{spec}, {args.split}"
        if name in [before[0] for before in runs]:
            raise ValueError(f"--data {spec} is given twice; leave one of them out")
        runs.append((name, dataset, id2label, device, settings))
    results = {}
    for name, dataset, id2label, device, settings in runs:
        segmenter = segmenter or _segmenter(args, device, task="semantic")
        settings["identity"] = _identity(args, dataset, {"": segmenter})
        results[name] = evaluate_anomalies(segmenter, dataset, id2label, wanted, **settings)
    if not PartialState().is_main_process:
        return 0
    text, report = anomaly_text(results), {**runs[0][-1]["about"], "data": specs, **anomaly_content(results)}
    print(text)
    if args.json is not None:
        write_json(args.json, report)
    if args.output is not None:
        with replacing(args.output / "results.txt") as partial:
            partial.write_text(text + "\n", encoding="utf-8")
        write_json(args.output / "results.json", report)
        plot_anomaly_curves(args.output / "curves.png", results, title=Path(args.model).name)
        for number, (name, dataset, id2label, _, settings) in enumerate(runs, start=1):
            path = args.output / ("worst.png" if len(runs) == 1 else f"worst-{number}.png")
            classes = settings["classes"]
            if args.worst:
                draw_worst_anomalies(path, segmenter, dataset, id2label, results[name], args.worst, classes)
    for *_, settings in runs:
        _finish(settings)
    return 0


def check_task_options(args: argparse.Namespace) -> None:
    """Refuse options that the task has no use for."""
    if args.threshold is not None and args.task != "panoptic":
        raise ValueError(f"--threshold {args.threshold} has no meaning for task {args.task}; leave it out")
    if args.max_detections is not None and args.task != "instance":
        raise ValueError(f"--max-detections {args.max_detections} is for task instance, not for {args.task}")
    if args.scores is not None and args.task != "anomaly":
        raise ValueError(f"--scores is for task anomaly, not for {args.task}; leave it out")
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


def class_ids(text: str, id2label: Mapping[int, str]) -> list[int]:
    """Label ids of class names separated by commas; a name may contain commas itself, and case does not matter."""
    from ..models.label_spaces import whole_name

    by_name = {whole_name(name): label for label, name in id2label.items()}
    parts = text.split(",")
    labels: list[int] = []
    while parts:
        # The longest name first: "person, individual" is one class of ADE20K.
        for count in range(len(parts), 0, -1):
            label = by_name.get(whole_name(",".join(parts[:count])))
            if label is not None:
                labels.append(label)
                del parts[:count]
                break
        else:
            name = parts[0].strip()
            raise ValueError(f"--classes: the data set has no class {name!r}; {suggestion(name, id2label.values())}")
    return sorted(set(labels))


def _prepare(args: argparse.Namespace, task: str, about: tuple[str, ...]) -> tuple[Any, Any, dict[str, Any]]:
    """The data set, the device, and the settings that all evaluations share."""
    from accelerate import PartialState

    from ..atomic_files import prepare_output_folder
    from ..data.reading import load_segmentation_dataset, validation_split
    from ..inference.devices import pick_device
    from ..inference.loading import is_exported
    from ..metrics.accumulation import METRIC_METHODS

    # First, as a result that cannot be written is worth nothing.
    for folder in (args.output, args.json.parent if args.json is not None else None):
        if folder is not None:
            prepare_output_folder(folder)
    metrics = [import_object(path, "--metrics", METRIC_METHODS) for path in args.metrics]
    args.split = args.split or validation_split(args.data, "name one with --split")
    dataset = load_segmentation_dataset(args.data, split=args.split, task=task)
    if args.limit is not None:
        dataset = dataset.select(range(min(args.limit, len(dataset))))
    state = PartialState()
    device: Any
    if is_exported(args.model, args.revision):
        device = args.device  # of its runtime
    else:
        # Under accelerate, each process has its own GPU.
        device = state.device if state.num_processes > 1 and args.device is None else pick_device(args.device)
        args.dtype = name_of_dtype(args.dtype, device)  # what `auto` chose, as scores may depend on it
    settings = {
        "metrics": metrics,
        "batch_size": args.batch_size,
        # On the CPU, processes that read would compete with the model for cores.
        "num_workers": args.workers if args.workers is not None else 4 if "cuda" in str(device) else 0,
        "partial_folder": args.output / "partial" if args.output is not None else None,
        "about": {name: getattr(args, name) for name in about},
        "progress": True,
    }
    return dataset, device, settings


def _identity(args: argparse.Namespace, dataset: Any, models: Mapping[str, Any]) -> dict[str, str]:
    """What counts to resume from must agree with, besides the options."""
    from ..evaluation.identity import data_identity, model_identity, program_identity

    if args.output is None:  # nothing is kept, so nothing is resumed
        return {}
    identity = program_identity() | data_identity(dataset)
    for name, model in models.items():
        if model is not None:
            identity |= model_identity(model.model, model.processor, name)
    return identity


def _write(args: argparse.Namespace, result: Any, settings: Mapping[str, Any]) -> bool:
    """Print and write a result or sweep; whether this is the main process, which alone does so."""
    from accelerate import PartialState

    from ..atomic_files import replacing, write_json
    from ..evaluation.alpha_sweep import AlphaSweep, sweep_content, sweep_text
    from ..evaluation.report import result_content, result_text

    if not PartialState().is_main_process:
        return False
    is_sweep = isinstance(result, AlphaSweep)
    calibration = None if is_sweep else result.calibration
    text, content = (sweep_text, sweep_content) if is_sweep else (result_text, result_content)
    print(text(result, args.rows))
    report = {**settings["about"], **content(result)}
    if args.json is not None:
        write_json(args.json, report)
    if args.output is not None:
        with replacing(args.output / "results.txt") as partial:
            partial.write_text(text(result, sys.maxsize) + "\n", encoding="utf-8")
        write_json(args.output / "results.json", report)
    if calibration is not None:
        from ..evaluation.calibration import plot_reliability, save_temperature

        if args.output is not None:
            title = f"{Path(args.model).name}: {args.data}"
            plot_reliability(args.output / "reliability.png", calibration, title)
        if args.save_temperature is not None:
            message = f"no temperature is saved: {calibration.undefined}"
            if calibration.temperature is not None:
                path = save_temperature(args.save_temperature or args.model, calibration.temperature)
                message = f"temperature {calibration.temperature:g} saved in {path}"
            print(f"hf-segvit evaluate: {message}", file=sys.stderr)
    return True


def _finish(settings: Mapping[str, Any]) -> int:
    """Delete the counts, now that everything is written."""
    from accelerate import PartialState

    from ..evaluation.counts import delete_partial_results

    if PartialState().is_main_process and settings["partial_folder"] is not None:
        delete_partial_results(settings["partial_folder"])
    return 0


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
    dataset, device, settings = _prepare(args, tasks[0], names)
    id2label = describe(dataset).id2label
    with errors_name_options():
        classifier = PointClassifier.from_pretrained(
            args.model, revision=args.revision, device=device, dtype=args.dtype, **runtime_options(args)
        )
    generator = None
    if args.generator is not None:
        generator = Segmenter.from_pretrained(args.generator, task="panoptic", device=device, dtype=args.dtype)
    settings |= {"identity": _identity(args, dataset, {"": classifier, "generator": generator})}
    settings |= {"more_metrics": ["calibration"] if args.calibration else []}
    source = point_source(args.points, id2label, num_points=args.num_points, seed=args.seed, generator=generator)
    _write(args, evaluate_points(classifier, dataset, id2label, source, **settings), settings)
    return _finish(settings)


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
