"""Estimate the memory that an image needs, and compare it with the machine's.

An image of extreme proportions is cut into many windows, and answers have the size of the image however small the
model's input is. `refuse_without_memory` says so before minutes of computing end in an error, or the process is killed.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..models.image_geometry import windowed_content_size, windows_of

MAX_WINDOWS = 256  # of one image; at 7:1 it has 7
# Measured with `segment` for all tasks: image, tensor, masks at its size, ids and drawings.
_BYTES_PER_PIXEL = 48
_ACTIVATIONS = 24  # copies of (tokens, width) that live at a time in a block, its MLP included


def available_memory() -> int | None:
    """Bytes that this process may still take: of the machine, its container and its own limit; `None` if unknown."""
    found = [_of_machine(), _of_container(), _of_process()]
    known = [number for number in found if number is not None]
    return max(min(known), 0) if known else None


def needed_memory(image_size: tuple[int, int], processor: Any, config: Any) -> tuple[int, int]:
    """Estimated bytes for one image on the CPU, those of the model's part among them, and its number of windows."""
    height, width = image_size
    size = getattr(getattr(processor, "image_processor", processor), "size", None)
    sides = [getattr(size, name, None) or 0 for name in ("height", "width")] if size is not None else [0, 0]
    input_size = sides[0] or 1024, sides[1] or 1024
    windows = 1
    content = 0
    if getattr(processor, "do_split_image", False) and getattr(processor, "do_resize", True) and all(sides):
        scaled = windowed_content_size(image_size, input_size)
        windows, content = len(windows_of([scaled], input_size)), scaled[0] * scaled[1]
    pixels = input_size[0] * input_size[1]
    channels, queries = getattr(config, "num_channels", 3), getattr(config, "num_queries", 100)
    patch, hidden = getattr(config, "patch_size", 16), getattr(config, "hidden_size", 256)
    patch, hidden = (value if isinstance(value, int) else 16 for value in (patch, hidden))
    tokens = pixels // max(patch, 1) ** 2 + queries
    of_window = 8 * channels * pixels + 4 * _ACTIVATIONS * tokens * hidden + 8 * queries * pixels // 16
    return height * width * _BYTES_PER_PIXEL + content * channels * 2 + windows * of_window, windows


def refuse_without_memory(
    sizes: Sequence[tuple[int, int]], processor: Any, config: Any, device: torch.device, names: Sequence[str]
) -> None:
    """Refuse images (sizes as (height, width)) for which the memory does not suffice.

    Raises:
        ValueError: one alone, or all of them together, need more than there is.
    """
    processor = getattr(processor, "generator", processor)
    config = getattr(config, "generator_config", config)
    available = available_memory()
    total = 0
    for (height, width), name in zip(sizes, names, strict=True):
        needed, windows = needed_memory((height, width), processor, config)
        if windows > MAX_WINDOWS:
            raise ValueError(
                f"{name}: {height}x{width} (height x width) would be cut into {windows} windows, more than the limit "
                f"of {MAX_WINDOWS}; cut it into shorter pieces"
            )
        # On another device the model's part is not in this memory.
        total += needed if device.type == "cpu" else height * width * _BYTES_PER_PIXEL
        if available is not None and total > available:
            raise ValueError(
                f"{name}: segmenting {height}x{width} pixels (height x width) needs about {_gigabytes(total)}, but "
                f"{_gigabytes(available)} of memory are free; scale the image down, cut it into pieces, or use a "
                "machine with more memory"
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the machine, for which PyTorch raises a plain `RuntimeError`."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GB"


def _of_machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _of_container() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        if limit == "max":
            return None
        lines = (line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        cached = next((int(value) for name, value in lines if name == "inactive_file"), 0)
        return int(limit) - int(used) + cached  # cached files make room when it is needed
    except (OSError, ValueError):
        return None


def _of_process() -> int | None:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return None
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        return limit - pages * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError, ValueError):
        return None
