"""How training images reach the model: id maps from the cache, and crops that the device scales."""

import torch

from hf_segvit.training.recipe import cache_folder
from hf_segvit.training.step import to_device
from hf_segvit.training.tasks.eomt import EoMTTask

from .data_folders import mask_folder
from .tiny_training import tiny_recipe


def test_images_scaled_on_the_device_are_those_of_the_workers(tmp_path):
    batches = {}
    for device in ("cpu", "meta"):
        task = EoMTTask(tiny_recipe(tmp_path))
        torch.manual_seed(0)
        _, processor = task.build_model()
        task.device = torch.device(device)
        samples = task.train_samples()
        collated = task.collator(processor, task.device)([samples[0, index] for index in range(4)])
        assert ("crops" in collated) == (device == "meta"), "what a device finishes travels as it was cut out"
        batches[device] = task.prepare_batch(collated, processor)
    expected, found = batches["cpu"], batches["meta"]
    assert "placements" not in found
    torch.testing.assert_close(found["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=0)
    for one, other in zip(found["mask_labels"], expected["mask_labels"], strict=True):
        assert torch.equal(one, other)


def test_placements_stay_on_the_cpu():
    batch = {"crops": [torch.zeros(3, 2, 2)], "placements": torch.ones(1, 3)}
    moved = to_device(batch, torch.device("meta"))
    assert moved["crops"][0].device.type == "meta"
    assert moved["placements"].device.type == "cpu"


def test_id_maps_are_cached(tmp_path):
    data = mask_folder(tmp_path / "data", names=("one", "two"))
    changes = {"data": data, "train_split": None, "task": "semantic", "augmentation": "eomt_semantic"}
    samples = {}
    for name, cache in (("plain", False), ("cached", True), ("read from the cache", True)):
        task = EoMTTask(tiny_recipe(tmp_path, cache=cache, **changes))
        made = task.train_samples()
        samples[name] = [made[0, index] for index in range(2)]
    assert len(list((tmp_path / "cache").rglob("*.runs"))) == 2
    for name in ("cached", "read from the cache"):
        for one, other in zip(samples["plain"], samples[name], strict=True):
            assert torch.equal(one.segment_map, other.segment_map)
            assert torch.equal(one.labels, other.labels)


def test_cache_folders(tmp_path):
    assert cache_folder(tiny_recipe(tmp_path)) is None
    assert cache_folder(tiny_recipe(tmp_path, cache=True)) == tmp_path / "cache"
    assert cache_folder(tiny_recipe(tmp_path, cache=str(tmp_path / "maps"))) == tmp_path / "maps"
