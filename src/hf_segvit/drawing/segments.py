"""Draw segments and prompts on images, contact sheets, and curves.

- `draw_segments`: an image with its segments tinted, outlined and labelled, in the colours of colors.py.
- `draw_prompts`: an image with points and boxes, each with its answer beside it.
- `contact_sheet`: rows of images under column titles, such as input, truth and prediction.
- `plot_curves`: histories of numbers, one panel per quantity.

A class has the same colour in every image. H W pixels, R segments (rows of `segments_info`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..atomic_files import writing
from ..models.image_decoding import shown_rgb
from .colors import Color, class_color, segment_colors
from .fonts import drawable, font_of, shortened
from .name_boxes import Measure, label_marks, label_segments, legend, letter_size

_LONG = 50  # points; shorter histories get a dot at each point, longer ones a running mean


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
    with_legend: bool = False,
    strength: np.ndarray | None = None,
) -> Image.Image:
    """Draw segments over an image: tinted, outlined, and labelled with name and score where there is room.

    A name is written only inside of its segment, and never over another name.

    Args:
        image: image or (H, W, 3) uint8 array.
        segmentation: (H, W) tensor or array of segment ids; -1 is void and not tinted.
        segments_info: rows with `id`, `label_id` and, optionally, `score`; a row may have no pixels.
        id2label: names by label id.
        alpha: strength of the tint, from 0 (image only) to 1 (colour only).
        scale: whole factor by which the drawing is larger than the image, to make room for labels on small images.
        measures: area and (x, y, width, height) of each row's segment in pixels; None: measured here.
        labels: whether names are written.
        with_legend: whether classes without a written name are listed below the image, which makes the drawing higher.
        strength: (H, W) in [0, 1], by which tint and outlines are weakened pixel by pixel; None: 1 everywhere.

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
    if scale > 1:
        measures = None  # they are in pixels of the unscaled map
        canvas = canvas.resize((canvas.width * scale, canvas.height * scale), Image.Resampling.BICUBIC)
        index = index.repeat(scale, axis=0).repeat(scale, axis=1)
        strength = None if strength is None else strength.repeat(scale, axis=0).repeat(scale, axis=1)

    colors = segment_colors(segments_info)
    row_colors = [colors[row["id"]] for row in segments_info]
    paint = Image.fromarray(np.array([(0, 0, 0), *row_colors], dtype=np.uint8)[index])
    tinted = index > 0 if strength is None else np.where(index > 0, np.rint(255 * strength), 0).astype(np.uint8)
    drawing = Image.composite(Image.blend(canvas, paint, alpha), canvas, Image.fromarray(tinted))
    # One pixel per 500 of the shorter side keeps outlines equally visible at every image size.
    outline = _outlines(index, max(1, round(min(index.shape) / 500))) & (index > 0)
    drawing.paste(paint, mask=Image.fromarray(outline if strength is None else tinted * outline))
    if not labels:
        return drawing
    texts = [_label_texts(row, names) for row in segments_info]
    written = label_segments(drawing, index, texts, row_colors, measures)
    if not with_legend:
        return drawing
    visible = np.bincount(index.ravel(), minlength=len(segments_info) + 1)[1:]
    counts = Counter(row["label_id"] for row, area in zip(segments_info, visible, strict=True) if area)
    unnamed = sorted({*counts} - {segments_info[number]["label_id"] for number in written})
    if not unnamed:
        return drawing
    entries = {
        names[label] + (f" ({counts[label]})" if counts[label] > 1 else ""): class_color(label) for label in unnamed
    }
    return _stacked(drawing, legend(drawing.width, entries, letter_size(drawing, len(texts))))


def class_legend(answers: Iterable[Sequence[Mapping[str, Any]]], id2label: Mapping[int, str]) -> dict[str, Color]:
    """The legend of several drawings: colour by name of all classes in the `segments_info` of any, in their order."""
    labels = {row["label_id"] for rows in answers for row in rows}
    return {_name(label, id2label): class_color(label) for label in sorted(labels)}


def contact_sheet(
    panels: Sequence[Sequence[Image.Image]],
    column_titles: Sequence[str] = (),
    *,
    row_titles: Sequence[str] = (),
    panel_size: tuple[int, int] | None = None,
    entries: Mapping[str, Color] | None = None,
) -> Image.Image:
    """Lay out rows of images on white; each is scaled to fit its cell, with its aspect ratio kept.

    Args:
        panels: rows of images.
        column_titles: one for each column, or none; likewise `row_titles`.
        panel_size: (width, height) of a cell in pixels; None: the largest width and height of all images.
        entries: colour by name for a legend below, see `class_legend`.

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
    return _stacked(sheet, legend(sheet.width, entries, font_size)) if entries else sheet


def plot_curves(
    history: Mapping[str, Sequence[tuple[float, float]]],
    path: str | PathLike[str],
    *,
    title: str = "",
    x_label: str | Mapping[str, str] = "step",
    columns: int = 3,
    exact: Collection[str] = (),
) -> None:
    """Plot histories into a file, one panel per quantity.

    Args:
        history: (step, value) pairs by name; names of the form `group/name` share a panel.
        path: file to write; its extension (.png, .svg, .pdf) determines the format.
        x_label: below every panel, or by group.
        columns: most panels side by side.
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
    num_columns = min(columns, len(groups))
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
        axes.set_xlabel(x_label if isinstance(x_label, str) else x_label[group])
        whole_steps = all(float(step).is_integer() for name in names for step, _ in history[name])
        axes.xaxis.set_major_locator(MaxNLocator(integer=whole_steps, nbins=6))
        axes.ticklabel_format(axis="y", useOffset=False)  # no "+1.425e3" above an axis with ticks like 0.1
        _widen(axes)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=9)
    with writing(path) as partial:
        figure.savefig(partial)


def _widen(axes: Any) -> None:
    """Show at least 2 % of the values' size, lest rounding errors of a constant fill the panel."""
    low, high = axes.get_ylim()
    missing = 0.02 * max(abs(low), abs(high)) - (high - low)
    if missing > 0:
        axes.set_ylim(low - missing / 2, high + missing / 2)


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


def _label_texts(row: Mapping[str, Any], names: Mapping[int, str]) -> list[str]:
    name = names[row["label_id"]]
    return [name] if row.get("score") is None else [f"{name} {row['score']:.2f}", name]


def _stacked(above: Image.Image, below: Image.Image) -> Image.Image:
    both = Image.new("RGB", (above.width, above.height + below.height), "white")
    both.paste(above, (0, 0))
    both.paste(below, (0, above.height))
    return both


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
    # A map of the marks, as `label_marks` needs it; points are drawn last, as a box would hide them.
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
    label_marks(drawing, np.array(marks, dtype=np.int64), texts, [colors[label] for label in label_ids])
    return drawing
