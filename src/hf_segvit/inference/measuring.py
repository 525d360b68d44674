"""Measure speed and memory: interleaved timing, peak memory, the machine.

The commands and scripts that measure share these. Nothing here needs more than PyTorch and Transformers.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from ..models.cpu_kernels import processor_features

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# Dense bf16 products of the matrix units, in 10^12 operations a second, from the makers' data sheets.
PEAK_BF16 = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "A100": 312}


def machine_facts() -> dict[str, Any]:
    """Processor, threads, accelerator and versions of this machine."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return {
        "processor": name,
        "features": str(processor_features()),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def describe_machine(facts: Mapping[str, Any] | None = None) -> str:
    """`machine_facts` in one line."""
    facts = machine_facts() if facts is None else facts
    accelerator = f", {facts['accelerator']}" if facts["accelerator"] else ""
    return (
        f"{facts['processor']} ({facts['features']}), {facts['threads']} threads{accelerator}; "
        f"Python {facts['python']}, torch {facts['torch']}, transformers {facts['transformers']}"
    )


def peak_bf16(device_name: str) -> float | None:
    """Dense bf16 operations a second that the data sheet of a GPU promises, if it is known."""
    # The longest name that fits: "H100 PCIe" is an H100, but not as fast.
    names = [name for name in PEAK_BF16 if all(word in device_name for word in name.split())]
    return 1e12 * PEAK_BF16[max(names, key=len)] if names else None


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_interleaved(
    functions: Sequence[Callable[[], object]], repeats: int = 7, clock: str = "wall", warm_up: int = 1
) -> list[list[float]]:
    """Seconds of each call of each function; they take turns, so that a slower moment of the machine hits all.

    On a machine that others use too, processor time (`clock="cpu"`) on one thread is the steadier measure.
    """
    now = CLOCKS[clock]
    for function in functions:
        for _ in range(warm_up):
            function()
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, record in zip(functions, seconds, strict=True):
            synchronize()
            start = now()
            function()
            synchronize()
            record.append(now() - start)
    return seconds


def spread(seconds: Sequence[float]) -> str:
    """Median and range of durations, in milliseconds."""
    return f"{1e3 * statistics.median(seconds):8.1f} ms [{1e3 * min(seconds):.1f}, {1e3 * max(seconds):.1f}]"


class PeakMemory:
    """Peak memory above its size on entry, in MiB: of a CUDA device, or else resident memory of this process.

    `mebibytes` is `None` where the system does not tell (anything but Linux). Resident memory that an earlier call
    freed and the allocator kept counts as there from the start.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device if device is not None and device.type == "cuda" else None
        self.mebibytes: float | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device is not None:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start: float | None = torch.cuda.memory_allocated(self.device)
            return self
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self.start = _status("VmRSS")
        except OSError:
            self.start = None
        return self

    def __exit__(self, *exception: object) -> None:
        if self.start is None:
            return
        peak = _status("VmHWM") if self.device is None else torch.cuda.max_memory_allocated(self.device)
        self.mebibytes = (peak - self.start) / 2**20


def _status(field: str) -> int:
    """Bytes that a field of this process's status says."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def relative_difference(answer: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference of two tensors as a share of the reference's largest value."""
    answer, reference = answer.detach().float().cpu(), reference.detach().float().cpu()
    return ((answer - reference).abs().max() / reference.abs().max()).item()
