"""What the data check found, as text: `report_text` of a `DataReport`; problems of one kind are told once."""

from __future__ import annotations

import re

from .checking import DataReport
from .problems import Problem, ProblemList

_LISTED = 3  # so many problems of one kind are all listed
# What differs between problems of one kind: quoted names, paths, numbers and lists of them.
_PARTICULAR = re.compile(r"'[^']*'|\S*[/\\]\S*|\d+(\.\d+)?(, \d+(\.\d+)?)*")


def report_text(report: DataReport, most_lines: int = 20) -> str:
    """The report as text.

    Args:
        report: of the check.
        most_lines: for problems.
    """
    lines = [report.data]
    for split in report.splits:
        low, high = split.smallest, split.largest
        lines.append(
            f"\nsplit {split.split}, {split.task}: {_number(split.images, 'image')}, "
            f"{_number(split.segments, 'segment')}, {_number(split.crowds, 'crowd')}, "
            f"{_number(split.empty_images, 'image')} without segments, {split.void_share:.1%} of all pixels void"
        )
        if not split.images:
            continue
        lines += [
            f"sizes (height x width): {low[0]} x {low[1]} to {high[0]} x {high[1]}, most often "
            + ", ".join(f"{size[0]} x {size[1]} ({count})" for size, count in split.sizes[:3]),
            f"{'class':<28}{'segments':>10}{'images':>10}{'pixels':>9}",
        ]
        total = sum(row.pixels for row in split.classes) or 1
        for row in sorted(split.classes, key=lambda row: -row.pixels):
            if row.segments:
                lines.append(f"{row.name[:27]:<28}{row.segments:>10}{row.images:>10}{row.pixels / total:>9.2%}")
        if absent := [row.name for row in split.classes if not row.segments]:
            verb = "classes do" if len(absent) > 1 else "class does"
            lines.append(f"{len(absent)} {verb} not occur: {', '.join(absent[:12])}{' ...' * (len(absent) > 12)}")
    errors = len(report.problems.errors)
    warnings = len(report.problems) - errors
    lines.append(f"\n{_number(errors, 'problem')} that would hurt training, {_number(warnings, 'warning')}")
    return "\n".join(lines + _problem_lines(report.problems, most_lines))


def _problem_lines(problems: ProblemList, most: int) -> list[str]:
    """Errors, then warnings; of a kind with many problems the first alone, and how many more there are."""
    kinds: dict[tuple[str, str], list[Problem]] = {}
    for problem in sorted(problems, key=lambda problem: problem.severity):
        kinds.setdefault((problem.severity, _PARTICULAR.sub("*", problem.message)), []).append(problem)
    lines, told = list[str](), 0
    for (severity, _), members in kinds.items():
        shown = members if len(members) <= _LISTED else members[:1]
        if len(lines) + len(shown) > most:
            break
        told += len(members)
        more = f" (... and {len(members) - len(shown)} more of this kind)" if len(members) > len(shown) else ""
        lines += [f"{severity}: {problem}{more}" for problem in shown]
    if told < len(problems):
        lines.append(f"... and {len(problems) - told} more of other kinds")
    if len(problems) > sum(line.startswith(("error: ", "warning: ")) for line in lines):
        lines.append("--json lists all")
    return lines


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
