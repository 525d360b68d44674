"""Segmenting folders: the pipeline compared with its parts and with one image after the other.

    python benchmarks/bulk.py [--images 60] [--repeats 3] [--threads 2] [--memory 20000]

COCO-sized images (480 x 640, JPEG) and the logits of post_processing.py's "typical" scene: 200 queries, 30 of which
are confident, of 133 classes, at 640 pixels. Three lines, each with its budget:

- with a model that takes its time (a small EoMT at 640): seconds an image of the whole command's work over those of
  model and post-processing alone;
- with a stand-in that returns fixed logits in no time: seconds an image over those of the command before it was a
  pipeline, which decoded the next image and wrote the last one's files in threads, but waited for them;
- the growth of memory from the first tenth of many small images to the last.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from measuring import PeakResidentMemory, machine, report
from PIL import Image
from post_processing import CLASSES, QUERIES, SIDE, scene

from hf_segvit import EoMTConfig, EoMTForUniversalSegmentation, EoMTImageProcessor, Segmenter
from hf_segvit.data.mask_files import panoptic_png
from hf_segvit.inference.bulk import Work, segment_files
from hf_segvit.inference.input_files import find_images
from hf_segvit.inference.jobs import Job
from hf_segvit.inference.segmented_image import OutputChoice
from hf_segvit.models.image_decoding import open_image


class StandIn(torch.nn.Module):
    """A model that returns the same logits for each image, in no time."""

    def __init__(self, config: EoMTConfig, logits: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        self.config, self.logits = config, logits

    def forward(self, pixel_values: torch.Tensor, **_: object) -> SimpleNamespace:
        count = len(pixel_values)
        classes, masks = (each.expand(count, *each.shape[1:]) for each in self.logits)
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks, patch_offsets=None)


def configuration(hidden: int) -> EoMTConfig:
    return EoMTConfig(
        hidden_size=hidden,
        num_hidden_layers=4,
        num_attention_heads=hidden // 32,
        intermediate_size=4 * hidden,
        patch_size=16,
        image_size=SIDE,
        num_queries=QUERIES,
        num_query_layers=1,
        id2label={index: f"class {index}" for index in range(CLASSES)},
    )


def write_images(folder: Path, count: int, size: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    for index in range(count):
        coarse = generator.integers(0, 256, (size[0] // 16, size[1] // 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        image.save(folder / f"{index:06}.jpg", quality=90)


def pipeline(segmenter: Segmenter, images: Path, choice: OutputChoice | None = None) -> float:
    """Seconds an image of all that the command does once the model is loaded."""
    found, _ = find_images([str(images)])
    with tempfile.TemporaryDirectory() as output, Job(Path(output)) as job:
        job.begin({})
        start = time.perf_counter()
        work = (Work(file, file.relative_path.stem) for file in found)
        outcomes = segment_files(
            segmenter,
            work,
            Path(output),
            about={"model": "benchmark", "threshold": 0.5},
            choice=choice or OutputChoice(),
            image_settings=segmenter.file_settings,
            job=job,
        )
        for outcome in outcomes:
            assert outcome.error is None, outcome.error
        return (time.perf_counter() - start) / len(found)


def one_after_the_other(segmenter: Segmenter, images: Path) -> float:
    """Seconds an image of the command as it was: the next image is decoded meanwhile, files are waited for."""
    found, _ = find_images([str(images)])

    def write(prefix: Path, image: Image.Image, answer: object) -> None:
        answer.plot(image).save(f"{prefix}.overlay.png")  # type: ignore[attr-defined]
        panoptic_png(np.maximum(answer.segment_map, 0) - 1, f"{prefix}.panoptic.png")  # type: ignore[attr-defined]
        answer.save(prefix, choice=OutputChoice(frozenset({"json"})))  # type: ignore[attr-defined]

    with tempfile.TemporaryDirectory() as output, ThreadPoolExecutor(4) as pool:
        start = time.perf_counter()
        ahead = pool.submit(open_image, found[0].path)
        for index, file in enumerate(found):
            image = ahead.result()
            if index + 1 < len(found):
                ahead = pool.submit(open_image, found[index + 1].path)
            [answer] = segmenter([image])
            pool.submit(write, Path(output) / file.relative_path.stem, image, answer).result()
        return (time.perf_counter() - start) / len(found)


def model_alone(segmenter: Segmenter, images: Path) -> float:
    """Seconds an image of model and post-processing, on inputs that are ready."""
    found, _ = find_images([str(images)])
    seconds = 0.0
    with torch.inference_mode():
        for file in found:
            for asked in segmenter.prepare([open_image(file.path)]):
                start = time.perf_counter()
                segmenter.results(segmenter.infer(asked, 0.5), 0.5)
                seconds += time.perf_counter() - start
    return seconds / len(found)


def in_turns(ours: Callable[[], float], theirs: Callable[[], float], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds an image of both, in turns, so that other work on the machine meets both alike."""
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=int, default=0, metavar="N", help="also measure memory over N small images")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine())
    torch.manual_seed(0)
    logits = scene(30, (480, 640))
    processor = EoMTImageProcessor(task="panoptic", size=SIDE, threshold=0.5, stuff_classes=list(range(80, CLASSES)))
    stand_in = Segmenter(StandIn(configuration(64), logits), processor, device="cpu")
    model = EoMTForUniversalSegmentation(configuration(192))
    forward = model.forward

    def timed(**inputs: object) -> SimpleNamespace:  # the model's time, and answers like those of a trained one
        forward(**inputs)
        return stand_in.model(**inputs)

    model.forward = timed  # type: ignore[method-assign]
    slow = Segmenter(model, processor, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder)
        write_images(images, args.images, (480, 640))
        pipeline(stand_in, images), model_alone(slow, images)
        report(
            "whole command and model with post-processing",
            *in_turns(lambda: pipeline(slow, images), lambda: model_alone(slow, images), args.repeats),
            1.15,
        )
        for name, choice in (
            ("all outputs as PNG", OutputChoice()),
            ("overlays as JPEG", OutputChoice(overlay_format="jpg")),
            ("without overlays", OutputChoice(frozenset({"json", "panoptic"}))),
        ):
            report(
                f"stand-in, {name}",
                *in_turns(
                    lambda choice=choice: pipeline(stand_in, images, choice),  # type: ignore[misc]
                    lambda: one_after_the_other(stand_in, images),
                    args.repeats,
                ),
                1 / 3,
            )
    if args.memory:
        tiny = EoMTImageProcessor(task="panoptic", size=64, threshold=0.5)
        segmenter = Segmenter(StandIn(configuration(64), scene(30, (480, 640))), tiny, device="cpu")
        with tempfile.TemporaryDirectory() as folder:
            images, choice = Path(folder), OutputChoice(frozenset({"json"}))
            write_images(images, args.memory // 10, (64, 64))
            with PeakResidentMemory() as first:
                pipeline(segmenter, images, choice)
            write_images(images, args.memory, (64, 64))
            with PeakResidentMemory() as rest:
                pipeline(segmenter, images, choice)
            print(
                f"memory: {first.mebibytes:.0f} MiB over {args.memory // 10} images, {rest.mebibytes:.0f} MiB more "
                f"over {args.memory}"
            )


if __name__ == "__main__":
    main()
