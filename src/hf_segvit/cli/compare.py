"""`hf-segvit compare RUN ...`: settings that differ between runs, and their scores over seeds.

Runs that differ in the seed alone are one row, with mean and spread. The best of many evaluations is higher by chance
than that of a few, so the best of each run is taken of as many evaluations as the run with the fewest has.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = "results.json"
# What a run is called and how it computes says nothing about what it learnt.
_NOT_COMPARED = ("name", "output", "resume", "trackers", "log_every", "draw", "num_workers", "cache", "push_to_hub")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "compare",
        help="compare finished training runs",
        description=(
            "Print the settings that differ between runs, and their scores: mean and spread over runs that differ in "
            "the seed alone. Best scores are of equal numbers of evaluations."
        ),
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders of training, such as runs/*")
    parser.add_argument("--metric", help="score to compare; by default the one that chose the best weights")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the comparison; 1 if a folder holds no finished run.

    Raises:
        ValueError: no folder holds a finished run, or the runs have no score in common.
    """
    found, missing = read_runs(args.runs)
    if not found:
        folder, reason = next(iter(missing.items()))
        raise ValueError(
            f"no finished run among {len(args.runs)} folders ({folder[:200]}: {reason}); name folders with {RESULTS}"
        )
    for folder, reason in missing.items():
        print(f"{folder}: left out, {reason}")
    print(comparison(found, args.metric))
    return 1 if missing else 0


def read_runs(folders: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The results of finished runs by folder, and why the other folders have none."""
    found, missing = dict[str, dict[str, Any]](), dict[str, str]()
    for folder in folders:
        try:
            results = json.loads((Path(folder) / RESULTS).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            reason = (error.strerror or "").lower() if isinstance(error, OSError) else "it is no JSON"
            missing[folder] = f"it has no {RESULTS}" if is_missing else f"its {RESULTS} cannot be read, as {reason}"
            continue
        if _is_of_a_run(results):
            found[folder] = results
        else:
            missing[folder] = f"its {RESULTS} is not that of a training run"
    return found, missing


def _is_of_a_run(results: Any) -> bool:
    """Whether JSON has the recipe and the scores that a comparison needs, each of its type."""
    if not isinstance(results, dict) or not isinstance(results.get("recipe"), dict):
        return False
    rows = results.get("evaluations")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return False
    tables = [row.get("metrics") for row in rows]
    numbers = [value for table in tables if isinstance(table, dict) for value in table.values()]
    metrics = results.get("metrics", {})
    return all(isinstance(table, dict) for table in [metrics, *tables]) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in numbers
    )


def comparison(runs: dict[str, dict[str, Any]], metric: str | None = None) -> str:
    """A table of the runs: settings that differ, then scores.

    Raises:
        ValueError: the metric is not among the scores of a run.
    """
    metric = metric or _selecting_metric(next(iter(runs.values())))
    scores = {folder: _comparable_scores(folder, results, metric) for folder, results in runs.items()}
    count = min(map(len, scores.values()))
    flat = {folder: _flat(results["recipe"]) for folder, results in runs.items()}
    keys = list(dict.fromkeys(key for settings in flat.values() for key in settings))
    differing = [key for key in keys if len({json.dumps(settings.get(key)) for settings in flat.values()}) > 1]
    shown = [key for key in differing if key != "seed"]
    groups: dict[tuple[str, ...], list[str]] = {}
    for folder, settings in flat.items():
        groups.setdefault(tuple(_short(settings.get(key)) for key in shown), []).append(folder)
    header = [*shown, "runs", "seeds", f"best {metric} of {count}", f"last {metric}"]
    rows = []
    for values, folders in groups.items():
        seeds = ", ".join(dict.fromkeys(str(flat[folder].get("seed")) for folder in folders))
        best = [max(_evenly(scores[folder], count)) for folder in folders]
        last = [scores[folder][-1] for folder in folders]
        rows.append([*values, ", ".join(folders), seeds, _mean_and_spread(best), _mean_and_spread(last)])
    splits = {(str(results.get("dataset")), str(results.get("split"))) for results in runs.values()}
    lines = _table(header, rows)
    if len(splits) > 1:
        lines.append(f"WARNING: scored on different data ({'; '.join(' '.join(pair) for pair in sorted(splits))})")
    if len({len(values) for values in scores.values()}) > 1:
        lines.append(
            f"Runs have {count} to {max(map(len, scores.values()))} evaluations that count; the best is of {count} of "
            "each, evenly spaced and with the last."
        )
    return "\n".join(lines)


def _selecting_metric(results: dict[str, Any]) -> str:
    """The score that chose the best weights, from the sentence about it."""
    keep_best = results["recipe"].get("keep_best")
    names = list(results.get("metrics", {}))
    words = str(results.get("selection", "")).replace(";", " ").split()
    return keep_best or next((word for word in words if word in names), names[0] if names else "")


def _comparable_scores(folder: str, results: dict[str, Any], metric: str) -> list[float]:
    """The scores of the evaluations that count, in order; of all, if none counts."""
    rows = results["evaluations"]
    rows = [row for row in rows if row.get("not_comparable") is None] or rows
    values = [row["metrics"][metric] for row in rows if metric in row["metrics"]]
    if not values:
        names = ", ".join(sorted({name for row in rows for name in row["metrics"]})) or "no score at all"
        raise ValueError(f"{folder} has no score {metric!r}, only {names}; give another --metric, or leave it out")
    return values


def _evenly(values: list[float], count: int) -> list[float]:
    """`count` of the values, evenly spaced, the last among them."""
    return [values[len(values) - 1 - round(index * len(values) / count)] for index in range(count)]


def _flat(recipe: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if prefix or key not in _NOT_COMPARED:
            flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _mean_and_spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f} ({len(values)})"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in [header, *rows]]
