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
from typing import Any

from ..atomic_files import prepare_output_folder
from ..inference.input_files import IMAGE_SUFFIXES, ImageFile, find_images, is_shortened, output_names
from ..inference.jobs import Job, Shard
from ..lookup import printable
from .model_options import (
    apply_pixel_limit,
    check_minimum,
    check_model_options,
    model_folder,
    refuse_missing_models,
)
from .segment_on_ray import run_on_ray
from .segment_options import (
    add_segment_options,
    job_settings,
    kinds_of,
    load_segmenter,
    message,
    refuse_cluster_options,
    say,
)


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "segment",
        help="segment images",
        description=(
            "Segment images. For each one writes NAME.overlay.png, NAME.segments.json and, by task, "
            "NAME.panoptic.png (COCO's encoding) or NAME.semantic.png (class ids, with a palette). NAME is the image's "
            "name without its ending, or with it if two images differ in nothing else; folders below a named folder "
            "are kept. Later pages of a TIFF or an animation are NAME.page-2 and so on."
        ),
        epilog=(
            "Exit code 0: all images; 1: some could not be segmented; 2: stopped, the message says why; 75: stopped by "
            "Ctrl-C or SIGTERM, and the same command goes on."
        ),
    )
    add_segment_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Segment the images; 1 if an image could not be segmented."""
    check_minimum(args, batch_size=1, max_segments=1, threads=1, workers=1, writers=1, every=1)
    check_minimum(args, actors=1, cpus_per_actor=1, rows_per_file=1)
    check_model_options(args)
    apply_pixel_limit(args)
    kinds, shard = kinds_of(args), Shard() if args.shard is None else Shard.parse(args.shard)
    if args.engine == "ray":
        return run_on_ray(args, shard, kinds)
    refuse_cluster_options(args)
    args.output = Path(args.output)
    images, missing = find_images(args.images, sys.stdin)
    if not images:
        raise ValueError(
            f"no images match {' '.join(missing)}; name files, quoted globs, or folders with files that end in "
            f"{', '.join(IMAGE_SUFFIXES)}"
        )
    for pattern in missing:
        say(f"{pattern}: no such image")

    prepare_output_folder(args.output)
    refuse_missing_models(args.model, args.classifier)
    args.model = model_folder(args.model)
    args.classifier = args.classifier and model_folder(args.classifier)
    if args.font is not None:
        from ..drawing.fonts import use_font

        use_font(args.font)
    with Job(args.output, shard, args.resume) as job:
        return _run_job(args, job, shard, images, len(missing), kinds)


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
    segmenter = load_segmenter(args)
    settings = segmenter.file_settings
    settings = replace(settings, value_range=value_range or settings.value_range, bands=bands or settings.bands)
    about = {"model": args.model, "classifier": args.classifier, "threshold": segmenter.default_threshold}
    if is_fused(segmenter.model):
        about["alpha"] = segmenter.model.config.alpha_of(segmenter.task)
    classes = Classes(
        segmenter.id2label, getattr(segmenter.processor, "stuff_classes", None) or segmenter.stuff_classes
    )
    refuse_exports(kinds or (), segmenter.task, classes)
    job.begin(job_settings(args, segmenter, kinds, settings))
    model_names = args.model if args.classifier is None else f"{args.model} and {args.classifier}"
    print(f"{segmenter.task} segmentation with {model_names} on {segmenter.device_description}", file=sys.stderr)

    # Of all images, so that a shard gives the same names.
    names = output_names([file.relative_path for file in images])
    part = []
    for file, name in zip(images, names, strict=True):
        if not shard.has(str(file.relative_path)):
            continue
        if is_shortened(file.relative_path, name):
            say(f"{file.path}: its name is too long for results, which are called {name}")
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
            bar.write(message(str(error)), file=sys.stderr)

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
                bar.write(message(str(outcome.error)), file=sys.stderr)
            else:
                counts.done += 1
                if outcome.value.remark:
                    bar.write(message(f"{file.path}: {outcome.value.remark}"), file=sys.stderr)
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
        say(f"stopped by {signals.requested}; the same command goes on with the rest")
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
