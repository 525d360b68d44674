"""What a classifier changed: the segments that two answers to one picture name differently.

`label_changes` finds them; `changes_text` tells them as a table; `draw_comparison` draws picture, generator and fused
answer side by side. The two answers come from the same masks, as `Segmenter.compare` gives them.

Shapes: H W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .segmentation import Segment, SegmentedPicture
from .visualize import contact_sheet, draw_segments

TITLES = ("picture", "generator", "with ViT-P")


@dataclass(frozen=True)
class LabelChange:
    """A segment that is called something else than before, is no more, or is new.

    Attributes:
        before: the segment, or for semantic segmentation the class, that the generator saw there; `None` if none.
        after: what is there now; `None` where nothing reaches the threshold any more.
        area: pixels that both have in common, or of the one that there is.
    """

    before: Segment | None
    after: Segment | None
    area: int

    def as_row(self, first_id: int = 0) -> dict[str, Any]:
        """For JSON: `id` as in the list of segments, `area`, and `old` and `new`, null or `label_id`, `label`, `score`.

        Ids are counted from `first_id`.
        """
        old, new = (
            None if side is None else {"label_id": side.label_id, "label": side.label, "score": side.score}
            for side in (self.before, self.after)
        )
        number = None if self.after is None else self.after.id + first_id
        return {"id": number, "area": self.area, "old": old, "new": new}


def label_changes(before: SegmentedPicture, after: SegmentedPicture) -> list[LabelChange]:
    """The segments whose label differs, and those that are there in one answer only; the largest first.

    Panoptic: two segments are the same where they share more than half of the smaller one, so that stuff which was
    merged, or is no more, counts too. Instances are the same if their masks are; of several labels for one mask the
    best counts. Semantic: all pixels that went from one class to another.

    Args:
        before: the generator's answer.
        after: that with a classifier, of the same picture and task.

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
        least = 0.5 if before.task == "panoptic" else 0.0
        pairs = [pair for pair in _overlaps(before, after) if pair[2] > least * min(pair[0].area, pair[1].area)]
    changes = [LabelChange(*pair) for pair in pairs if pair[0].label_id != pair[1].label_id]
    if before.task != "semantic":
        known = {id(segment) for old, new, _ in pairs for segment in (old, new)}
        changes += [LabelChange(old, None, old.area) for old in olds if id(old) not in known]
        changes += [LabelChange(None, new, new.area) for new in news if id(new) not in known]
    return sorted(changes, key=lambda change: -change.area)


def changes_text(changes: Sequence[LabelChange], num_pixels: int, max_rows: int = 12) -> str:
    """Changes as a table, a line each: share of the picture, old name and score, new name and score."""
    if not changes:
        return "  no label changed"
    lines = []
    for change in changes[:max_rows]:
        old, new = (
            "nothing" if side is None else side.label if side.score is None else f"{side.label} {side.score:.2f}"
            for side in (change.before, change.after)
        )
        lines.append(f"  {100 * change.area / num_pixels:5.1f} %  {old} -> {new}")
    if len(changes) > max_rows:
        lines.append(f"  and {len(changes) - max_rows} more")
    return "\n".join(lines)


def draw_comparison(
    picture: Image.Image, before: SegmentedPicture, after: SegmentedPicture, id2label: Mapping[int, str]
) -> Image.Image:
    """Picture, generator's answer and fused answer side by side, under titles."""
    drawings = [draw_segments(picture, side.segment_map, _rows(side), id2label) for side in (before, after)]
    return contact_sheet([[picture, *drawings]], TITLES)


def _rows(answer: SegmentedPicture) -> list[dict[str, Any]]:
    return [{"id": s.id, "label_id": s.label_id, "score": s.score} for s in answer.segments]


def _best_of_masks(segments: Sequence[Segment]) -> dict[str, Segment]:
    """By mask (its run-length code), the segment with the best score."""
    best: dict[str, Segment] = {}
    for segment in sorted(segments, key=lambda segment: segment.score or 0):
        assert segment.rle is not None  # instances have one
        best[str(segment.rle["counts"])] = segment
    return best


def _overlaps(before: SegmentedPicture, after: SegmentedPicture) -> list[tuple[Segment, Segment, int]]:
    """Segments of both answers that share pixels, and how many."""
    old_of, new_of = ({segment.id: segment for segment in side.segments} for side in (before, after))
    columns = int(after.segment_map.max()) + 2  # ids count from 0, void is -1
    codes = (before.segment_map.astype(np.int64) + 1) * columns + after.segment_map + 1
    pairs, areas = np.unique(codes, return_counts=True)
    return [
        (old_of[pair // columns - 1], new_of[pair % columns - 1], area)
        for pair, area in zip(pairs.tolist(), areas.tolist(), strict=True)
        if pair >= columns and pair % columns
    ]
