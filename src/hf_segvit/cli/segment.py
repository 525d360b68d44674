"""`hf-segvit segment`: images in, overlays and segment lists out.

Checks come in the order of what they cost the user: arguments, images, output folder, device, model. An image that
cannot be read is reported, and the others are segmented. With `--classifier` a ViT-P corrects the labels of any
generator's masks; `--compare` shows and lists what it changed.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_files import prepare_output_folder
from ..inference.input_files import IMAGE_SUFFIXES, ImageFile, find_images, is_shortened, output_names, pages_of
from ..lookup import printable
from ..models.published_labels import TASKS
from .model_options import (
    add_classifier_options,
    add_dtype_option,
    add_model_options,
    add_optimize_option,
    add_pixel_limit,
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
    from PIL.Image import Image

    from ..inference.segmenter import SegmentedImage, Segmenter


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
        epilog="Exit code 0: all images; 1: some could not be segmented; 2: stopped, the message says why.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders, or globs in quotes")
    add_model_options(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the results")
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
        "--font",
        type=Path,
        metavar="FILE",
        help="font for class names in the overlays; default: one that has the letters",
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images at a time (default 1)")
    add_dtype_option(parser)
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Segment the images; 1 if an image could not be segmented."""
    check_minimum(args, batch_size=1, max_segments=1, threads=1)
    check_model_options(args)
    apply_pixel_limit(args)
    images, missing = find_images(args.images)
    if not images:
        raise ValueError(
            f"no images match {' '.join(missing)}; name files, quoted globs, or folders with files that end in "
            f"{', '.join(IMAGE_SUFFIXES)}"
        )
    for pattern in missing:
        print(_message(f"{pattern}: no such image"), file=sys.stderr)

    prepare_output_folder(args.output)
    refuse_missing_models(args.model, args.classifier)
    args.model = model_folder(args.model)
    args.classifier = args.classifier and model_folder(args.classifier)
    if args.font is not None:
        from ..drawing.fonts import use_font

        use_font(args.font)

    from tqdm import tqdm

    from ..inference.devices import pick_device
    from ..inference.loading import is_exported, is_fused
    from ..inference.output_files import OccupiedName, changes_text, label_changes, remark, write_segment_files
    from ..inference.segmenter import Segmenter
    from ..models.image_decoding import image_size
    from ..models.image_values import checked_bands, checked_range

    value_range, bands = checked_range(args.value_range, "--value-range"), checked_bands(args.bands, "--bands")
    views = views_of(args)
    # An exported model's runtime has devices of its own.
    device = args.device if is_exported(args.model, args.revision) else pick_device(args.device)
    with errors_name_options():
        segmenter = Segmenter.from_pretrained(
            args.model,
            task=args.task,
            device=device,
            revision=args.revision,
            dtype=args.dtype,
            optimize=optimize_switches(args.optimize),
            threshold=args.threshold,
            views=views,
            classifier=args.classifier,
            alpha=args.alpha,
            label_mismatch=args.label_mismatch,
            token_merging=args.token_merging,
            max_segments=args.max_segments,
            **runtime_options(args),
        )
    num_queries = getattr(segmenter.model.config, "num_queries", None)
    if args.max_segments is not None and num_queries is not None and args.max_segments > num_queries:
        print(
            _message(f"the model has {num_queries} queries, which is about the most objects that it can find"),
            file=sys.stderr,
        )
    fused = is_fused(segmenter.model)
    if args.compare and not fused:
        raise ValueError("--compare shows what a classifier changes; name one with --classifier")
    model_names = args.model if args.classifier is None else f"{args.model} and {args.classifier}"
    print(f"{segmenter.task} segmentation with {model_names} on {segmenter.device_description}", file=sys.stderr)

    header = {"model": args.model, "classifier": args.classifier, "threshold": segmenter.default_threshold}
    if fused:
        header["alpha"] = segmenter.model.config.alpha_of(segmenter.task)
    names = output_names([file.relative_path for file in images])
    for file, name in zip(images, names, strict=True):
        if is_shortened(file.relative_path, name):
            print(_message(f"{file.path}: its name is too long for results, which are called {name}"), file=sys.stderr)
    pages, prefixes = list[ImageFile](), dict[ImageFile, Path]()
    for file, name in zip(images, names, strict=True):
        for page in pages_of(file):
            prefixes[page] = args.output / (f"{name}.page-{page.page + 1}" if page.page else name)
            pages.append(page)
    if len(pages) > len(images):
        print(f"{len(images)} files have {len(pages)} pages, which are segmented one by one", file=sys.stderr)
    images = pages
    settings = segmenter.file_settings
    settings = replace(settings, value_range=value_range or settings.value_range, bands=bands or settings.bands)
    failures = 0
    with tqdm(total=len(images), unit="image", disable=None) as bar, ThreadPoolExecutor(max_workers=4) as pool:
        for batch, errors in _batches(images, args.batch_size, pool, settings):
            answers, refusals = _segment(segmenter, batch, args.compare)
            # In threads, as compressing the PNGs is slow and releases the GIL.
            written = []
            for file, image, answer, original in answers:
                facts = {**header, "picture": file.name}
                files = (prefixes[file], image, answer, segmenter.id2label, facts, original)
                written.append((file, pool.submit(write_segment_files, *files)))
                if text := remark(answer, segmenter.default_threshold):
                    bar.write(_message(f"{file.path}: {text}"), file=sys.stderr)
                if original is not None:
                    text = changes_text(label_changes(original, answer), math.prod(image_size(image)))
                    bar.write(f"{printable(file.name)}:\n{text}")
            refusals += errors
            for file, writing in written:
                try:
                    writing.result()  # raises what would go wrong for all, such as a full disk
                except OccupiedName as error:
                    refusals.append(f"{file.name}: {error}")
                except MemoryError:
                    refusals.append(_no_memory(file))
            for refusal in refusals:
                bar.write(_message(refusal), file=sys.stderr)
            failures += len(refusals)
            bar.update(len(batch) + len(errors))
    print(f"{len(images) - failures} of {len(images) + len(missing)} images segmented; results in {args.output}")
    return 1 if failures or missing else 0


def _batches(
    files: Sequence[ImageFile], batch_size: int, pool: ThreadPoolExecutor, settings: Any
) -> Iterator[tuple[list[tuple[ImageFile, "Image"]], list[str]]]:
    """Batches of images, with errors of those that cannot be read; the next batch is decoded meanwhile."""
    from ..models.image_claims import FREE_FOR_INFERENCE
    from ..models.image_decoding import open_image

    chunks = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]

    def submit(file: ImageFile) -> Any:
        return pool.submit(open_image, file.path, file.name, settings, file.page, FREE_FOR_INFERENCE)

    ahead = [submit(file) for file in chunks[0]]
    for index, chunk in enumerate(chunks):
        reading, following = ahead, chunks[index + 1 : index + 2]
        # Submitted before the yield, so that it runs while the caller works on this batch.
        ahead = [submit(file) for files in following for file in files]
        batch, errors = [], []
        for file, image in zip(chunk, reading, strict=True):
            try:
                batch.append((file, image.result()))
            except ValueError as error:
                errors.append(str(error))
            except MemoryError:
                errors.append(_no_memory(file))
        yield batch, errors


def _segment(
    segmenter: "Segmenter", batch: Sequence[tuple[ImageFile, "Image"]], compare: bool
) -> tuple[list[tuple[ImageFile, "Image", "SegmentedImage", "SegmentedImage | None"]], list[str]]:
    """Answers for a batch, and errors of images that the model cannot take, such as extremely long ones.

    The last of each answer is the generator's own result, if that is to be compared.
    """
    from ..inference.memory import is_out_of_memory

    images = [image for _, image in batch]
    originals: Sequence[SegmentedImage | None] = [None] * len(batch)
    try:
        if compare:
            originals, answers = (list(side) for side in zip(*segmenter.compare(images), strict=True))
        else:
            answers = segmenter(images)
    except (ValueError, MemoryError, RuntimeError) as error:
        is_memory = is_out_of_memory(error)
        if not is_memory and not isinstance(error, ValueError):
            raise
        if len(batch) == 1:
            return [], [_no_memory(batch[0][0], segmenter) if is_memory else f"{batch[0][0].name}: {error}"]
        # One bad image must not cost the others of its batch.
        singly = [_segment(segmenter, [pair], compare) for pair in batch]
        return [row for rows, _ in singly for row in rows], [error for _, errors in singly for error in errors]
    return [(*pair, answer, original) for pair, answer, original in zip(batch, answers, originals, strict=True)], []


def _no_memory(file: ImageFile, segmenter: "Segmenter | None" = None) -> str:
    where = "" if segmenter is None else f" of {segmenter.device}"
    remedy = "" if segmenter is None or segmenter.device.type == "cpu" else ", try --dtype bfloat16 or --device cpu"
    return f"{file.name}: the memory{where} does not suffice for it; scale it down, cut it into pieces{remedy}"


def _message(text: str) -> str:
    return f"hf-segvit segment: {printable(text)}"
