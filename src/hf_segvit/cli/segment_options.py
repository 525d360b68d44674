"""Options of `hf-segvit segment`, and what they mean for model and job.

Nothing heavy is imported before `load_segmenter`, so that help and mistakes take no time.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..lookup import printable, suggestion
from ..models.published_labels import TASKS
from .model_options import (
    CONFIDENCES,
    add_classifier_options,
    add_dtype_option,
    add_model_options,
    add_optimize_option,
    add_pixel_limit,
    add_quantization_option,
    add_runtime_options,
    add_token_merging_option,
    add_view_options,
    errors_name_options,
    optimize_switches,
    runtime_options,
    views_of,
)

if TYPE_CHECKING:
    from ..inference.segmenter import Segmenter

SOURCES = (
    "image files, folders, or globs in quotes; zip and tar archives, Parquet files and videos, by name or by a glob "
    "that ends like theirs; dataset:FOLDER_OR_ID@SPLIT; @FILE for a list of them, and - for a list on stdin"
)
OUTPUTS: tuple[str, ...] = (
    *("overlay", "json", "panoptic", "semantic", "comparison", "confidence", "confidence-png", "crops", "masks"),
    *("jsonl", "parquet", "coco", "coco-panoptic", "ade20k", "cityscapes", "bravo", "labelme", "yolo", "cvat"),
    "label-studio",
)


def add_segment_options(parser: Any) -> None:
    """Add the images and all options."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=SOURCES)
    add_model_options(parser)
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder for the results; with --engine ray also s3://BUCKET/FOLDER",
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        help=(
            "default: what the model was trained for (panoptic for Transformers' models); instance from a "
            "panoptic model returns stuff as objects, too"
        ),
    )
    parser.add_argument("--threshold", type=float, metavar="X", help="score that a segment needs; default: the model's")
    parser.add_argument(
        "--max-segments", type=int, metavar="N", help="most objects in an image (task instance); default: the model's"
    )
    parser.add_argument(
        "--confidence",
        metavar="NAME",
        help=(
            f"also how sure the model is of each pixel (task semantic): {', '.join(CONFIDENCES)}, and NAME@T with a "
            "temperature; writes NAME.confidence.npy, and overlays fade where it is low"
        ),
    )
    parser.add_argument(
        "--font",
        type=Path,
        metavar="FILE",
        help="font for class names in the overlays; default: one that has the letters",
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images at a time (default 1)")
    add_dtype_option(parser)
    add_quantization_option(parser)
    add_optimize_option(parser)
    add_token_merging_option(parser)
    parser.add_argument(
        "--value-range",
        metavar="LOW-HIGH",
        help="values of black and white in images of more than 8 bits, such as 0-4095; default: the model's, or all",
    )
    parser.add_argument("--bands", metavar="N,N,N", help="bands to use of images that have several, from 1: 4,3,2")
    add_pixel_limit(parser)
    add_classifier_options(parser)
    parser.add_argument(
        "--compare",
        action="store_true",
        help="with --classifier: also NAME.comparison.png, and the labels that changed, with names and scores",
    )
    add_view_options(parser)
    add_runtime_options(parser)
    _add_job_options(parser)
    _add_cluster_options(parser)


def _add_job_options(parser: Any) -> None:
    group = parser.add_argument_group("what is written, and large jobs")
    group.add_argument(
        "--outputs",
        metavar="KIND,...",
        help=(
            f"what to write: {', '.join(OUTPUTS)}; default: overlay, json, panoptic or semantic by task, and a "
            "confidence if asked for"
        ),
    )
    group.add_argument(
        "--overlay-format",
        choices=("png", "jpg"),
        default="png",
        help="of overlays: png is exact, jpg many times faster and smaller (default png)",
    )
    for kind, what in (("crops", "the image within the box of each segment"), ("masks", "a PNG mask of each segment")):
        group.add_argument(f"--{kind}", action="store_true", help=f"also {what}, in the folder {kind}")
    group.add_argument("--no-labels", action="store_true", help="neither names nor a legend in the overlays")
    group.add_argument("--every", type=int, default=1, metavar="N", help="take every n-th frame of videos (default 1)")
    group.add_argument("--workers", type=int, metavar="N", help="threads that read images (default: cores, at most 4)")
    group.add_argument("--writers", type=int, metavar="N", help="threads that write files (default: cores, at most 4)")
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=(
            "go on with the job in the output folder: images that are complete and have not changed are left out "
            "(default); --no-resume begins anew"
        ),
    )
    group.add_argument(
        "--shard",
        type=str,
        metavar="I/N",
        help=(
            "segment part I of N only, counted from 1; which images these are follows from a hash of their names below "
            "the named folders, so N machines divide a list among them, also into one output folder"
        ),
    )


def _add_cluster_options(parser: Any) -> None:
    group = parser.add_argument_group("more than one machine")
    group.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help=(
            'ray: on a Ray cluster (pip install "hf-segvit[ray]"), of images that all nodes see or s3://BUCKET/FOLDER '
            "and the like; writes segments/*.parquet and failures/*.parquet, and nothing else (default local)"
        ),
    )
    group.add_argument(
        "--address", metavar="HOST:PORT", help="of the Ray cluster, or auto; default: one is started on this machine"
    )
    group.add_argument("--actors", type=int, metavar="N", help="most models in the cluster (default: its GPUs or CPUs)")
    group.add_argument("--gpus-per-actor", type=float, metavar="X", help="perhaps a part (default 1 where GPUs are)")
    group.add_argument("--cpus-per-actor", type=int, default=1, metavar="N", help="threads beside a model (default 1)")
    group.add_argument(
        "--rows-per-file", type=int, default=512, metavar="N", help="images in a Parquet file (default 512)"
    )


def refuse_cluster_options(args: argparse.Namespace) -> None:
    """Refuse what only a cluster can do, and its results as the place for others."""
    for option in ("address", "actors", "gpus_per_actor"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} is for --engine ray; add that, or leave it out")
    if "://" in args.output:
        raise ValueError(f"--output {args.output}: only --engine ray writes to addresses; name a folder")
    if (Path(args.output) / "_hf_segvit_job.json").exists():
        raise ValueError(f"{args.output} holds results of a job with --engine ray; choose another --output")


def kinds_of(args: argparse.Namespace) -> frozenset[str] | None:
    """The kinds of `--outputs`, `--crops` and `--masks`; None: the usual ones."""
    more = {kind for kind in ("crops", "masks") if getattr(args, kind)}
    if args.outputs is None and not more:
        return None
    usual = "overlay,json,panoptic,semantic,comparison,confidence"
    kinds = {kind.strip() for kind in (args.outputs or usual).split(",")}
    for kind in sorted(kinds):
        if kind not in OUTPUTS:
            raise ValueError(f"--outputs: there is no {kind!r}; {suggestion(kind, OUTPUTS)}")
    of_confidence = ("confidence", "confidence-png", "bravo")
    unasked = sorted(kinds.intersection(of_confidence)) if args.outputs is not None else []
    if unasked and args.confidence is None:
        raise ValueError(f"--outputs {unasked[0]} needs --confidence NAME, such as --confidence maxscore")
    return frozenset(kinds | more)


def load_segmenter(args: argparse.Namespace) -> "Segmenter":
    """The model that the options name."""
    from ..inference.devices import pick_device
    from ..inference.loading import is_exported, is_fused
    from ..inference.segmenter import Segmenter

    # An exported model's runtime has devices of its own.
    device = args.device if is_exported(args.model, args.revision) else pick_device(args.device)
    with errors_name_options():
        segmenter = Segmenter.from_pretrained(args.model, device=device, **model_settings(args))
    num_queries = getattr(segmenter.model.config, "num_queries", None)
    if args.max_segments is not None and num_queries is not None and args.max_segments > num_queries:
        say(f"the model has {num_queries} queries, which is about the most objects that it can find")
    if args.compare and not is_fused(segmenter.model):
        raise ValueError("--compare shows what a classifier changes; name one with --classifier")
    return segmenter


def model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Segmenter.from_pretrained` that the options mean, without model and device."""
    return {
        "task": args.task,
        "revision": args.revision,
        "dtype": args.dtype,
        "optimize": optimize_switches(args.optimize),
        "quantization": args.quantization,
        "threshold": args.threshold,
        "views": views_of(args),
        "classifier": args.classifier,
        "alpha": args.alpha,
        "label_mismatch": args.label_mismatch,
        "token_merging": args.token_merging,
        "max_segments": args.max_segments,
        "confidence": args.confidence,
        **runtime_options(args),
    }


def job_settings(
    args: argparse.Namespace, segmenter: "Segmenter", kinds: frozenset[str] | None, image_settings: Any
) -> dict[str, Any]:
    """What decides about the results of a job, by the names of the options."""
    from ..inference.loading import fingerprint

    return {
        "model": args.model,
        "classifier": args.classifier,
        "weights": fingerprint(segmenter.model, segmenter.processor),
        "task": segmenter.task,
        "threshold": segmenter.default_threshold,
        "alpha": args.alpha,
        "label_mismatch": args.label_mismatch,
        "max_segments": args.max_segments,
        "dtype": args.dtype,
        "token_merging": args.token_merging,
        "quantization": args.quantization,
        "runtime": args.runtime,
        "tta_scales": args.tta_scales,
        "tta_flip": args.tta_flip,
        "value_range": image_settings.value_range,
        "bands": image_settings.bands,
        "compare": args.compare,
        "confidence": args.confidence,
        "outputs": None if kinds is None else sorted(kinds),
        "overlay_format": args.overlay_format,
        "no_labels": args.no_labels,
    }


def say(text: str) -> None:
    """Tell the user on standard error."""
    print(message(text), file=sys.stderr)


def message(text: str) -> str:
    """A line for the user."""
    return f"hf-segvit segment: {printable(text)}"
