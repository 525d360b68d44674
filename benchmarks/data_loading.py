"""Images per second from files to training batches, compared with torchvision's plain decoding of the files.

    python benchmarks/data_loading.py [FORMAT:PATH] [--size 640] [--workers 0 1 2]

The data set (default: `coco_train100` in the sample data, see tests/conftest.py) is read, augmented as EoMT is trained
on COCO panoptic, and collated. Plain decoding is `decode_jpeg` of every image and, in a second row, also
`decode_png` of every panoptic map, which any reader without a cache has to do, in workers alike. All take turns. "On
device" leaves normalising and binary masks to the GPU, as training there does, "scaled there" also the scaling of
images. "Cached" reads id maps from a cache folder, as every epoch but the first does. Images a second are by the
clock; on a machine that others use too, the processor time of an image, which is measured in one process without
workers, is the steadier measure.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import machine
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image, read_file

from hf_segvit.data.augmentation import AugmentedDataset, augmentation
from hf_segvit.data.collation import MaskCollator
from hf_segvit.data.reading import load_segmentation_dataset, metadata

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 0.6
REPEATS = 3


class PlainDecoding(Dataset):
    """Files, each decoded and no more."""

    def __init__(self, files: list[list[str]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> int:
        return sum(decode_image(read_file(file), ImageReadMode.RGB).shape[0] for file in self.files[index])


def images_per_second(loader: DataLoader, num_images: int) -> float:
    """Images per second of one pass, after the workers have started."""
    iterator = iter(loader)
    first = next(iterator)
    start = time.perf_counter()
    for _ in iterator:
        pass
    counted = num_images - (len(first["class_labels"]) if isinstance(first, dict) else len(first))
    # With workers, what they prepared before the clock started is not free: as many batches wait at most.
    return counted / (time.perf_counter() - start)


def milliseconds_per_image(loader: DataLoader, num_images: int) -> float:
    """Processor time of one pass without workers."""
    start = time.process_time()
    for _ in loader:
        pass
    return 1e3 * (time.process_time() - start) / num_images


def loaders_of(datasets: dict[str, tuple[Dataset, object]], workers: int) -> dict[str, DataLoader]:
    settings = {"num_workers": workers, "batch_size": 4, "persistent_workers": workers > 0}
    return {name: DataLoader(dataset, collate_fn=collate, **settings) for name, (dataset, collate) in datasets.items()}


def main() -> None:
    sample = Path(os.environ.get("HF_SEGVIT_SAMPLE_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="?", default=f"coco:{sample / 'coco_train100'}")
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)

    dataset = load_segmentation_dataset(args.data, split="train", task="panoptic")
    rows = list(metadata(dataset))
    images = [[row["image"]["member"]] for row in rows]
    both = [[row["image"]["member"], *(place["member"] for place in row["segment_map"])] for row in rows]
    with tempfile.TemporaryDirectory() as cache:
        augment = augmentation("eomt_coco_panoptic", args.size)
        plain, cached = AugmentedDataset(dataset, augment), AugmentedDataset(dataset, augment, cache=cache)
        later = AugmentedDataset(dataset, augmentation("eomt_coco_panoptic", args.size, scale_later=True), cache=cache)
        on_device = MaskCollator(on_device=True)
        datasets = {
            "decoding the images": (PlainDecoding(images), list),
            "decoding images and maps": (PlainDecoding(both), list),
            "ours, whole batches": (plain, MaskCollator()),
            "ours, finished on device": (plain, on_device),
            "ours, cached, finished on device": (cached, on_device),
            "ours, cached, scaled there": (later, on_device),
        }
        for index in range(len(cached)):  # fills the cache
            cached[index]
        print(machine())
        print(f"{len(rows)} images of {args.data} to {args.size} x {args.size}, batches of 4")
        loaders = loaders_of(datasets, workers=0)
        print("processor time an image, in one process")
        report({name: lambda one=one: milliseconds_per_image(one, len(rows)) for name, one in loaders.items()}, "ms")
        for workers in args.workers:
            loaders = loaders_of(datasets, workers)
            print(f"by the clock, {workers} worker{'s' if workers != 1 else ''}")
            measures = {name: lambda one=one: images_per_second(one, len(rows)) for name, one in loaders.items()}
            report(measures, "images/s")


def report(measures: dict[str, Callable[[], float]], unit: str) -> None:
    """Measure all in turns, so that a slower moment of the machine hits each, and print medians with ratios."""
    values: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(REPEATS):
        for name, measure in measures.items():
            values[name].append(measure())
    median = {name: statistics.median(row) for name, row in values.items()}
    baselines = list(measures)[:2]
    for name, row in values.items():
        # Of speeds, ours over theirs; of times, theirs over ours.
        shares = [median[name] / median[other] for other in baselines]
        shares = [1 / share for share in shares] if unit == "ms" else shares
        verdict = f"; budget {BUDGET:.2f} {'met' if shares[0] >= BUDGET else 'MISSED'}" if "ours" in name else ""
        print(
            f"  {name:33s} {median[name]:7.2f} {unit} [{min(row):.2f}, {max(row):.2f}]  "
            f"{shares[0]:.2f} of the speed of decoding images, {shares[1]:.2f} of images and maps{verdict}",
            flush=True,
        )


if __name__ == "__main__":
    main()
