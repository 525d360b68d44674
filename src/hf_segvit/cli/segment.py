"""`hf-segvit segment`: images in, overlays and segment lists out.

Checks come in the order of what they cost the user: arguments, images, output folder, device, model. An image that
cannot be read is reported, and the others are segmented. With `--classifier` a ViT-P corrects the labels of any
generator's masks; `--compare` shows and lists what it changed.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_files import prepare_output_folder
from ..inference.input_files import IMAGE_SUFFIXES, ImageFile, find_images, is_shortened, output_names
from ..inference.jobs import Job, Shard
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
    apply_pixel_limit,
    check_minimum,
    check_model_options,
    errors_name_options,
    model_folder,
    optimize_switches,
    refuse_missing_models,
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
    "overlay",
    "json",
    "panoptic",
    "semantic",
    "comparison",
    "confidence",
    "confidence-png",
    "crops",
    "masks",
    "jsonl",
    "parquet",
    "coco",
)
OUTPUTS += ("coco-panoptic", "ade20k", "cityscapes", "bravo", "labelme", "yolo", "cvat", "label-studio")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "segment",
        help="segment images",
        description=(
            "Segment images. For each one writes NAME.overlay.png, NAME.segments.json and, by task, "
            "NAME.panoptic.png (COCO's encoding) or NAME.semantic.png (class ids). NAME is the image's name without "
            "its ending, or with it if two images differ in nothing else; folders below a named folder are kept. Later "
            "pages of a TIFF or an animation are NAME.page-2 and so on."
        ),
        epilog=(
            "Exit code 0: all images; 1: some could not be segmented; 2: stopped, the message says why; 75: stopped by "
            "Ctrl-C or SIGTERM, and the same command goes on."
        ),
    )
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
    parser.set_defaults(run=run)


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


def run(args: argparse.Namespace) -> int:
    """Segment the images; 1 if an image could not be segmented."""
    check_minimum(args, batch_size=1, max_segments=1, threads=1, workers=1, writers=1, every=1)
    check_minimum(args, actors=1, cpus_per_actor=1, rows_per_file=1)
    check_model_options(args)
    apply_pixel_limit(args)
    kinds, shard = _kinds(args), Shard() if args.shard is None else Shard.parse(args.shard)
    if args.engine == "ray":
        return _run_on_ray(args, shard, kinds)
    _refuse_cluster_options(args)
    args.output = Path(args.output)
    images, missing = find_images(args.images, sys.stdin)
    if not images:
        raise ValueError(
            f"no images match {' '.join(missing)}; name files, quoted globs, or folders with files that end in "
            f"{', '.join(IMAGE_SUFFIXES)}"
        )
    for pattern in missing:
        _say(f"{pattern}: no such image")

    prepare_output_folder(args.output)
    refuse_missing_models(args.model, args.classifier)
    args.model = model_folder(args.model)
    args.classifier = args.classifier and model_folder(args.classifier)
    if args.font is not None:
        from ..drawing.fonts import use_font

        use_font(args.font)
    with Job(args.output, shard, args.resume) as job:
        return _run_job(args, job, shard, images, len(missing), kinds)


def _refuse_cluster_options(args: argparse.Namespace) -> None:
    """Refuse what only a cluster can do, and its results as the place for others."""
    for option in ("address", "actors", "gpus_per_actor"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} is for --engine ray; add that, or leave it out")
    if "://" in args.output:
        raise ValueError(f"--output {args.output}: only --engine ray writes to addresses; name a folder")
    if (Path(args.output) / "_hf_segvit_job.json").exists():
        raise ValueError(f"{args.output} holds results of a job with --engine ray; choose another --output")


def _run_on_ray(args: argparse.Namespace, shard: Shard, kinds: frozenset[str] | None) -> int:
    """Segment the images on a Ray cluster."""
    from tqdm import tqdm

    from ..inference.containers import is_video
    from ..inference.ray_jobs import Counts, RemoteImage, Resources, find_remote, is_remote, run_ray_job
    from ..inference.row_segmenter import RowSegmenter
    from ..models.image_values import checked_bands, checked_range
    from ..training.signals import STOPPED_EXIT_CODE, StopRequested, StopSignals

    if kinds not in (None, frozenset({"parquet"})) or args.compare or args.overlay_format != "png" or args.no_labels:
        raise ValueError("--engine ray writes Parquet only; leave --outputs, --compare and the options of overlays out")
    if args.confidence is not None:
        raise ValueError("--confidence is not for --engine ray, which writes no maps; segment with --engine local")
    value_range, bands = checked_range(args.value_range, "--value-range"), checked_bands(args.bands, "--bands")
    remote = [image for text in args.images if is_remote(text) for image in find_remote(text)]
    files, missing = find_images([text for text in args.images if not is_remote(text)], sys.stdin)
    if not files and not remote:
        raise ValueError(f"no images match {' '.join(args.images)}; name files, folders, or addresses of folders")
    videos = [file.path for file in files if is_video(file.path)]
    if videos:
        raise ValueError(f"{videos[0]}: --engine ray takes no videos; segment them with --engine local and --shard")
    for pattern in missing:
        _say(f"{pattern}: no such image")
    pages = [page for file in files for page in (_pages(file) if shard.has(str(file.relative_path)) else ())]
    images = [RemoteImage.of(page, name) for page, name in zip(pages, _page_names(pages), strict=True)]
    images += [image for image in remote if shard.has(image.name)]

    refuse_missing_models(args.model, args.classifier)
    args.model = str(Path(model).absolute()) if Path(model := model_folder(args.model)).is_dir() else model
    args.classifier = args.classifier and model_folder(args.classifier)
    # On this machine only to check the options, and for what the results depend on.
    here = {"device": "cpu", "dtype": "float32", "quantization": None, "optimize": None}
    segmenter = _load(argparse.Namespace(**{**vars(args), **here}))
    settings = _job_settings(args, segmenter, frozenset({"parquet"}), segmenter.file_settings)
    settings |= {"value_range": value_range, "bands": bands}
    with errors_name_options():
        chosen = _model_settings(args)
    rows = RowSegmenter(args.model, batch_size=args.batch_size, value_range=value_range, bands=bands, **chosen)
    resources = Resources(args.actors, args.gpus_per_actor, args.cpus_per_actor, args.device)
    counts = Counts()
    with StopSignals() as signals, tqdm(total=len(images), unit="image", disable=None) as bar:

        def told(now: Counts, errors: list[str]) -> None:
            vars(counts).update(vars(now))
            bar.update(now.complete + now.done + now.failed - bar.n)
            for error in errors:
                bar.write(_message(error), file=sys.stderr)

        try:
            with signals.interruptible():
                counts = run_ray_job(
                    images,
                    rows,
                    args.output,
                    settings=settings,
                    address=args.address,
                    resources=resources,
                    rows_per_file=args.rows_per_file,
                    resume=args.resume,
                    told=told,
                )
        except (StopRequested, SystemExit):  # Ray ends the process itself at SIGTERM
            _say(f"stopped by {signals.requested or 'SIGTERM'}; the same command goes on with the rest")
            return STOPPED_EXIT_CODE
    already = f" ({counts.complete} of them before)" if counts.complete else ""
    total = len(images) + len(missing)
    print(f"{counts.done + counts.complete} of {total} images segmented{already}; results in {args.output}")
    return 1 if counts.failed or missing else 0


def _pages(file: ImageFile) -> list[ImageFile]:
    """The pages of a file; a JPEG has one, so that millions of them are not opened."""
    from ..inference.input_files import pages_of

    return [file] if file.path.suffix.lower() in (".jpg", ".jpeg", ".bmp") else pages_of(file)


def _page_names(pages: list[ImageFile]) -> list[str]:
    """Names of results, as without a cluster."""
    firsts = [page for page in pages if page.page == 0]
    names = dict(zip(firsts, output_names([page.relative_path for page in firsts]), strict=True))
    return [names[replace(page, page=0)] + (f".page-{page.page + 1}" if page.page else "") for page in pages]


def _kinds(args: argparse.Namespace) -> frozenset[str] | None:
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


def _run_job(
    args: argparse.Namespace,
    job: Job,
    shard: Shard,
    images: list[ImageFile],
    num_missing: int,
    kinds: frozenset[str] | None,
) -> int:
    """Load the model and segment what is not complete."""
    from tqdm import tqdm

    from ..inference.bulk import segment_files, with_pages
    from ..inference.containers import is_video
    from ..inference.exports import Classes, refuse_exports, write_folder_exports
    from ..inference.jobs import rows
    from ..inference.loading import is_fused
    from ..inference.segmented_image import OutputChoice
    from ..models.image_values import checked_bands, checked_range
    from ..training.signals import STOPPED_EXIT_CODE, StopSignals

    value_range, bands = checked_range(args.value_range, "--value-range"), checked_bands(args.bands, "--bands")
    segmenter = _load(args)
    settings = segmenter.file_settings
    settings = replace(settings, value_range=value_range or settings.value_range, bands=bands or settings.bands)
    about = {"model": args.model, "classifier": args.classifier, "threshold": segmenter.default_threshold}
    if is_fused(segmenter.model):
        about["alpha"] = segmenter.model.config.alpha_of(segmenter.task)
    classes = Classes(
        segmenter.id2label, getattr(segmenter.processor, "stuff_classes", None) or segmenter.stuff_classes
    )
    refuse_exports(kinds or (), segmenter.task, classes)
    job.begin(_job_settings(args, segmenter, kinds, settings))
    model_names = args.model if args.classifier is None else f"{args.model} and {args.classifier}"
    print(f"{segmenter.task} segmentation with {model_names} on {segmenter.device_description}", file=sys.stderr)

    # Of all images, so that a shard gives the same names.
    names = output_names([file.relative_path for file in images])
    part = []
    for file, name in zip(images, names, strict=True):
        if not shard.has(str(file.relative_path)):
            continue
        if is_shortened(file.relative_path, name):
            _say(f"{file.path}: its name is too long for results, which are called {name}")
        part.append((file, name))
    counts = _Counts(total=len(part))
    with StopSignals() as signals, tqdm(total=len(part), unit="image", disable=None) as bar:

        def pages_found(file: ImageFile, count: int) -> None:
            counts.total += count - 1
            bar.total = counts.total
            if not is_video(file.path):
                counts.with_pages.append(count)

        def video_broken(error: ValueError) -> None:
            counts.failed += 1
            bar.write(_message(str(error)), file=sys.stderr)

        def remaining() -> Iterator[Any]:
            for work in with_pages(part, pages_found, video_broken, args.every):
                if signals.requested is not None:
                    return  # what is in flight is finished
                if job.is_complete(work.file.source, work.file.version()):
                    counts.complete += 1
                    bar.update()
                else:
                    yield work

        outcomes = segment_files(
            segmenter,
            remaining(),
            args.output,
            about=about,
            choice=OutputChoice(kinds, args.overlay_format, not args.no_labels),
            image_settings=settings,
            job=job,
            compare=args.compare,
            batch_size=args.batch_size,
            workers=args.workers,
            writers=args.writers,
        )
        for outcome in outcomes:
            file = outcome.item.file
            if outcome.error is not None:
                counts.failed += 1
                bar.write(_message(str(outcome.error)), file=sys.stderr)
            else:
                counts.done += 1
                if outcome.value.remark:
                    bar.write(_message(f"{file.path}: {outcome.value.remark}"), file=sys.stderr)
                if outcome.value.changes is not None:
                    bar.write(f"{printable(file.name)}:\n{outcome.value.changes}")
            bar.update()
    for path in write_folder_exports(sorted(kinds or ()), args.output, lambda: rows(args.output), classes):
        print(f"written: {printable(str(path))}", file=sys.stderr)
    if counts.with_pages:
        pages = f"{len(counts.with_pages)} files have {sum(counts.with_pages)} pages"
        print(f"{pages}, which are segmented one by one", file=sys.stderr)
    already = f" ({counts.complete} of them before)" if counts.complete else ""
    segmented = counts.done + counts.complete
    print(f"{segmented} of {counts.total + num_missing} images segmented{already}; results in {args.output}")
    if signals.requested is not None and segmented + counts.failed < counts.total:
        _say(f"stopped by {signals.requested}; the same command goes on with the rest")
        return STOPPED_EXIT_CODE
    return 1 if counts.failed or num_missing else 0


@dataclass
class _Counts:
    """Images of this run: all, complete before it, and done and failed in it."""

    total: int
    complete: int = 0
    done: int = 0
    failed: int = 0
    with_pages: list[int] = field(default_factory=list)  # pages of each file that has several


def _load(args: argparse.Namespace) -> "Segmenter":
    """The model that the options name."""
    from ..inference.devices import pick_device
    from ..inference.loading import is_exported, is_fused
    from ..inference.segmenter import Segmenter

    # An exported model's runtime has devices of its own.
    device = args.device if is_exported(args.model, args.revision) else pick_device(args.device)
    with errors_name_options():
        segmenter = Segmenter.from_pretrained(args.model, device=device, **_model_settings(args))
    num_queries = getattr(segmenter.model.config, "num_queries", None)
    if args.max_segments is not None and num_queries is not None and args.max_segments > num_queries:
        _say(f"the model has {num_queries} queries, which is about the most objects that it can find")
    if args.compare and not is_fused(segmenter.model):
        raise ValueError("--compare shows what a classifier changes; name one with --classifier")
    return segmenter


def _model_settings(args: argparse.Namespace) -> dict[str, Any]:
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


def _job_settings(
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


def _say(text: str) -> None:
    print(_message(text), file=sys.stderr)


def _message(text: str) -> str:
    return f"hf-segvit segment: {printable(text)}"
