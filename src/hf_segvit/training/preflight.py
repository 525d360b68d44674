"""What a run looks at in its data before step 1, so that no fault stays silent until the first evaluation or the end.

`check_training_data` is the cheap part of `hf-segvit check-data`: class lists and objects of both splits compared by
name, a validation split that can be scored, and a sample of decoded masks. `with_classes_of` lets validation data with
other class lists be scored on the classes that both have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..data.class_checks import object_counts
from ..data.class_lists import VOID
from ..data.decoding import visible_labels
from ..data.reading import DataDescription, decoder_of
from ..models.label_spaces import are_unnamed, match_names

_SAMPLED = 12  # images whose masks are decoded: enough to show what is wrong with all of them, and over in a second
_SHOWN = 5  # names in a message


# What a run writes into its output folder; all but `cache`, which is the place for one.
_RESULTS = ("model", "checkpoints", "predictions", "failures", "logs")


def check_folders(output: Path, cache: Path | None) -> None:
    """Refuse an output and a cache that cannot be folders, or would be written into one another.

    Raises:
        ValueError: naming the field, the path and the remedy.
    """
    for name, folder in (("output", output), ("cache", cache)):
        if folder is None:
            continue
        try:
            # The path itself, or the nearest folder around it that exists.
            there = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
            is_folder = there.is_dir()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"{name}={folder}: cannot be a folder ({reason}); name another") from error
        if not is_folder:
            raise ValueError(f"{name}={folder}: {there} is a file or a device, and no folder; name another")
    if cache is None:
        return
    ours, theirs = output.resolve(), cache.resolve()
    inside = theirs.relative_to(ours).parts if theirs.is_relative_to(ours) else None
    if ours.is_relative_to(theirs) or (inside and inside[0] in _RESULTS):
        raise ValueError(
            f"cache={cache} and output={output} would be written into one another; name another folder for the cache, "
            "or cache=true for one in output"
        )


def check_training_data(
    train: Any,
    validation: Any,
    ours: DataDescription,
    theirs: DataDescription,
    names: tuple[str, str],
    limit: int | None = None,
) -> list[str]:
    """Refuse data from which nothing can be learnt or scored; lines for the log about the rest.

    Args:
        train: the training data, with the classes `ours`.
        validation: the validation data as it was read, with the classes `theirs`.
        names: what messages call the two, such as "coco_folder:fruit, split 'val'".
        limit: images of the validation data that are scored; `None`: all.

    Raises:
        ValueError: naming the data, the split and the remedy.
    """
    train_name, validation_name = names
    lines = _compare_class_lists(ours.id2label, theirs.id2label, names)
    labels, empty, void = _sample(train)
    if ours.task == "semantic" and len(ours.id2label) == 1 and void:
        raise ValueError(
            f"{train_name} has one class, {next(iter(ours.id2label.values()))!r}, and pixels without any class, which "
            "are not trained on: nothing can be learnt; give those pixels a class of their own, such as background "
            "(see check-data)"
        )
    _refuse_unscored(validation, validation_name, limit)
    counts = object_counts(train), object_counts(validation)
    if counts[0] is not None and not counts[0]:
        labels = Counter()
    if not labels and _first_with_objects(train, None) is None:
        raise ValueError(
            f"{train_name} has no object in any of its {len(train)} images (crowds and void are not trained on): "
            "nothing can be learnt; see check-data"
        )
    sampled = min(_SAMPLED, len(train))
    if empty:
        lines.append(
            f"WARNING: {len(empty)} of {sampled} sampled training images have no object that can be learnt, such as "
            f"{empty[0]!r}; hf-segvit check-data looks at all of them"
        )
    elif ours.task == "semantic" and len(ours.id2label) > 1 and len(labels) == 1:
        lines.append(
            f"WARNING: the sampled training images show one class only, {ours.id2label[next(iter(labels))]!r}; "
            "hf-segvit check-data looks at all of them"
        )
    else:
        lines.append(f"data: the masks of {sampled} sampled training images are fine")
    if counts[0] is not None and counts[1] is not None:
        grounds = [
            Counter(label for label in [_background(dataset)] if label != VOID) for dataset in (train, validation)
        ]
        lines += _one_sided(counts[0] + grounds[0], counts[1] + grounds[1], ours.id2label, theirs.id2label)
    return lines


def with_classes_of(dataset: Any, theirs: DataDescription, ours: DataDescription) -> tuple[Any, DataDescription]:
    """Validation data in the classes of the training data, by name; objects of other classes are void.

    Data whose classes are the same, in any order, are returned as they are.

    Raises:
        ValueError: no class has the same name.
    """
    if _same_classes(theirs.id2label, ours.id2label):
        return dataset, theirs
    matches = match_names(theirs.id2label, ours.id2label)
    if not matches:
        raise ValueError(
            f"{theirs.format}:{theirs.path}, split {theirs.split!r}, and the training data have no class in common: "
            f"{_listed(theirs.id2label.values())} against {_listed(ours.id2label.values())}; give the same class list "
            "to both, or other data with val_data="
        )
    table = np.array([matches.get(label, VOID) for label in sorted(theirs.id2label)], dtype=np.int64)
    relabelled = dataset.with_transform(_Relabelled(decoder_of(dataset), table, theirs.task == "semantic"))
    stuff = [label for label in ours.stuff_classes if label in ours.id2label]
    return relabelled, DataDescription(
        theirs.format, theirs.path, theirs.split, theirs.task, dict(ours.id2label), stuff
    )


class _Relabelled:
    """Decodes rows with `decoder` and gives their segments the label ids of another class list."""

    def __init__(self, decoder: Callable[[Any], Any], table: np.ndarray, semantic: bool) -> None:
        self.decoder, self.table, self.semantic = decoder, table, semantic

    def __call__(self, columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        decoded = dict(self.decoder(columns))
        pairs = [
            self._entry(segment_map, rows)
            for segment_map, rows in zip(decoded["segment_map"], decoded["segments"], strict=True)
        ]
        return {**decoded, "segment_map": [pair[0] for pair in pairs], "segments": [pair[1] for pair in pairs]}

    def _entry(self, segment_map: Any, rows: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
        kept = [row for row in rows if self.table[row["label_id"]] != VOID]
        renamed = [{**row, "label_id": int(self.table[row["label_id"]])} for row in kept]
        if segment_map is None:
            return None, renamed
        if self.semantic:  # ids are label ids there
            renamed = [{**row, "id": row["label_id"]} for row in renamed]
            return np.where(segment_map == VOID, VOID, self.table[segment_map]).astype(segment_map.dtype), renamed
        known = np.isin(segment_map, [row["id"] for row in kept])
        return np.where(known, segment_map, VOID).astype(segment_map.dtype), renamed


def _same_classes(one: Mapping[int, str], other: Mapping[int, str]) -> bool:
    if len(one) != len(other):
        return False
    return are_unnamed(one) or are_unnamed(other) or len(match_names(one, other)) == len(one)


def _compare_class_lists(ours: Mapping[int, str], theirs: Mapping[int, str], names: tuple[str, str]) -> list[str]:
    if _same_classes(ours, theirs):
        return []
    matches = match_names(theirs, ours)
    lines = []
    if missing := [name for label, name in ours.items() if label not in matches.values()]:
        lines.append(f"WARNING: {names[1]} does not list {_listed(missing)}: no score tells how well that is learnt")
    if surplus := [name for label, name in theirs.items() if label not in matches]:
        lines.append(f"WARNING: {names[1]} lists {_listed(surplus)}, which {names[0]} does not: left out of the scores")
    return [*lines, f"{len(matches)} classes that both have are scored by name"]


def _one_sided(
    train: Counter[int], validation: Counter[int], ours: Mapping[int, str], theirs: Mapping[int, str]
) -> list[str]:
    """Warnings about classes that both lists have, but only one split shows."""
    learnt, scored = {ours[label] for label in train}, {theirs[label] for label in validation}
    both = set(ours.values()) & set(theirs.values())
    lines = []
    if unscored := [name for name in ours.values() if name in both and name in learnt - scored]:
        lines.append(f"WARNING: no object in the validation data for {_listed(unscored)}: not scored")
    if unlearnt := [name for name in ours.values() if name in both and name in scored - learnt]:
        lines.append(f"WARNING: no object in the training data for {_listed(unlearnt)}: scored, but cannot be learnt")
    if neither := [name for name in ours.values() if name in both and name not in learnt | scored]:
        lines.append(f"WARNING: no object at all for {_listed(neither)}")
    return lines


def _background(dataset: Any) -> int:
    """The label id of pixels that no outline covers, which no annotation lists; -1 where they are void."""
    read_masks = getattr(decoder_of(dataset), "read_masks", None)
    return int(getattr(read_masks, "background", VOID))


def _sample(dataset: Any) -> tuple[Counter[int], list[Any], bool]:
    """Of evenly spaced images: the labels that are seen, the ids of images without any, and whether void was seen."""
    labels: Counter[int] = Counter()
    empty, void = [], False
    for index in sorted(set(np.linspace(0, len(dataset) - 1, _SAMPLED).astype(int).tolist())):
        entry = dataset[index]
        seen = visible_labels(entry)
        labels.update(seen)
        void |= entry["segment_map"] is not None and bool((np.asarray(entry["segment_map"]) == VOID).any())
        # An image that lists nothing is an example of background, as long as others have objects.
        if not seen and dataset.with_format(None)[index].get("segments") != []:
            empty.append(entry.get("image_id"))
    return labels, empty, void


def _refuse_unscored(dataset: Any, name: str, limit: int | None) -> None:
    if _first_with_objects(dataset, limit) is not None:
        return
    first = f" among the first {limit} images (evaluate_limit)" if limit is not None and limit < len(dataset) else ""
    raise ValueError(
        f"{name} has no object that could be scored{first} (crowds and void do not count); add labels there, name "
        "other data with val_split= or val_data=, or score on a part of the training images with val_fraction=0.2"
    )


def _first_with_objects(dataset: Any, limit: int | None) -> int | None:
    """Index of the first image that shows an object; images are decoded up to there."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    part = dataset if count == len(dataset) else dataset.select(range(count))
    counts = object_counts(part)
    if counts is not None and not counts:  # nothing to decode
        return None
    return next((index for index in range(count) if visible_labels(part[index])), None)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + rest
