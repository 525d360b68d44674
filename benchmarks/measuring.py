"""Measuring for all benchmarks: rows of ours beside a peer, on the harness of `hf_segvit.inference.measuring`."""

import statistics
import subprocess
import sys
from collections.abc import Callable

from hf_segvit.inference.measuring import (
    CLOCKS,
    PeakMemory,
    describe_machine,
    spread,
    synchronize,
    time_interleaved,
)

__all__ = ["CLOCKS", "PeakResidentMemory", "machine", "peak_memory", "report", "spread", "synchronize", "time_pair"]
machine = describe_machine
PeakResidentMemory = PeakMemory  # without a device


def time_pair(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int = 7, clock: str = "wall"
) -> tuple[list[float], list[float]]:
    """Seconds of each call of two functions that take turns."""
    first, second = time_interleaved((ours, theirs), repeats, clock)
    return first, second


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
