"""Processor time of a training sample from large photographs with outlines, as labelme stores them.

    python benchmarks/large_photos.py [--size 192] [--photos 8] [--frame 4000 3000]

Photographs of soft colours with a dozen polygons each are written to a temporary folder, read as labelme, and
augmented with the colour changes of EoMT's semantic recipe. "Plain decoding" is torchvision's `decode_jpeg` of the same
files and no more. Medians of the samples; all take turns.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measuring import machine
from PIL import Image
from torchvision.io import ImageReadMode, decode_image, read_file

from hf_segvit.data.augmentation import AugmentedDataset, augmentation
from hf_segvit.data.reading import load_segmentation_dataset

POLYGONS, CORNERS = 12, 40
EPOCHS = 3


def write_photos(folder: Path, count: int, width: int, height: int) -> None:
    """JPEG files with a labelme file beside each."""
    rng = np.random.default_rng(0)
    for index in range(count):
        small = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(
            folder / f"{index}.jpg", quality=90
        )
        shapes = []
        for number in range(POLYGONS):
            angles = np.sort(rng.random(CORNERS)) * 2 * np.pi
            radii = rng.uniform(0.05, 0.25) * height * rng.uniform(0.7, 1, CORNERS)
            center = rng.random(2) * (width, height)
            points = np.clip(
                np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None] + center, 0, (width, height)
            )
            shapes.append({"label": f"class {number % 4}", "points": points.tolist(), "shape_type": "polygon"})
        content = {"version": "5.0.1", "shapes": shapes, "imagePath": f"{index}.jpg", "imageData": None}
        text = json.dumps({**content, "imageHeight": height, "imageWidth": width})
        (folder / f"{index}.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--frame", type=int, nargs=2, default=[4000, 3000], metavar=("WIDTH", "HEIGHT"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        write_photos(folder, args.photos, *args.frame)
        files = sorted(map(str, folder.glob("*.jpg")))
        print(machine())
        print(f"{args.photos} photos of {' x '.join(map(str, args.frame))}, crops of {args.size}, {POLYGONS} polygons")
        for task in ("semantic", "panoptic", "instance"):
            dataset = load_segmentation_dataset(f"labelme:{folder}", task=task)
            colored = augmentation("eomt_ade20k_panoptic", args.size)
            sets = {
                "without colour changes": AugmentedDataset(dataset, augmentation("eomt_coco_panoptic", args.size)),
                "with colour changes": AugmentedDataset(dataset, colored),
                "with colour changes, cached": AugmentedDataset(dataset, colored, cache=folder / "cache"),
            }
            times: dict[str, list[float]] = {name: [] for name in ("plain decoding", *sets)}
            for epoch in range(EPOCHS):
                for index, file in enumerate(files):
                    start = time.process_time()
                    decode_image(read_file(file), ImageReadMode.RGB)
                    times["plain decoding"].append(time.process_time() - start)
                    for name, samples in sets.items():
                        start = time.process_time()
                        samples[epoch, index]
                        times[name].append(time.process_time() - start)
            for name, values in times.items():
                median, mean = statistics.median(values), statistics.fmean(values)
                print(f"  {task}: {name:28s} median {median:.3f} s, mean {mean:.3f} s, longest {max(values):.3f} s")


if __name__ == "__main__":
    main()
