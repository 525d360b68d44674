"""The files that `hf-segvit segment` writes for an image.

- `NAME.overlay.png`: the image with its segments tinted, outlined and labelled.
- `NAME.panoptic.png` (panoptic): segment ids in COCO's encoding, id = R + 256 * G + 65536 * B, void 0.
- `NAME.semantic.png` (semantic): one channel of class ids.
- `NAME.segments.json`: what the segments are; its form is described at `_description`.
- `NAME.comparison.png`: with a classifier, the generator's answer beside the fused one.

`write_segment_files` writes them. `remark` says why an answer is empty, or cut. `label_changes` finds the segments
whose label a classifier changed; `changes_text` formats them as a table. H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..atomic_files import replacing, write_json
from ..data.mask_files import panoptic_png
from ..drawing.segments import contact_sheet, draw_segments
from ..lookup import printable
from .segmenter import Segment, SegmentedImage

FORMAT, VERSION = "hf-segvit segments", 1
TITLES = ("image", "generator", "with ViT-P")  # columns of the comparison


class OccupiedName(ValueError):
    """Something else has the name of a result."""


def write_segment_files(
    prefix: Path,
    image: Any,
    answer: SegmentedImage,
    id2label: dict[int, str],
    about: dict[str, Any],
    before: SegmentedImage | None = None,
) -> list[Path]:
    """Write the files of one image, each whole or not at all, and return their paths.

    Args:
        prefix: folder and NAME.
        image: the image, for the overlay.
        id2label: names of all classes.
        about: `model`, `threshold` and `picture` of the JSON file, and `classifier` and `alpha` if there are.
        before: the generator's own answer, to draw and list what changed.
    """
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OccupiedName(f"cannot write to {prefix.parent}: a file is in its way; move it") from error
    endings = ["overlay.png", "segments.json"]
    endings += [] if answer.task == "instance" else [f"{answer.task}.png"]
    endings += [] if before is None else ["comparison.png"]
    paths = {ending: prefix.with_name(f"{prefix.name}.{ending}") for ending in endings}
    for path in paths.values():
        if path.is_dir():
            raise OccupiedName(f"cannot write {path}: it is a folder; move it, or choose another --output")
    overlay = draw_segments(image, answer.segment_map, answer.segments_info, id2label, measures=answer.measures)
    with replacing(paths["overlay.png"]) as partial:
        overlay.save(partial)
    if answer.task == "panoptic":
        panoptic_png(answer.segment_map, paths["panoptic.png"])
    elif answer.task == "semantic":
        with replacing(paths["semantic.png"]) as partial:
            label_map = answer.segment_map.astype(np.uint8 if len(id2label) <= 256 else np.uint16)
            Image.fromarray(label_map).save(partial)
    if before is not None:
        alone = draw_segments(image, before.segment_map, before.segments_info, id2label, measures=before.measures)
        with replacing(paths["comparison.png"]) as partial:
            contact_sheet([[image, alone, overlay]], TITLES).save(partial)
    # Written last: the list must never name a file that is missing.
    write_json(paths["segments.json"], _description(answer, about, before))
    return list(paths.values())


# The JSON file has this form (null threshold: none; `classifier` and `alpha` follow `model` if there is a classifier):
#
#     {"format": "hf-segvit segments", "version": 1, "model": "...", "task": "panoptic", "threshold": 0.8,
#      "picture": "cat.jpg", "width": 640, "height": 480,
#      "segments": [{"id": 1, "label_id": 15, "label": "cat", "score": 0.98, "area": 1234, "bbox": [x, y, w, h]}],
#      "label_changes": [{"id": 1, "area": 1234, "old": {"label_id": 16, "label": "dog", "score": 0.61},
#                         "new": {"label_id": 15, "label": "cat", "score": 0.98}}]}
#
# `id` is the value of the segment's pixels in the PNG: 1, 2, ... (panoptic), or the class (semantic, where `score` is
# null). Instances are numbered 1, 2, ... and carry `segmentation`, their mask in COCO's RLE, as they may overlap.
# `highest_score` follows `segments` where these are empty: the best score that did not suffice.
# `area` and `bbox` are in pixels of the image as displayed, with its EXIF orientation applied. `label_changes` comes
# with a comparison; `old` is null for a segment that the generator alone would not have shown, `new` and `id` for one
# that no longer reaches the threshold.
def _description(answer: SegmentedImage, about: dict[str, Any], before: SegmentedImage | None) -> dict[str, Any]:
    height, width = answer.segment_map.shape
    first = 0 if answer.task == "semantic" else 1  # in the panoptic PNG 0 is void
    segments = []
    for segment in answer.segments:
        row: dict[str, Any] = {
            "id": segment.id + first,
            "label_id": segment.label_id,
            "label": segment.label,
            "score": segment.score,
            "area": segment.area,
            "bbox": list(segment.bbox),
        }
        if segment.rle is not None:
            row["segmentation"] = segment.rle
        segments.append(row)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "model": about["model"],
        **{name: about[name] for name in ("classifier", "alpha") if about.get(name) is not None},
        "task": answer.task,
        "threshold": about["threshold"],
        "picture": about["picture"],
        "width": width,
        "height": height,
        "segments": segments,
    }
    if not segments and answer.highest_score is not None:
        description["highest_score"] = answer.highest_score
    if before is not None:
        description["label_changes"] = [change.as_row(first) for change in label_changes(before, answer)]
    return description


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

    def as_row(self, first_id: int = 0) -> dict[str, Any]:
        """The entry in the JSON file, with ids counted from `first_id`."""
        old, new = (
            None if side is None else {"label_id": side.label_id, "label": side.label, "score": side.score}
            for side in (self.before, self.after)
        )
        number = None if self.after is None else self.after.id + first_id
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
    # Both ids in one number, so that one pass counts all pairs. Ids count from 0, void is -1.
    columns = int(after.segment_map.max()) + 2
    codes = (before.segment_map.astype(np.int64) + 1) * columns + after.segment_map + 1
    pairs, areas = np.unique(codes, return_counts=True)
    return [
        (old_of[pair // columns - 1], new_of[pair % columns - 1], area)
        for pair, area in zip(pairs.tolist(), areas.tolist(), strict=True)
        if pair >= columns and pair % columns
    ]
