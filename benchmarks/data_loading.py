"""Pictures a second from files to training batches, beside torchvision's plain decoding of the same files.

    python benchmarks/data_loading.py [FORMAT:PATH] [--size 640] [--workers 0 1 2]

The data set (default: `coco_train100` in the sample data, see tests/conftest.py) is read, augmented as EoMT is trained
on COCO panoptic, and collated. Plain decoding is `decode_jpeg` of every picture and, in a second row, also
`decode_png` of every panoptic map, which any reader has to do, in workers alike. All take turns. "On device"
leaves normalising and binary masks to the GPU, as training there does.
"""

import argparse
import os
import statistics
import time
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


def pictures_per_second(loader: DataLoader, num_pictures: int) -> float:
    """Of one pass, after the workers have started."""
    iterator = iter(loader)
    first = next(iterator)
    start = time.perf_counter()
    for _ in iterator:
        pass
    counted = num_pictures - (len(first["pixel_values"]) if isinstance(first, dict) else len(first))
    # With workers, what they prepared before the clock started is not free: as many batches wait at most.
    return counted / (time.perf_counter() - start)


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
    pictures = [[row["image"]["member"]] for row in rows]
    both = [[row["image"]["member"], *(place["member"] for place in row["segment_map"])] for row in rows]
    augmented = AugmentedDataset(dataset, augmentation("eomt_coco_panoptic", args.size))
    print(machine())
    print(f"{len(rows)} pictures of {args.data} to {args.size} x {args.size}, batches of 4")
    for workers in args.workers:
        # Several passes over the same pictures, so that starting workers counts little.
        settings = {"num_workers": workers, "batch_size": 4, "persistent_workers": workers > 0}
        loaders = {
            "decoding the pictures": DataLoader(PlainDecoding(pictures), collate_fn=list, **settings),
            "decoding pictures and maps": DataLoader(PlainDecoding(both), collate_fn=list, **settings),
            "ours, whole batches": DataLoader(augmented, collate_fn=MaskCollator(), **settings),
            "ours, finished on device": DataLoader(augmented, collate_fn=MaskCollator(on_device=True), **settings),
        }
        speeds: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(REPEATS):  # taking turns, so that a slower moment of the machine hits all
            for name, loader in loaders.items():
                speeds[name].append(pictures_per_second(loader, len(rows)))
        median = {name: statistics.median(values) for name, values in speeds.items()}
        print(f"{workers} worker{'s' if workers != 1 else ''}")
        for name, values in speeds.items():
            shares = [median[name] / median[plain] for plain in list(loaders)[:2]]
            verdict = f"; budget {BUDGET:.2f} {'met' if shares[0] >= BUDGET else 'MISSED'}" if "ours" in name else ""
            print(
                f"  {name:28s} {median[name]:7.1f} pictures/s [{min(values):.1f}, {max(values):.1f}]  "
                f"{shares[0]:.2f} of decoding pictures, {shares[1]:.2f} of pictures and maps{verdict}",
                flush=True,
            )


if __name__ == "__main__":
    main()
