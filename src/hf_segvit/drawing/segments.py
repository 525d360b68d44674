"""Draw segments and prompts on images, contact sheets, and curves.

- `draw_segments`: an image with its segments tinted, outlined and labelled, in the colours of `segment_colors`.
- `draw_prompts`: an image with points and boxes, each with its answer beside it.
- `contact_sheet`: rows of images under column titles, such as input, truth and prediction.
- `plot_curves`: histories of numbers, one panel per quantity.

A label has the same hue in every image. H W pixels, R segments (rows of `segments_info`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..atomic_files import replacing
from ..models.image_decoding import shown_rgb
from .fonts import drawable, font_of, shortened
from .name_boxes import Measure, draw_labels

Color = tuple[int, int, int]

_LONG = 50  # points; shorter histories get a dot at each point, longer ones a running mean
# OKLab to cube roots of cone responses, and cone responses to linear sRGB; from Ottosson, "A perceptual color space for
# image processing", 2020.
_OKLAB_TO_CONES = [
    [1, 0.3963377774, 0.2158037573],
    [1, -0.1055613458, -0.0638541728],
    [1, -0.0894841775, -1.2914855480],
]
_CONES_TO_RGB = [
    [4.0767416621, -3.3077115913, 0.2309699292],
    [-1.2684380046, 2.6097574011, -0.3413193965],
    [-0.0041960863, -0.7034186147, 1.7076147010],
]


def draw_segments(
    image: Image.Image | np.ndarray,
    segmentation: Any,
    segments_info: Sequence[Mapping[str, Any]],
    id2label: Mapping[int, str],
    *,
    alpha: float = 0.5,
    scale: int = 1,
    measures: Sequence[Measure] | None = None,
    labels: bool = True,
) -> Image.Image:
    """Draw segments over an image: tinted, outlined, and labelled with name and score where there is room.

    Args:
        image: image or (H, W, 3) uint8 array.
        segmentation: (H, W) tensor or array of segment ids; -1 is void and not tinted.
        segments_info: rows with `id`, `label_id` and, optionally, `score`; a row may have no pixels.
        id2label: names by label id.
        alpha: strength of the tint, from 0 (image only) to 1 (colour only).
        scale: whole factor by which the drawing is larger than the image, to make room for labels on small images.
        measures: area and (x, y, width, height) of each row's segment in pixels; None: measured here.
        labels: whether names are written.

    Raises:
        ValueError: sizes differ, the map holds an id without a row, a label has no name, or an option is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; give a number from 0 to 1")
    if scale < 1 or scale != int(scale):
        raise ValueError(f"scale is {scale}; give a whole number of at least 1")
    canvas = shown_rgb(image)
    index = _row_numbers(segmentation, segments_info)
    if index.shape != (canvas.height, canvas.width):
        raise ValueError(
            f"the image is {canvas.height} x {canvas.width} but the segmentation {index.shape[0]} x "
            f"{index.shape[1]} (height x width); pass target_sizes= to the post-processing"
        )
    names = {label: _name(label, id2label) for label in {row["label_id"] for row in segments_info}}
    texts = [_label_text(row, names) for row in segments_info]
    if scale > 1:
        measures = None  # they are in pixels of the unscaled map
        canvas = canvas.resize((canvas.width * scale, canvas.height * scale), Image.Resampling.BICUBIC)
        index = index.repeat(scale, axis=0).repeat(scale, axis=1)

    colors = segment_colors(segments_info)
    row_colors = [colors[row["id"]] for row in segments_info]
    paint = Image.fromarray(np.array([(0, 0, 0), *row_colors], dtype=np.uint8)[index])
    drawing = Image.composite(Image.blend(canvas, paint, alpha), canvas, Image.fromarray(index > 0))
    # One pixel per 500 of the shorter side keeps outlines equally visible at every image size.
    outline = Image.fromarray(_outlines(index, max(1, round(min(index.shape) / 500))) & (index > 0))
    drawing.paste(paint, mask=outline)
    if labels:
        draw_labels(drawing, index, texts, row_colors, measures)
    return drawing


def segment_colors(segments_info: Sequence[Mapping[str, Any]]) -> dict[int, Color]:
    """(red, green, blue) in [0, 255] by segment id: a hue for each label, shades for its segments, always the same."""
    colors: dict[int, Color] = {}
    num_segments: dict[int, int] = {}
    for row in segments_info:
        label, number = row["label_id"], num_segments.get(row["label_id"], 0)
        num_segments[label] = number + 1
        # Multiples of the golden ratio spread any number of hues evenly. Lightness tells labels of similar hue apart,
        # such as k and k + 8, which are 20 degrees apart; with five levels those up to k + 40.
        hue = 360 * ((0.08 + label * 0.6180339887) % 1) + (0, 16, -16, 8, -8)[number % 5]
        lightness = (0.74, 0.58, 0.84, 0.66, 0.5)[label // 8 % 5] + (0, -0.13, 0.07, -0.2, 0.12, -0.07)[number % 6]
        colors[row["id"]] = _oklch_color(min(lightness, 0.9), 0.17, hue)
    return colors


def contact_sheet(
    panels: Sequence[Sequence[Image.Image]],
    column_titles: Sequence[str] = (),
    *,
    row_titles: Sequence[str] = (),
    panel_size: tuple[int, int] | None = None,
) -> Image.Image:
    """Lay out rows of images on white; each is scaled to fit its cell, with its aspect ratio kept.

    Args:
        panels: rows of images.
        column_titles: one for each column, or none; likewise `row_titles`.
        panel_size: (width, height) of a cell in pixels; None: the largest width and height of all images.

    Raises:
        ValueError: there is no image, or not as many titles as rows or columns.
    """
    num_columns = max((len(row) for row in panels), default=0)
    if not num_columns:
        raise ValueError("there is no image to lay out; give at least one row with one image")
    for titles, count, name in ((column_titles, num_columns, "column"), (row_titles, len(panels), "row")):
        if titles and len(titles) != count:
            raise ValueError(f"{len(titles)} {name}_titles for {count} {name}s; give one for each, or none")
    cell_width, cell_height = panel_size or (
        max(panel.width for row in panels for panel in row),
        max(panel.height for row in panels for panel in row),
    )
    fitted = [[_scaled_to_fit(panel, cell_width, cell_height) for panel in row] for row in panels]
    column_titles, row_titles = (
        [drawable(title, title.encode("ascii", "replace").decode()) for title in map(shortened, titles)]
        for titles in (column_titles, row_titles)
    )
    font_size = max(12, round(min(cell_width, cell_height) / 20))
    font, gap = font_of("".join([*column_titles, *row_titles]), font_size), max(4, font_size // 2)
    header, caption = (2 * font_size if titles else 0 for titles in (column_titles, row_titles))
    row_heights = [caption + max((panel.height for panel in row), default=0) + gap for row in fitted]
    sheet = Image.new("RGB", (gap + num_columns * (cell_width + gap), gap + header + sum(row_heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(column_titles):
        center = gap + column * (cell_width + gap) + cell_width // 2
        draw.text((center, gap + header // 2), title, fill="black", font=font, anchor="mm")
    y = gap + header
    for index, row in enumerate(fitted):
        if row_titles:
            draw.text((gap, y + caption // 2), row_titles[index], fill="black", font=font, anchor="lm")
        for column, panel in enumerate(row):
            x = gap + column * (cell_width + gap) + (cell_width - panel.width) // 2
            sheet.paste(panel, (x, y + caption + (row_heights[index] - caption - gap - panel.height) // 2))
        y += row_heights[index]
    return sheet


def plot_curves(
    history: Mapping[str, Sequence[tuple[float, float]]],
    path: str | PathLike[str],
    *,
    title: str = "",
    x_label: str = "step",
    exact: Collection[str] = (),
) -> None:
    """Plot histories into a file, one panel per quantity.

    Args:
        history: (step, value) pairs by name; names of the form `group/name` share a panel.
        path: file to write; its extension (.png, .svg, .pdf) determines the format.
        exact: groups whose values have no noise, such as a schedule's, and are not smoothed.

    Raises:
        ValueError: there is nothing to plot, or the file cannot be written.
    """
    # Imported here, as it takes a second. Not pyplot, which keeps every figure in memory and may open a window.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    path = Path(path)
    if not any(history.values()):
        raise ValueError(f"{path}: there is nothing to plot, as the history holds no values")
    groups: dict[str, list[str]] = {}
    for name in history:
        groups.setdefault(name.split("/")[0], []).append(name)
    num_columns = min(3, len(groups))
    num_rows = math.ceil(len(groups) / num_columns)
    figure = Figure(figsize=(4.6 * num_columns, 3.1 * num_rows), dpi=150, layout="constrained")
    figure.suptitle(title)
    for position, (group, names) in enumerate(groups.items(), start=1):
        axes = figure.add_subplot(num_rows, num_columns, position)
        for name in names:
            steps, values = np.array(history[name], dtype=float).reshape(-1, 2).T
            label = name.removeprefix(group + "/")
            if len(steps) < _LONG:
                axes.plot(steps, values, marker="o", markersize=3, linewidth=1.5, label=label)
            elif group in exact:
                axes.plot(steps, values, linewidth=1.8, label=label)
            else:  # long histories are mostly noisy: the values pale, their running mean strong
                (line,) = axes.plot(steps, _running_mean(values), linewidth=1.8, label=label)
                axes.plot(steps, values, linewidth=0.7, alpha=0.3, color=line.get_color(), zorder=1)
        axes.set_title(group, fontsize=11)
        axes.set_xlabel(x_label)
        whole_steps = all(float(step).is_integer() for name in names for step, _ in history[name])
        axes.xaxis.set_major_locator(MaxNLocator(integer=whole_steps, nbins=6))
        axes.ticklabel_format(axis="y", useOffset=False)  # no "+1.425e3" above an axis with ticks like 0.1
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=9)
    try:
        with replacing(path) as partial:
            figure.savefig(partial)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}; check its folder and the disk") from error


def _row_numbers(segmentation: Any, segments_info: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(H, W) row number of each pixel's segment, counted from 1; 0 for void."""
    if hasattr(segmentation, "detach"):
        segmentation = segmentation.detach().cpu().numpy()
    ids = np.asarray(segmentation)
    if ids.ndim != 2:
        raise ValueError(f"the segmentation has shape {ids.shape}; it must be (height, width)")
    row_ids = np.array([-1] + [row["id"] for row in segments_info], dtype=np.int64)
    # Post-processing numbers ids like rows, from 0, and answers from 1, so the usual cases need no look-up.
    count = len(segments_info)
    for first in (0, 1):
        if (row_ids[1:] == np.arange(first, first + count)).all() and ids.min() >= -1 and ids.max() < first + count:
            if first == 0:
                return ids.astype(np.int32) + 1
            if not (ids == 0).any():
                return np.maximum(ids, 0).astype(np.int32)
    order = np.argsort(row_ids, kind="stable")
    position = np.minimum(np.searchsorted(row_ids[order], ids), len(order) - 1)
    is_known = row_ids[order][position] == ids
    if not is_known.all():
        unknown = np.unique(ids[~is_known])[:5].tolist()
        raise ValueError(f"the segmentation holds ids {unknown} that segments_info has no row for; add the rows")
    return order[position]


def _name(label_id: int, id2label: Mapping[int, str]) -> str:
    if label_id not in id2label:
        raise ValueError(f"a segment has label_id {label_id}, which id2label has no name for")
    return drawable(shortened(str(id2label[label_id])), f"class {label_id}")


def _label_text(row: Mapping[str, Any], names: Mapping[int, str]) -> str:
    name = names[row["label_id"]]
    return name if row.get("score") is None else f"{name} {row['score']:.2f}"


def _outlines(index: np.ndarray, thickness: int) -> np.ndarray:
    """(H, W) bool: pixels at most `thickness` away, along a row or column, from another segment."""
    edges = np.zeros(index.shape, dtype=bool)
    for shift in range(1, thickness + 1):
        vertical, horizontal = index[shift:] != index[:-shift], index[:, shift:] != index[:, :-shift]
        edges[shift:] |= vertical
        edges[:-shift] |= vertical
        edges[:, shift:] |= horizontal
        edges[:, :-shift] |= horizontal
    return edges


def _oklch_color(lightness: float, chroma: float, hue: float) -> Color:
    """sRGB of an OKLCH colour, a space in which equal steps look equal; hue in degrees."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    cones = np.array(_OKLAB_TO_CONES) @ [lightness, a, b]
    linear = np.clip(np.array(_CONES_TO_RGB) @ cones**3, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)  # gamma of sRGB
    red, green, blue = (int(value) for value in np.rint(255 * encoded))
    return red, green, blue


def _scaled_to_fit(panel: Image.Image, width: int, height: int) -> Image.Image:
    factor = min(width / panel.width, height / panel.height)
    size = (max(1, round(panel.width * factor)), max(1, round(panel.height * factor)))
    return shown_rgb(panel).resize(size, Image.Resampling.LANCZOS)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a tenth of the points, half as many at the ends."""
    centers, half = np.arange(len(values)), max(1, len(values) // 20)
    low, high = np.maximum(centers - half, 0), np.minimum(centers + half + 1, len(values))
    total = np.concatenate([[0], np.cumsum(values)])
    return (total[high] - total[low]) / (high - low)


def draw_prompts(
    image: Image.Image,
    points: Sequence[Sequence[float]],
    boxes: Sequence[Sequence[float]],
    label_ids: Sequence[int],
    texts: Sequence[str],
) -> Image.Image:
    """Draw points as dots and boxes as frames, coloured by label, with a text beside each where there is room.

    Args:
        points: (x, y) in pixels; integers are pixel centres.
        boxes: (x0, y0, x1, y1), edges in pixels.
        label_ids: labels of the points, then of the boxes.
        texts: texts in the same order.

    Raises:
        ValueError: the number of labels or texts differs from that of prompts.
    """
    count = len(points) + len(boxes)
    if len(label_ids) != count or len(texts) != count:
        raise ValueError(f"{count} prompts need as many label_ids and texts, not {len(label_ids)} and {len(texts)}")
    drawing = shown_rgb(image).copy()
    side = min(drawing.size)
    # One row for each label, so that all prompts of a label get its first shade.
    colors = segment_colors([{"id": label, "label_id": label} for label in sorted(set(label_ids))])
    radius, line = max(2, round(side / 90)), max(1, round(side / 250))
    # A segment map of the marks, as `draw_labels` needs it; points are drawn last, as a box would hide them.
    marks = Image.new("I", drawing.size, 0)
    canvas, mark = ImageDraw.Draw(drawing), ImageDraw.Draw(marks)
    for index, box in enumerate(boxes, start=len(points)):
        frame = tuple(np.minimum(np.round(box).astype(int), np.array([*drawing.size, *drawing.size]) - 1).tolist())
        canvas.rectangle(frame, outline="white", width=line + 2)
        canvas.rectangle(frame, outline=colors[label_ids[index]], width=line)
        mark.rectangle(frame, outline=index + 1, width=line)
    for index, (x, y) in enumerate(points):
        dot = (x + 0.5 - radius, y + 0.5 - radius, x + 0.5 + radius, y + 0.5 + radius)
        canvas.ellipse(dot, fill=colors[label_ids[index]], outline="white", width=max(1, radius // 3))
        mark.ellipse(dot, fill=index + 1)
    texts = [drawable(shortened(text), f"class {label}") for text, label in zip(texts, label_ids, strict=True)]
    draw_labels(drawing, np.array(marks, dtype=np.int64), texts, [colors[label] for label in label_ids])
    return drawing
