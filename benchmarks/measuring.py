"""Measuring for all benchmarks: paired timing, peak memory, and a description of the machine."""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from hf_segvit.models.cpu_kernels import processor_features


def machine() -> str:
    """One line with processor, threads, accelerator and versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    features = processor_features()
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{model} ({features}), {torch.get_num_threads()} threads{device}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def time_pair(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int = 7, clock: str = "wall"
) -> tuple[list[float], list[float]]:
    """Seconds of each call; the two take turns, so that a slower moment of the machine hits both.

    On a machine that others use too, processor time on one thread is the steadier measure.
    """
    now = CLOCKS[clock]
    ours(), theirs()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, record in ((ours, seconds[0]), (theirs, seconds[1])):
            synchronize()
            start = now()
            function()
            synchronize()
            record.append(now() - start)
    return seconds


def spread(seconds: list[float]) -> str:
    """Median and range of a list of durations, in milliseconds."""
    return f"{1e3 * statistics.median(seconds):8.1f} ms [{1e3 * min(seconds):.1f}, {1e3 * max(seconds):.1f}]"


def report(name: str, ours: list[float], theirs: list[float], budget: float | None = None) -> float:
    """Print one row: both medians with their ranges, their ratio and the budget for it."""
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(
        f"{name:44s} ours {spread(ours)}  theirs {spread(theirs)}  ratio {ratio:.3f}{verdict(ratio, budget)}",
        flush=True,
    )
    return ratio


def verdict(ratio: float, budget: float | None) -> str:
    if budget is None:
        return ""
    return f"  budget {budget:.3f} {'met' if ratio <= budget else 'MISSED'}"


def peak_memory(script: str, *arguments: str) -> float:
    """MiB that a fresh process needs above its start, as the script itself prints on its last line."""
    run = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return float(run.stdout.strip().splitlines()[-1])


class PeakResidentMemory:
    """Peak resident memory of this process above its size on entry, in MiB (Linux)."""

    def __enter__(self) -> "PeakResidentMemory":
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self.start = self._status("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        self.mebibytes = (self._status("VmHWM") - self.start) / 1024

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
