"""`hf-segvit segment --engine ray`: the images of a job on a Ray cluster."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from ..inference.input_files import ImageFile, find_images, output_names
from ..inference.jobs import Shard
from .model_options import errors_name_options, model_folder, refuse_missing_models
from .segment_options import job_settings, load_segmenter, message, model_settings, say


def run_on_ray(args: argparse.Namespace, shard: Shard, kinds: frozenset[str] | None) -> int:
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
        say(f"{pattern}: no such image")
    pages = [page for file in files for page in (_pages(file) if shard.has(str(file.relative_path)) else ())]
    images = [RemoteImage.of(page, name) for page, name in zip(pages, _page_names(pages), strict=True)]
    images += [image for image in remote if shard.has(image.name)]

    refuse_missing_models(args.model, args.classifier)
    args.model = str(Path(model).absolute()) if Path(model := model_folder(args.model)).is_dir() else model
    args.classifier = args.classifier and model_folder(args.classifier)
    # On this machine only to check the options, and for what the results depend on.
    here = {"device": "cpu", "dtype": "float32", "quantization": None, "optimize": None}
    segmenter = load_segmenter(argparse.Namespace(**{**vars(args), **here}))
    settings = job_settings(args, segmenter, frozenset({"parquet"}), segmenter.file_settings)
    settings |= {"value_range": value_range, "bands": bands}
    with errors_name_options():
        chosen = model_settings(args)
    rows = RowSegmenter(args.model, batch_size=args.batch_size, value_range=value_range, bands=bands, **chosen)
    resources = Resources(args.actors, args.gpus_per_actor, args.cpus_per_actor, args.device)
    counts = Counts()
    with StopSignals() as signals, tqdm(total=len(images), unit="image", disable=None) as bar:

        def told(now: Counts, errors: list[str]) -> None:
            vars(counts).update(vars(now))
            bar.update(now.complete + now.done + now.failed - bar.n)
            for error in errors:
                bar.write(message(error), file=sys.stderr)

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
            say(f"stopped by {signals.requested or 'SIGTERM'}; the same command goes on with the rest")
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
