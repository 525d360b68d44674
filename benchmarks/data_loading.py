"""Images per second from files to training batches, compared with torchvision's plain decoding of the files.

    python benchmarks/data_loading.py [FORMAT:PATH] [--size 640] [--workers 0 1 2]

The data set (default: `coco_train100` in the sample data, see tests/conftest.py) is read, augmented as EoMT is trained
on COCO panoptic, and collated. Plain decoding is `decode_jpeg` of every image and, in a second row, also
`decode_png` of every panoptic map, which any reader without a cache has to do, in workers alike. All take turns. "On
device" leaves normalising and binary masks to the GPU, as training there does, "scaled there" also the scaling of
images. "Cached" reads id maps from a cache folder, as every epoch but the first does. With workers, ours come
through `TrainingLoader`, as in training. Images a second are by the clock; on a machine that others use too, the
processor time of an image, of this process and its workers together, is the steadier measure.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from measuring import machine
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image, read_file

from hf_segvit.data.augmentation import AugmentedDataset, augmentation
from hf_segvit.data.collation import MaskCollator
from hf_segvit.data.reading import load_segmentation_dataset, metadata
from hf_segvit.training.data_order import StepOrder, TrainingLoader

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 0.6
REPEATS = 3
BATCH_SIZE = 4


class PlainDecoding(Dataset):
    """Files, each decoded and no more."""

    def __init__(self, files: list[list[str]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> int:
        return sum(decode_image(read_file(file), ImageReadMode.RGB).shape[0] for file in self.files[index])


class KeyedFiles:
    """Files by epoch and index, as `TrainingLoader` asks for them."""

    def __init__(self, files: PlainDecoding) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> int:
        return self.files[key[1]]

    def name(self, index: int) -> str:
        return str(self.files.files[index])


def pass_with_workers(loader: DataLoader | TrainingLoader, num_images: int) -> tuple[float, float]:
    """Images per second and processor milliseconds per image of one pass, after the workers have started."""
    iterator = iter(loader)
    next(iterator)
    start, used = time.perf_counter(), processor_seconds()
    for _ in range(num_images // BATCH_SIZE - 1):
        next(iterator)
    # With workers, what they prepared before the clock started is not free: as many batches wait at most.
    counted = num_images // BATCH_SIZE * BATCH_SIZE - BATCH_SIZE
    return counted / (time.perf_counter() - start), 1e3 * (processor_seconds() - used) / counted


def processor_seconds() -> float:
    """Processor time of this process and its workers so far."""
    processes = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children() if worker.pid)]
    return sum(sum(psutil.Process(process).cpu_times()[:2]) for process in processes)


def milliseconds_per_image(loader: DataLoader, num_images: int) -> float:
    """Processor time of one pass without workers."""
    start = time.process_time()
    for _ in loader:
        pass
    return 1e3 * (time.process_time() - start) / num_images


def loaders_of(datasets: dict[str, tuple[Dataset, Any]], workers: int) -> dict[str, Any]:
    """A loader of each; with workers, each goes over its data for as long as it is asked."""

    def loader(dataset: Any, collate: Any) -> Any:
        if not workers:
            return DataLoader(dataset, batch_size=BATCH_SIZE, collate_fn=collate)
        keys = dataset if isinstance(dataset, AugmentedDataset) else KeyedFiles(dataset)
        order = StepOrder(len(dataset), BATCH_SIZE, seed=0)
        return TrainingLoader(keys, order, collate, start_step=0, total_steps=10**6, num_workers=workers)

    return {name: loader(*one) for name, one in datasets.items()}


def main() -> None:
    sample = Path(os.environ.get("HF_SEGVIT_SAMPLE_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="?", default=f"coco:{sample / 'coco_train100'}")
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--images", type=int, default=400, help="of each pass with workers")
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
            print(f"{workers} worker{'s' if workers != 1 else ''}: by the clock, and processor time an image")
            report_with_workers(loaders, args.images)


def report_with_workers(loaders: dict[str, Any], num_images: int) -> None:
    """Measure all in turns, and print both measures."""
    values: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for _ in range(REPEATS):
        for name, loader in loaders.items():
            values[name].append(pass_with_workers(loader, num_images))
    print_shares({name: [speed for speed, _ in row] for name, row in values.items()}, "images/s")
    print_shares({name: [used for _, used in row] for name, row in values.items()}, "ms")


def report(measures: dict[str, Callable[[], float]], unit: str) -> None:
    """Measure all in turns, so that a slower moment of the machine hits each, and print medians with ratios."""
    values: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(REPEATS):
        for name, measure in measures.items():
            values[name].append(measure())
    print_shares(values, unit)


def print_shares(values: dict[str, list[float]], unit: str) -> None:
    """Print medians with their shares of the speed of plain decoding."""
    median = {name: statistics.median(row) for name, row in values.items()}
    baselines = list(values)[:2]
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
