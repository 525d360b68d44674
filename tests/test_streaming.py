"""Streams: each sample once whatever the workers and processes, reproducible, and rows of Hub data sets."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_segvit.data.augmentation import augmentation
from hf_segvit.data.collation import MaskCollator
from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.data.streaming import LabelMapEntry, StreamedDataset


class Rows:
    """Entries, one after the other, as often as asked."""

    def __iter__(self):
        scenes = GeneratedScenes(7, size=(32, 40))
        return (scenes[index] for index in range(7))


def hub_stream(num_shards=3):
    def rows(shards):
        for shard in shards:
            for number in range(2):
                label_map = np.full((20, 30), shard, np.uint8)
                label_map[:5] = 255
                yield {"name": f"{shard}-{number}", "image": Image.new("RGB", (30, 20)), "labels": label_map.tolist()}

    return datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": list(range(num_shards))})


def read(dataset, workers=0):
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    return {sample.image_id: sample for sample in loader}


def test_samples_do_not_depend_on_workers_or_processes():
    transform = augmentation("eomt_coco_panoptic", 32)
    alone = read(StreamedDataset(Rows(), transform))
    assert sorted(alone) == list(range(7))
    for processes, workers in ((1, 2), (2, 0), (2, 2)):
        parts = [
            read(StreamedDataset(Rows(), transform, num_processes=processes, process_index=index), workers)
            for index in range(processes)
        ]
        assert sum(map(len, parts)) == 7
        for part in parts:
            for image_id, sample in part.items():
                assert torch.equal(sample.pixels, alone[image_id].pixels)


def test_epochs_and_seeds_differ():
    transform = augmentation("eomt_coco_panoptic", 32)
    stream = StreamedDataset(Rows(), transform)
    first = read(stream)
    stream.set_epoch(1)
    second, other = read(stream), read(StreamedDataset(Rows(), transform, seed=1))
    for samples in (second, other):
        assert not all(torch.equal(first[i].pixels, samples[i].pixels) for i in range(7))


@pytest.mark.parametrize("processes", [1, 3])
def test_rows_of_a_hub_data_set(processes):
    columns = LabelMapEntry(image="image", annotation="labels", image_id="name")
    transform = augmentation("eomt_semantic", 32)
    seen = []
    for index in range(processes):
        stream = StreamedDataset(
            hub_stream(), transform, to_entry=columns, num_processes=processes, process_index=index
        )
        for sample in stream:
            seen.append(sample.image_id)
            assert sample.labels.tolist() in ([int(sample.image_id[0])], [])
    assert sorted(seen) == [f"{shard}-{number}" for shard in range(3) for number in range(2)]


def test_a_stream_makes_batches():
    stream = StreamedDataset(Rows(), augmentation("eomt_coco_panoptic", 32))
    batches = list(DataLoader(stream, batch_size=4, collate_fn=MaskCollator()))
    assert [len(batch["class_labels"]) for batch in batches] == [4, 3]


def test_label_maps_become_entries():
    row = {"image": Image.new("RGB", (3, 2)), "annotation": [[0, 1, 255], [2, 2, 0]]}
    entry = LabelMapEntry()(row)
    assert entry["segment_map"].tolist() == [[0, 1, -1], [2, 2, 0]]
    assert [segment["label_id"] for segment in entry["segments"]] == [0, 1, 2]
    reduced = LabelMapEntry(do_reduce_labels=True)(row)
    assert reduced["segment_map"].tolist() == [[-1, 0, -1], [1, 1, -1]]
    assert LabelMapEntry()(row | {"image": Image.new("RGB", (3, 2), "red")})["image_id"] != entry["image_id"]
    with pytest.raises(ValueError, match=r"no column \['label'\], only \['annotation', 'image'\]"):
        LabelMapEntry(annotation="label")(row)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 3\)"):
        LabelMapEntry()(row | {"annotation": np.zeros((2, 3, 3))})
    with pytest.raises(ValueError, match="process_index 2 of 2"):
        StreamedDataset(Rows(), augmentation("vit_p", 28), num_processes=2, process_index=2)
