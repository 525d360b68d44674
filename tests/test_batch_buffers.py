"""Batches that workers hand over in shared buffers: the same values, held as long as they are used."""

import gc
import multiprocessing
import os

import pytest
import torch
from torch.utils.data import DataLoader

from hf_segvit.training.batch_buffers import BatchBuffers
from hf_segvit.training.data_order import StepOrder, TrainingLoader

pytestmark = pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="needs workers that are forked")


def samples(count=24):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 255, (3 + index % 3, 5, 7), generator=generator, dtype=torch.uint8) for index in range(count)
    ]


def collate(rows):
    """A batch of all kinds of values, with rows of different sizes."""
    sums = torch.stack([row.sum() for row in rows])
    return {
        "crops": [row.permute(1, 2, 0) for row in rows],  # channels last in memory
        "views": [row[1:, ::2] for row in rows],  # with gaps
        "sums": sums,
        "pair": (sums.double() / 3, sums > 4000),
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "name": f"{len(rows)} rows",
        "worker": torch.tensor(os.getpid()),
    }


def assert_batch(found, rows):
    expected = collate(rows)
    assert list(found) == list(expected)
    for name in ("crops", "views"):
        assert all(torch.equal(*pair) for pair in zip(found[name], expected[name], strict=True)), name
    assert [crop.stride() for crop in found["crops"]] == [crop.stride() for crop in expected["crops"]]
    assert torch.equal(found["sums"], expected["sums"])
    assert isinstance(found["pair"], tuple)
    assert all(torch.equal(*pair) for pair in zip(found["pair"], expected["pair"], strict=True))
    assert found["empty"].shape == (0, 5)
    assert found["scalar"].dtype == torch.bfloat16
    assert found["scalar"].item() == 2.5
    assert found["name"] == expected["name"]
    assert found["worker"].item() != os.getpid()


def loader(buffers, num_workers=2, **settings):
    return DataLoader(samples(), batch_size=2, collate_fn=buffers, num_workers=num_workers, **settings)


def is_shared_file(batch):
    """Whether a batch came in PyTorch's way: a buffer is no shared memory in its sense."""
    return batch["sums"].is_shared()


def test_batches_are_those_of_the_collate_function_and_free_their_buffers():
    buffers = BatchBuffers(collate, 2)
    for number, batch in enumerate(loader(buffers)):
        assert not is_shared_file(batch)
        assert_batch(batch, samples()[2 * number : 2 * number + 2])
    del batch
    gc.collect()
    assert buffers._taken.sum() == 0


def test_whoever_keeps_batches_keeps_their_values():
    """All buffers are in use after a few batches; the others come in PyTorch's way."""
    buffers = BatchBuffers(collate, 1, per_worker=3)
    kept = list(loader(buffers, num_workers=1))
    assert [is_shared_file(batch) for batch in kept] == 3 * [False] + 9 * [True]
    for number, batch in enumerate(kept):
        assert_batch(batch, samples()[2 * number : 2 * number + 2])
    crops = kept[1]["crops"]
    del kept, batch
    gc.collect()
    assert buffers._taken.tolist() == [0, 1, 0]  # one tensor of a batch holds its buffer
    assert torch.equal(crops[0], samples()[2].permute(1, 2, 0))
    del crops
    gc.collect()
    assert buffers._taken.tolist() == [0, 0, 0]


def test_batches_that_do_not_fit_come_in_the_usual_way():
    batches = list(loader(BatchBuffers(collate, 2, per_worker=12, capacity=832)))
    sizes = [sum(row.numel() for row in samples()[start : start + 2]) for start in range(0, 24, 2)]
    assert {is_shared_file(batch) for batch in batches} == {True, False}, sizes
    for number, batch in enumerate(batches):
        assert_batch(batch, samples()[2 * number : 2 * number + 2])


def test_without_workers_nothing_is_copied():
    assert BatchBuffers.around(collate, 0) is collate
    row = torch.arange(4)
    assert next(iter(DataLoader([row], collate_fn=BatchBuffers(lambda rows: rows[0], 1)))) is row


def test_a_forked_process_does_not_free_what_this_one_uses():
    buffers = BatchBuffers(collate, 1)
    batch = next(iter(loader(buffers, num_workers=1)))
    taken = int(buffers._taken.sum())
    child = os.fork()
    if child == 0:
        batch.clear()
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert buffers._taken.sum() == taken
    assert_batch(batch, samples()[:2])


def test_address_space_that_is_short_is_no_error(monkeypatch):
    def refused(*_):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("hf_segvit.training.batch_buffers.mmap.mmap", refused)
    assert BatchBuffers.around(collate, 2) is collate


class Keys:
    """Samples that are their keys."""

    def __len__(self):
        return 10

    def __getitem__(self, key):
        return torch.tensor(key)

    def name(self, index):
        return f"sample {index}"


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_steps_of_the_training_loader_are_the_same_with_any_number_of_workers(num_micro_batches):
    order = StepOrder(10, 6, 0)

    def steps(num_workers):
        loader = TrainingLoader(
            Keys(),
            order,
            lambda keys: {"keys": torch.stack(keys)},
            start_step=2,
            total_steps=9,
            num_micro_batches=num_micro_batches,
            num_workers=num_workers,
        )
        # Read once a step is over, as training does, and never through shared files.
        return [[(batch["keys"].tolist(), batch["keys"].is_shared()) for batch in step] for step in loader]

    expected = [
        [([list(key) for key in keys], False) for keys in order.micro_batches(step, 0, 1, num_micro_batches)]
        for step in range(2, 9)
    ]
    assert steps(0) == steps(1) == steps(2) == expected
