"""The files of `hf-segvit segment` for an image, and what a user should know of an answer.

`write_segment_files` writes those of segmented_image.py and, with a classifier, `NAME.comparison.png`: the generator's
answer beside the fused one. `remark` says why an answer is empty, or cut. `label_changes` finds the segments whose
label a classifier changed; `changes_text` formats them as a table. H W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..drawing.segments import class_legend, contact_sheet
from ..lookup import printable
from .segmented_image import DEFAULT_CHOICE, OutputChoice, Segment, SegmentedImage, prepare_paths, save_image

TITLES = ("image", "generator", "with ViT-P")  # columns of the comparison


def write_segment_files(
    prefix: Path,
    image: Any,
    answer: SegmentedImage,
    id2label: Mapping[int, str],
    about: Mapping[str, Any],
    before: SegmentedImage | None = None,
    choice: OutputChoice = DEFAULT_CHOICE,
) -> list[Path]:
    """`SegmentedImage.save` for an image, with a comparison if there is an answer `before`, the generator's own."""
    answer = replace(answer, image=image, id2label=id2label)
    if before is None:
        return answer.save(prefix, about=about, choice=choice)
    comparison = prefix.with_name(f"{prefix.name}.comparison.png")
    prepare_paths([comparison])
    alone = replace(before, image=image, id2label=id2label).plot(labels=choice.labels)
    entries = class_legend([before.segments_info, answer.segments_info], id2label) if choice.labels else None
    sheet = contact_sheet([[image, alone, answer.plot(labels=choice.labels)]], TITLES, entries=entries)
    save_image(sheet, comparison)
    changes = [change.as_row() for change in label_changes(before, answer)]
    return [comparison, *answer.save(prefix, about=about, choice=choice, further={"label_changes": changes})]


def remark(answer: SegmentedImage, threshold: float | None) -> str:
    """What a user should know about an answer without segments, or with as many as there may be; else ""."""
    if answer.segments:
        if answer.limit is None or len(answer.segments) < answer.limit:
            return ""
        return f"{answer.limit} objects, the most that are kept, so there may be more; raise --max-segments"
    if answer.task == "semantic" or threshold is None:
        return ""
    if answer.highest_score is None:
        return f"nothing above the threshold {threshold:g}, nor below: the model sees no object at all"
    if answer.highest_score > threshold:
        return (
            f"nothing left: what scores above the threshold {threshold:g} (up to {answer.highest_score:.3f}) has too "
            "few pixels of its own"
        )
    return (
        f"nothing above the threshold {threshold:g}; the highest score is {answer.highest_score:.3f} "
        "(--threshold lowers it)"
    )


@dataclass(frozen=True)
class LabelChange:
    """A segment with another label than before, or one that only one answer has.

    Attributes:
        before: the segment (semantic: the class) that the generator saw there, if any.
        after: the segment with a classifier; `None` if none reaches the threshold any more.
        area: pixels that both share, or of the only one.
    """

    before: Segment | None
    after: Segment | None
    area: int

    def as_row(self) -> dict[str, Any]:
        """The entry in the JSON file."""
        old, new = (
            None if side is None else {"label_id": side.label_id, "label": side.label, "score": side.score}
            for side in (self.before, self.after)
        )
        number = None if self.after is None else self.after.id
        return {"id": number, "area": self.area, "old": old, "new": new}


def label_changes(before: SegmentedImage, after: SegmentedImage) -> list[LabelChange]:
    """The segments whose label differs, and those in one answer only; the largest first.

    Panoptic segments are the same if they share more than half of the smaller one; instances if their masks are, with
    the best of several labels for one mask. Semantic: all pixels that changed from one class to another.

    Raises:
        ValueError: the answers are of different tasks or sizes.
    """
    if before.task != after.task or before.segment_map.shape != after.segment_map.shape:
        raise ValueError(
            f"answers of task {before.task} at {before.segment_map.shape} and of task {after.task} at "
            f"{after.segment_map.shape} cannot be compared; take two answers to the same question"
        )
    olds, news = list(before.segments), list(after.segments)
    if before.task == "instance":
        best_olds, best_news = _best_of_masks(olds), _best_of_masks(news)
        pairs = [(best_olds[mask], new, new.area) for mask, new in best_news.items() if mask in best_olds]
        olds, news = list(best_olds.values()), list(best_news.values())
    else:
        # Of the smaller one, so that stuff which was merged, or no longer is, still has its partner.
        least = 0.5 if before.task == "panoptic" else 0.0
        pairs = [pair for pair in _overlaps(before, after) if pair[2] > least * min(pair[0].area, pair[1].area)]
    changes = [LabelChange(*pair) for pair in pairs if pair[0].label_id != pair[1].label_id]
    if before.task != "semantic":
        known = {id(segment) for old, new, _ in pairs for segment in (old, new)}
        changes += [LabelChange(old, None, old.area) for old in olds if id(old) not in known]
        changes += [LabelChange(None, new, new.area) for new in news if id(new) not in known]
    return sorted(changes, key=lambda change: -change.area)


def changes_text(changes: Sequence[LabelChange], num_pixels: int, max_rows: int = 12) -> str:
    """Changes as a table: share of the image, old label and score, new label and score."""
    if not changes:
        return "  no label changed"
    lines = []
    for change in changes[:max_rows]:
        old, new = ("nothing" if side is None else _named(side) for side in (change.before, change.after))
        lines.append(f"  {100 * change.area / num_pixels:5.1f} %  {old} -> {new}")
    if len(changes) > max_rows:
        lines.append(f"  and {len(changes) - max_rows} more")
    return "\n".join(lines)


def _named(segment: Segment) -> str:
    label = printable(segment.label)
    return label if segment.score is None else f"{label} {segment.score:.2f}"


def _best_of_masks(segments: Sequence[Segment]) -> dict[str, Segment]:
    """By mask (its run-length code), the segment with the best score."""
    best: dict[str, Segment] = {}
    for segment in sorted(segments, key=lambda segment: segment.score or 0):
        assert segment.rle is not None  # instances have one
        best[str(segment.rle["counts"])] = segment
    return best


def _overlaps(before: SegmentedImage, after: SegmentedImage) -> list[tuple[Segment, Segment, int]]:
    """Pairs of segments of both answers that share pixels, and how many."""
    old_of, new_of = ({segment.id: segment for segment in side.segments} for side in (before, after))
    # Both ids in one number, so that one pass counts all pairs; void is -1.
    columns = int(after.segment_map.max()) + 2
    codes = (before.segment_map.astype(np.int64) + 1) * columns + after.segment_map + 1
    pairs, areas = np.unique(codes, return_counts=True)
    return [
        (old_of[pair // columns - 1], new_of[pair % columns - 1], area)
        for pair, area in zip(pairs.tolist(), areas.tolist(), strict=True)
        if pair >= columns and pair % columns
    ]
