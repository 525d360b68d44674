"""Results of runs: one JSON file each, and what tables of them are made of."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_segvit.atomic_files import replacing


def write_json(path: Path, values: Any, indent: int | None = 1) -> None:
    """Write a result whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(values, indent=indent) + "\n", encoding="utf-8")


def read_results(output: Path, pattern: str = "*-seed*.json") -> list[dict[str, Any]]:
    """All results of a folder, in the order of their names; ends the script where there are none."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob(pattern))]
    if not results:
        raise SystemExit(f"there are no results in {output}; run some first")
    return results


def cell(values: Sequence[float]) -> str:
    """Mean and range over the seeds, in percent."""
    return f"{100 * statistics.mean(values):.1f} ({100 * min(values):.1f} - {100 * max(values):.1f})"
