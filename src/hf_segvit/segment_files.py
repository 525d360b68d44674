"""The files that `hf-segvit segment` writes for a picture.

`NAME.overlay.png`: the picture with its segments tinted, outlined and labelled. `NAME.panoptic.png` (panoptic): segment
ids in COCO's encoding, id = R + 256 * G + 65536 * B, void 0. `NAME.semantic.png` (semantic): one channel of class ids.
`NAME.segments.json`: what the segments are, in this form:

    {"format": "hf-segvit segments", "version": 1,
     "model": "...", "task": "panoptic", "threshold": 0.8,        # as given, or the checkpoint's own; null: none
     "picture": "cat.jpg", "width": 640, "height": 480,
     "segments": [{"id": 1, "label_id": 15, "label": "cat", "score": 0.98, "area": 1234, "bbox": [x, y, w, h]}]}

`id` is the value of the segment's pixels in the PNG beside: 1, 2, ... (panoptic), the class (semantic, where `score`
is null). Instances are numbered 1, 2, ... and carry `segmentation`, their mask in COCO's RLE, as they may overlap.
`area` and `bbox` are in pixels of the picture as it is shown, with the EXIF orientation applied. With a classifier the
fields `classifier` and `alpha` follow `model`; after a comparison there are also NAME.comparison.png and

     "label_changes": [{"id": 1, "area": 1234, "old": {"label_id": 16, "label": "dog", "score": 0.61},
                        "new": {"label_id": 15, "label": "cat", "score": 0.98}}]

where `old` is null for a segment that the generator alone would not have shown, and `new` (with `id`) for one that no
longer reaches the threshold.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .atomic_files import replacing
from .data.panoptic_png import panoptic_png
from .label_changes import draw_comparison, label_changes
from .segmentation import SegmentedPicture
from .visualize import draw_segments

FORMAT, VERSION = "hf-segvit segments", 1


def write_segment_files(
    prefix: Path,
    picture: Image.Image,
    answer: SegmentedPicture,
    id2label: dict[int, str],
    about: dict[str, Any],
    before: SegmentedPicture | None = None,
) -> list[Path]:
    """Write the files of one picture, each whole or not at all.

    Args:
        prefix: folder and NAME.
        picture: the picture, for the overlay.
        answer: its segments.
        id2label: names of all classes.
        about: `model`, `threshold` and `picture` of the JSON file, and `classifier` and `alpha` if there are.
        before: what the generator alone answered, to draw and list what changed.

    Returns:
        The files written.

    Raises:
        OSError: the folder cannot be written to.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    endings = (*_endings(answer.task), *(() if before is None else ("comparison.png",)))
    paths = {ending: prefix.with_name(f"{prefix.name}.{ending}") for ending in endings}
    rows = [{"id": s.id, "label_id": s.label_id, "score": s.score} for s in answer.segments]
    with replacing(paths["overlay.png"]) as partial:
        draw_segments(picture, answer.segment_map, rows, id2label).save(partial)
    if answer.task == "panoptic":
        panoptic_png(answer.segment_map, paths["panoptic.png"])
    elif answer.task == "semantic":
        with replacing(paths["semantic.png"]) as partial:
            label_map = answer.segment_map.astype(np.uint8 if len(id2label) <= 256 else np.uint16)
            Image.fromarray(label_map).save(partial)
    if before is not None:
        with replacing(paths["comparison.png"]) as partial:
            draw_comparison(picture, before, answer, id2label).save(partial)
    # Last, so that whoever finds the list finds what it speaks of.
    with replacing(paths["segments.json"]) as partial:
        partial.write_text(_json(_description(answer, about, before)), encoding="utf-8")
    return list(paths.values())


def _endings(task: str) -> tuple[str, ...]:
    if task == "instance":
        return ("overlay.png", "segments.json")
    return ("overlay.png", f"{task}.png", "segments.json")


def _description(
    answer: SegmentedPicture, about: dict[str, Any], before: SegmentedPicture | None = None
) -> dict[str, Any]:
    height, width = answer.segment_map.shape
    first = 0 if answer.task == "semantic" else 1
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
    if before is not None:
        description["label_changes"] = [change.as_row(first) for change in label_changes(before, answer)]
    return description


def _json(description: dict[str, Any]) -> str:
    """One line for each field, segment and change, for people and `diff`."""
    fields = {name: json.dumps(value) for name, value in description.items()}
    for name in ("segments", "label_changes"):
        if description.get(name):
            fields[name] = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in description[name]) + "\n ]"
    return "{\n" + ",\n".join(f" {json.dumps(name)}: {text}" for name, text in fields.items()) + "\n}\n"
