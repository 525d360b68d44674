"""Check the classes of a data set: how often they occur, in which splits, and how they are spelt.

`object_counts` counts in the table of a data set, without decoding. `check_classes` and `check_across_splits` look at
the counts of a `DataReport`; where an option of the format would mend what they find, the problem names it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from .class_lists import ANOMALY_CLASSES, similar_names
from .data_report import ClassCounts, DataReport, SplitReport, numbered
from .label_tables import LABEL_TABLES, label_table
from .problems import ProblemList, some_of
from .readers import FORMATS

_MOST_VOID = 0.5  # of all pixels; more is hardly meant, and the background was
_FEW_IMAGES = 3  # in fewer, every class is rare
_ROWS = 10_000  # rows of a table at a time, whose outlines may be large


def object_counts(dataset: Any) -> Counter[int] | None:
    """Objects of each label id, crowds left out; `None` if only decoded masks show them."""
    if "segments" not in dataset.column_names:  # an existing table, such as one of the Hub
        return None
    counts: Counter[int] = Counter()
    table = dataset.select_columns(["segments"]).with_format("arrow")
    for start in range(0, len(dataset), _ROWS):
        column = table[start : start + _ROWS].column("segments")
        if column.null_count:  # in the files of masks
            return None
        for chunk in column.chunks:
            segments = chunk.flatten()
            labels = segments.field("label_id").to_numpy(zero_copy_only=False)
            crowds = segments.field("is_crowd").to_numpy(zero_copy_only=False).astype(bool)
            counts.update(labels[~crowds].tolist())
    return counts


def check_classes(split: SplitReport, path: str, report: DataReport, outline_format: str | None) -> None:
    """Look for classes that cannot be learnt; `outline_format` is the format if it stores outlines."""
    item, problems = f"split {split.split!r}", report.problems
    present = [row for row in split.classes if row.segments]
    if [row.name for row in split.classes] == list(ANOMALY_CLASSES) and (present or not split.images):
        _check_anomalies(split, path, item, problems)
    elif split.images and not present:
        problems.error(path, item, "no image has a segment of any class; all is void or crowd")
    elif split.task != "semantic" or not split.void_share:
        return
    elif outline_format:
        remedy = "annotate the rest"
        if "background" in _options(outline_format):
            remedy = f"if they are background, give {with_option(report.data, 'background=background')}"
        if len(present) == 1:
            message = f"all pixels are {present[0].name!r} or void, so that nothing can be learnt"
            problems.error(path, item, f"{message}; {remedy}")
        elif split.void_share > _MOST_VOID:
            message = (
                f"{split.void_share:.1%} of all pixels have no annotation and are void, neither trained nor scored"
            )
            problems.warn(path, item, f"{message}; {remedy}")
    elif len(present) == 1:
        # 255 is void unless it is listed, so the foreground of a binary mask disappears without an error.
        problems.error(
            path,
            item,
            f"all pixels are {present[0].name!r} or void, so that nothing can be learnt; if masks are binary, saved as "
            "0 and 255, list 255 as a class",
        )


def _check_anomalies(split: SplitReport, path: str, item: str, problems: ProblemList) -> None:
    """Say where nothing could be told apart."""
    for row in split.classes:
        if split.images and not row.images:
            message = f"no pixel of any image is {row.name!r}, so that AUROC, AUPRC and FPR are undefined"
            problems.error(path, item, f"{message}; check the values in the masks (known=, anomaly=, void=)")
        elif row.images < split.images:
            count = split.images - row.images
            problems.warn(path, item, f"{numbered(count, 'image')} of {split.images} without a pixel of {row.name!r}")


def check_across_splits(report: DataReport, format_name: str) -> None:
    """Compare the classes of all splits, and look for misspelt names."""
    problems, splits = report.problems, [split for split in report.splits if split.images]
    lists = {split.split: [row.name for row in split.classes] for split in splits}
    for name, names in list(lists.items())[1:]:
        first = next(iter(lists))
        if names != lists[first]:
            extra = [label for label in names if label not in lists[first]]
            absent = [label for label in lists[first] if label not in names]
            parts = [
                f"only {where} lists {some_of(labels)}" for where, labels in ((name, extra), (first, absent)) if labels
            ]
            message = "; ".join(parts) or "the order differs"
            problems.error(
                report.data,
                f"split {name!r}",
                f"its classes are not those of {first}: {message}; list the same classes",
            )
    counts: dict[str, dict[str, ClassCounts]] = defaultdict(dict)
    for split in splits:
        for row in split.classes:
            counts[row.name][split.split] = row
    crowds, rare, lonely = [], [], defaultdict[str, list[str]](list)
    for label, rows in counts.items():
        having = [name for name, row in rows.items() if row.segments]
        if not having and any(row.crowds for row in rows.values()):
            crowds.append(label)
        elif len(having) == 1 and len(splits) > 1:
            lonely[having[0]].append(label)
        elif sum(row.images for row in rows.values()) == 1 and sum(split.images for split in splits) >= _FEW_IMAGES:
            rare.append(label)
    # COCO's reader has said so already, with the file that says it.
    if crowds and not any("only as crowd" in problem.message for problem in problems):
        remedy = "mark them as objects"
        if "crowd" in _options(format_name):
            remedy = f"{with_option(report.data, 'crowd=objects')} reads them as objects"
        noun = "class occurs" if len(crowds) == 1 else "classes occur"
        problems.warn(
            report.data,
            "",
            f"{len(crowds)} {noun} only as crowd, which trains nothing: {some_of(crowds)}; CVAT marks masks drawn with "
            f"a brush so; {remedy}",
        )
    for name, labels in lonely.items():
        effect = (
            "they cannot be scored"
            if name == splits[0].split
            else f"{splits[0].split} has none, so they are not learnt"
        )
        problems.warn(
            report.data, f"split {name!r}", f"classes that occur in this split alone: {some_of(labels)}; {effect}"
        )
    if rare:
        problems.warn(report.data, "", f"classes that occur in one image alone: {some_of(rare)}; add images of them")
    published = {row.name for table in LABEL_TABLES for row in label_table(table).classes}
    for first, second in similar_names(list(counts)):
        if {first, second} <= published:  # such as towel and tower
            continue
        problems.warn(
            report.data,
            "",
            f"the classes {first!r} and {second!r} are spelt nearly alike; if they are one class, rename one of them",
        )


def with_option(spec: str, option: str) -> str:
    """A spec with an option added, as it can be copied to a command line."""
    return f"'{spec}{'&' if '?' in spec else '?'}{option}'"


def _options(format_name: str) -> tuple[str, ...]:
    return FORMATS[format_name].options if format_name in FORMATS else ()
