"""CamVid for the benchmark: frames, two splits, baselines that learn nothing, and training crops.

- `read_split`: the frames of one of `SPLITS`, for training and for scoring.
- `floors`: mIoU of two predictors that see at most a thumbnail. A model has learned what it scores above them.
- `TrainingCrops`: endless batches, the same for every model with one seed.

The official validation frames come from a drive that training frames come from too, a few seconds apart; in split
`drive` no frame of the drive that is scored was seen. H W pixels, N frames.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_segvit.data.augmentation import AugmentedDataset, AugmentedSample, augmentation
from hf_segvit.data.reading import load_segmentation_dataset
from hf_segvit.metrics.mean_iou import MeanIoU

LABELS = dict(
    enumerate("Sky Building Pole Road Pavement Tree SignSymbol Fence Car Pedestrian Bicyclist".split())  # noqa: SIM905
)
VOID = 11  # in the files; -1 once read
SPLITS = {
    "official": "the official one: 367 frames to train, 101 of drive 0016E5 to score",
    "drive": "drive 0006R0 is left out of training and scored: 266 frames to train, 101 to score",
}
DRIVE = "0006R0"

# Frames are 480 x 360. Models see them at (height, width) INPUT, a compromise: ten minutes of one core
# are to be thousands of crops.
INPUT = (144, 192)
SCALES = (0.5, 2.0)  # of training crops, which have that size too: at scale 1 they are whole frames
THUMBNAIL = (40, 30)  # (width, height) at which the nearest training frame is looked for


@dataclass
class Frame:
    """One frame: `image` as it is on the disk, `labels` (H, W) int16, -1 void."""

    name: str
    image: Image.Image
    labels: np.ndarray


def read_split(folder: Any, split: str) -> tuple[list[Frame], list[Frame]]:
    """Frames to train on, and frames to score.

    Args:
        folder: with `images/{train,val}` and `annotations/{train,val}`.
        split: one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
    train = _read(folder, "train")
    if split == "official":
        return train, _read(folder, "val")
    return (
        [frame for frame in train if not frame.name.startswith(DRIVE)],
        [frame for frame in train if frame.name.startswith(DRIVE)],
    )


def _read(folder: Any, part: str) -> list[Frame]:
    dataset = load_segmentation_dataset(f"mask_folder:{folder}", split=part, classes={**LABELS, VOID: "void"})
    return [
        Frame(str(entry["image_id"]), entry["image"], np.asarray(entry["segment_map"], dtype=np.int16))
        for entry in (dataset[index] for index in range(len(dataset)))
    ]


def mean_iou(predictions: Sequence[Any], frames: Sequence[Frame]) -> dict[str, Any]:
    """`MeanIoU` of label maps (H, W), counted over all frames; void is not counted."""
    metric = MeanIoU(len(LABELS))
    metric.add_batch(
        predictions=predictions,
        references=[frame.labels for frame in frames],
        image_ids=[frame.name for frame in frames],
    )
    return metric.compute()


def floors(train: Sequence[Frame], score: Sequence[Frame]) -> dict[str, float]:
    """mIoU of copying the labels of the most similar training frame, and of the most frequent class of each pixel."""
    nearest = nearest_frames([frame.image for frame in train], [frame.image for frame in score])
    prior = position_prior([frame.labels for frame in train])
    return {
        "labels of the nearest training frame": mean_iou([train[i].labels for i in nearest], score)["mean_iou"],
        "commonest class of each position": mean_iou([prior] * len(score), score)["mean_iou"],
    }


def nearest_frames(train: Sequence[Image.Image], score: Sequence[Image.Image]) -> list[int]:
    """For each image, the index of the training image whose thumbnail is nearest by squared RGB differences."""
    known, asked = (
        np.stack(
            [np.asarray(image.resize(THUMBNAIL, Image.Resampling.BILINEAR), np.float64).ravel() for image in images]
        )
        for images in (train, score)
    )
    # |a - b|^2 without |a|^2, which is the same for all candidates.
    return ((known**2).sum(1) - 2 * asked @ known.T).argmin(1).tolist()


def position_prior(label_maps: Sequence[np.ndarray]) -> np.ndarray:
    """The most frequent class (H, W) of each pixel; void is not counted."""
    counts = np.zeros((len(LABELS), *label_maps[0].shape), dtype=np.int32)
    for labels in label_maps:
        for label in LABELS:
            counts[label] += labels == label
    return counts.argmax(0)


class TrainingCrops:
    """Endless batches: every epoch in another order, every sample augmented by the semantic recipe of EoMT.

    That is flip, colour jitter, scale and crop. A seed fixes the order and each crop, whatever the batch size.

    Args:
        frames: to train on.
        batch_size: crops of a batch; what is left at the end of an epoch is dropped.
        seed: of all randomness.
        workers: processes that prepare crops, 0: this one does.
    """

    def __init__(self, frames: Sequence[Frame], batch_size: int, seed: int, workers: int = 0) -> None:
        crops = augmentation("eomt_semantic", INPUT, scale_range=SCALES)
        self.dataset = AugmentedDataset([scaled_entry(frame) for frame in frames], crops, seed=seed)
        self.batch_size, self.seed, self.workers = min(batch_size, len(frames)), seed, workers

    def __iter__(self) -> Iterator[list[AugmentedSample]]:
        epoch = 0
        while True:
            self.dataset.set_epoch(epoch)
            yield from DataLoader(
                self.dataset,
                self.batch_size,
                shuffle=True,
                drop_last=True,
                num_workers=self.workers,
                collate_fn=list,
                generator=torch.Generator().manual_seed(1000 * self.seed + epoch),
            )
            epoch += 1


def scaled_entry(frame: Frame) -> dict[str, Any]:
    """The frame at INPUT, as a reader gives it: decoding full frames would take longer than a small step."""
    height, width = INPUT
    labels = Image.fromarray(frame.labels.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST)
    segment_map = np.asarray(labels)
    return {
        "image_id": frame.name,
        "image": frame.image.resize((width, height), Image.Resampling.BILINEAR),
        "segment_map": segment_map,
        "segments": [
            {"id": label, "label_id": label, "is_crowd": False}
            for label in np.unique(segment_map).tolist()
            if label >= 0
        ],
    }


def array_entry(frame: Frame) -> dict[str, Any]:
    """The same, decoded."""
    entry = scaled_entry(frame)
    return entry | {"image": np.array(entry["image"].convert("RGB"))}
