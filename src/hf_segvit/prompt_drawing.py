"""A picture with the points and boxes that were asked about, each with its answer beside it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .label_boxes import draw_labels
from .visualize import segment_colors


def draw_prompts(
    image: Image.Image,
    points: Sequence[Sequence[float]],
    boxes: Sequence[Sequence[float]],
    label_ids: Sequence[int],
    texts: Sequence[str],
) -> Image.Image:
    """Draw points as dots and boxes as frames, coloured by label, with a text beside each.

    Args:
        image: the picture.
        points: (x, y) in pixels, those of pixels rather than of their corners.
        boxes: (x0, y0, x1, y1), edges in pixels.
        label_ids: of the points, then of the boxes.
        texts: what is written beside each, in the same order. One that finds no free place is left out.

    Returns:
        The drawing, RGB, of the picture's size.

    Raises:
        ValueError: there are not as many labels or texts as prompts.
    """
    count = len(points) + len(boxes)
    if len(label_ids) != count or len(texts) != count:
        raise ValueError(f"{count} prompts need as many label_ids and texts, not {len(label_ids)} and {len(texts)}")
    drawing = image.convert("RGB")
    if drawing is image:
        drawing = image.copy()
    side = min(drawing.size)
    # Prompts of one label have one colour: the rows are numbered by label, so none is the second of its label.
    colors = segment_colors([{"id": label, "label_id": label} for label in sorted(set(label_ids))])
    radius, line = max(2, round(side / 90)), max(1, round(side / 250))
    # Where each prompt's marks are, for labels to keep off and point to; the last drawn lies on top.
    marks = Image.new("I", drawing.size, 0)
    canvas, places = ImageDraw.Draw(drawing), ImageDraw.Draw(marks)
    for number, box in enumerate(boxes, start=len(points)):
        frame = tuple(np.minimum(np.round(box).astype(int), np.array([*drawing.size, *drawing.size]) - 1).tolist())
        canvas.rectangle(frame, outline="white", width=line + 2)
        canvas.rectangle(frame, outline=colors[label_ids[number]], width=line)
        places.rectangle(frame, outline=number + 1, width=line)
    for number, (x, y) in enumerate(points):
        dot = (x + 0.5 - radius, y + 0.5 - radius, x + 0.5 + radius, y + 0.5 + radius)
        canvas.ellipse(dot, fill=colors[label_ids[number]], outline="white", width=max(1, radius // 3))
        places.ellipse(dot, fill=number + 1)
    draw_labels(drawing, np.array(marks, dtype=np.int64), texts, [colors[label] for label in label_ids])
    return drawing
