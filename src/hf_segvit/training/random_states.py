"""The states of all generators of random numbers that training may use: Python's, NumPy's and PyTorch's.

`random_states` takes them, `restore_random_states` puts them back, `unchanged_random_states` keeps what happens in
between from mattering, and `seed_everything` starts them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """The states of this process, as tensors and plain numbers that `torch.load(weights_only=True)` can read."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = _numpy_state()
    states: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` took. A GPU's state is left out where there is no GPU."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _numpy_state() -> Any:
    return np.random.get_state(legacy=True)


@contextmanager
def unchanged_random_states() -> Iterator[None]:
    """Whatever the block draws, the numbers after it are those that would have come without it."""
    states = random_states()
    try:
        yield
    finally:
        restore_random_states(states)


def seed_everything(*seeds: int) -> None:
    """Start all generators from numbers of which each makes a difference, such as seed, step and process."""
    words = np.random.SeedSequence(seeds).generate_state(2, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]) % 2**32)
    torch.manual_seed(int(words[1]) % 2**63)
