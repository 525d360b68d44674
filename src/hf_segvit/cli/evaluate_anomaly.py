"""Task anomaly of `hf-segvit evaluate`: its options, and how it runs."""

import argparse
from pathlib import Path
from typing import Any

from ..lookup import suggestion
from .evaluation_setup import ABOUT, class_ids, finish, identity, load_segmenter, prepare, write_report
from .model_options import CONFIDENCES, errors_name_options, views_of

# evaluation.anomaly.DEFAULT_SCORES, whose import takes seconds
DEFAULT_SCORES = "msp,maxlogit,entropy,energy,rba"
TRACKS = ("anomaly", "obstacle")  # metrics.anomaly_components.TRACKS, likewise


def add_anomaly_options(parser: Any) -> None:
    """Add the options of task anomaly."""
    group = parser.add_argument_group("task anomaly")
    group.add_argument(
        "--scores",
        metavar="NAME,NAME",
        help=(
            f"confidences whose negative is the anomaly score: {', '.join(CONFIDENCES)}; NAME@T with a temperature; "
            f"the first one also ranks images (default {DEFAULT_SCORES})"
        ),
    )
    group.add_argument(
        "--components",
        metavar="TRACK,TRACK",
        help=(
            f"also score connected components, as SegmentMeIfYouCan does on its track of that name, {TRACKS[0]} or "
            f"{TRACKS[1]}, whose smallest components they are (500 pixels predicted and 100 true, or 50 and 10): sIoU, "
            "PPV and mean F1 at each score's threshold of the best F1; one for all --data, or one for each, in their "
            "order; the model is asked a second time"
        ),
    )


def component_tracks(text: str | None, specs: list[str]) -> list[str | None]:
    """The track of each data set, or `None` without component scores."""
    if text is None:
        return [None] * len(specs)
    tracks = [name.strip() for name in text.split(",")]
    for name in tracks:
        if name not in TRACKS:
            raise ValueError(f"--components: there is no track {name!r}; {suggestion(name, TRACKS)}")
    if len(tracks) not in (1, len(specs)):
        raise ValueError(
            f"--components names {len(tracks)} tracks for {len(specs)} data sets; give one for all, or one for each"
        )
    return [*tracks] * (len(specs) // len(tracks))


def run_anomaly(args: argparse.Namespace, specs: list[str]) -> int:
    """Evaluate the anomaly scores of a model on each data set."""
    from accelerate import PartialState

    from ..data.reading import describe
    from ..evaluation.anomaly import (
        anomalous_classes,
        anomaly_content,
        anomaly_text,
        component_counts,
        draw_worst_anomalies,
        evaluate_anomalies,
        plot_anomaly_curves,
    )
    from ..inference.task_settings import checked_confidence
    from ..models.confidence import confidences_named

    with errors_name_options():
        wanted = confidences_named((args.scores or DEFAULT_SCORES).split(","))
        for each in wanted:
            checked_confidence("semantic", each, views_of(args))
    tracks = component_tracks(args.components, specs)
    split, segmenter = args.split, None
    runs: list[tuple[str, Any, dict[int, str], Any, dict[str, Any]]] = []
    for number, spec in enumerate(specs, start=1):
        args.data, args.split = spec, split
        dataset, device, settings = prepare(args, "semantic", (*ABOUT, "scores"))
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
    for (name, dataset, id2label, device, settings), track in zip(runs, tracks, strict=True):
        segmenter = segmenter or load_segmenter(args, device, task="semantic")
        settings["identity"] = identity(args, dataset, {"": segmenter})
        results[name] = evaluate_anomalies(segmenter, dataset, id2label, wanted, components=track, **settings)
    if not PartialState().is_main_process:
        return 0
    text, report = anomaly_text(results), {**runs[0][-1]["about"], "data": specs, **anomaly_content(results)}
    print(text)
    write_report(args, text, report)
    if args.output is not None:
        plot_anomaly_curves(args.output / "curves.png", results, title=Path(args.model).name)
        for number, (name, dataset, id2label, _, settings) in enumerate(runs, start=1):
            path = args.output / ("worst.png" if len(runs) == 1 else f"worst-{number}.png")
            classes = settings["classes"]
            if args.worst:
                draw_worst_anomalies(path, segmenter, dataset, id2label, results[name], args.worst, classes)
    for *_, settings in runs:
        finish(settings)
        # There is no such folder without components or thresholds, but one may remain of an interrupted run.
        if args.output is not None and (folder := component_counts(settings["partial_folder"])).is_dir():
            finish({"partial_folder": folder})
    return 0
