"""Answers of the page and the API to one upload: drawings, tables, files.

Nothing here needs Gradio, and nothing is kept between calls: all that an answer depends on is passed in, and its files
go to the folder that is named. Drawings to show are scaled to fit a screen; files have the size of the image. H W
pixels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..atomic_files import write_json
from ..drawing.colors import segment_colors
from ..drawing.segments import draw_prompts, draw_segments
from ..inference.exports import Classes, row_of, write_folder_exports
from ..inference.loading import is_fused
from ..inference.memory import is_out_of_memory
from ..inference.output_files import LabelChange, label_changes, remark
from ..inference.point_classifier import PointClassifier
from ..inference.segmented_image import OutputChoice, SegmentedImage, save_image
from ..inference.segmenter import Segmenter
from ..inference.task_settings import refuse_threshold
from ..lookup import printable
from ..models.image_claims import FREE_FOR_INFERENCE
from ..models.image_decoding import image_size, open_image, shown_rgb
from ..models.image_values import ImageSettings

SHOWN_SIDE = 1600  # pixels of the longer side of a drawing on the page, at most
LEAST_SIDE = 480  # of the shorter side, so that names can be read: smaller images are enlarged by whole factors
MAX_POINTS = 100
MAX_ROWS = 200  # of a table on the page; files have all


@dataclass(frozen=True)
class Answer:
    """The answer for an image.

    Attributes:
        result: the segments, with their image.
        before: what the generator alone answers, if labels were corrected.
        changes: the segments whose label the ViT-P changed.
        remark: what a user should know about an empty or cut answer, or "".
        description: the content of the JSON file.
    """

    result: SegmentedImage
    before: SegmentedImage | None
    changes: list[LabelChange]
    remark: str
    description: dict[str, Any]


def open_upload(path: str | None, settings: ImageSettings) -> Any:
    """The pixels of an uploaded file, checked before anything is decoded; errors do not name its folder."""
    if not path:
        raise ValueError("there is no image; upload one, or choose an example")
    file = Path(path)
    if not file.is_file():
        raise ValueError(
            f"{file.name}: the upload is no longer here, as uploads are deleted after a while; upload it again"
        )
    return open_image(file.read_bytes(), printable(file.name), settings, free_pixels=FREE_FOR_INFERENCE)


def segment(
    segmenter: Segmenter,
    path: str | None,
    *,
    threshold: float | None = None,
    alpha: float | None = None,
    compare: bool = False,
    model_name: str = "",
) -> Answer:
    """Segment an uploaded file.

    Args:
        threshold: score that a segment needs; `None`: the model's. Ignored for semantic segmentation.
        alpha: weight of the ViT-P; `None`: the model's.
        compare: also answer with the generator alone.
        model_name: what the files say.

    Raises:
        ValueError: there is no upload, it is no image, too large, or does not fit the model, or a number is outside
            [0, 1].
    """
    if segmenter.task == "semantic":
        threshold = None
    refuse_threshold(segmenter.task, threshold)
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is outside [0, 1]: 0 is the generator's answer, 1 is the ViT-P's")
    name = Path(path).name if path else ""
    image = open_upload(path, segmenter.file_settings)
    threshold = segmenter.default_threshold if threshold is None else threshold
    compare = compare and is_fused(segmenter.model)
    try:
        before, result = _asked(segmenter, image, threshold, alpha, compare)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(f"{name}: the memory does not suffice for it; scale it down") from error
    result = replace(result, image=image, source=name)
    about = {"model": model_name, "threshold": threshold, "picture": name, "alpha": alpha if compare else None}
    changes = [] if before is None else label_changes(before, result)
    description = result.description(about)
    if before is not None:
        before = replace(before, image=image, source=name)
        description["label_changes"] = [change.as_row() for change in changes]
    text = remark(result, threshold).replace("--threshold lowers it", "lower it to see more")
    return Answer(result, before, changes, text.replace("; raise --max-segments", ""), description)


def _asked(
    segmenter: Segmenter, image: Any, threshold: float | None, alpha: float | None, compare: bool
) -> tuple[SegmentedImage | None, SegmentedImage]:
    """What the generator alone answers, if that is asked for, and the answer."""
    if not is_fused(segmenter.model):
        return None, segmenter(image, threshold if segmenter.task != "semantic" else None)
    ((before, result),) = (
        pair
        for asked in segmenter.ask([image], threshold, alpha)
        for pair in (
            segmenter.compared(asked, threshold)
            if compare
            else [(None, answer) for answer in segmenter.results(asked, threshold)]
        )
    )
    return before, result


def write_files(answer: Answer, classes: Classes, folder: Path) -> list[Path]:
    """Write the downloads: overlay, ids as PNG, the JSON of `hf-segvit segment`, and COCO's annotations and results."""
    folder.mkdir(parents=True)
    name, result = (Path(answer.result.source).stem or "image")[:100], answer.result
    paths = result.save(folder / name, choice=OutputChoice(frozenset({"overlay", result.task})))
    if result.task == "instance":
        paths.append(folder / f"{name}.instance.png")
        save_image(Image.fromarray(np.maximum(result.segment_map, 0).astype(np.uint16)), paths[-1])
    paths.append(folder / f"{name}.segments.json")
    write_json(paths[-1], answer.description)
    row = row_of(name, result.source, result, whole=True)
    write_folder_exports(["coco"], folder, lambda: iter([row]), classes)
    return [*paths, folder / "coco_annotations.json", folder / "coco_results.json"]


def classify(
    classifier: PointClassifier, path: str | None, points: Sequence[Any] = (), boxes: Sequence[Any] = (), top_k: int = 3
) -> list[dict[str, Any]]:
    """Name what is at points (x, y) and in boxes (x0, y0, x1, y1) of an uploaded file, in pixels of the upright image.

    Gives for each its `point` or `box`, and its `classes` as `PointClassifier.classify` does.

    Raises:
        ValueError: there is no upload or no prompt, or a prompt has another form or is outside the image.
    """
    asked = {"point": _prompts(points, 2, "points"), "box": _prompts(boxes, 4, "boxes")}
    prompts = [{kind: prompt} for kind, each in asked.items() for prompt in each]
    if not prompts:
        raise ValueError("there is nothing to classify; click a point of the image, or send points or boxes")
    if len(prompts) > MAX_POINTS:
        raise ValueError(f"{len(prompts)} points and boxes; ask for at most {MAX_POINTS} at a time")
    if isinstance(top_k, bool) or top_k != int(top_k) or top_k < 1:
        raise ValueError(f"top_k={top_k} must be a whole number of at least 1")
    image = open_upload(path, classifier.file_settings)
    answers = classifier.classify(image, asked["point"], asked["box"], top_k=min(int(top_k), len(classifier.id2label)))
    return [{**prompt, "classes": classes} for prompt, classes in zip(prompts, answers, strict=True)]


def _prompts(prompts: Any, count: int, name: str) -> list[list[float]]:
    """Lists of `count` finite numbers."""
    prompts = prompts or []
    for prompt in prompts if isinstance(prompts, list | tuple) else [None]:
        numbers = prompt if isinstance(prompt, list | tuple) else ()
        if len(numbers) != count or not all(
            isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
            for number in numbers
        ):
            form = "[x, y]" if count == 2 else "[x0, y0, x1, y1]"
            raise ValueError(f"{name}: {str(prompts)[:100]} is no list of {form}, in pixels")
    return [list(prompt) for prompt in prompts]


# Drawings to show.


def shown_scale(image: Any) -> float:
    """By how much a drawing on the page is larger than its image: a whole number, or less than 1."""
    height, width = image_size(image)
    if max(height, width) > SHOWN_SIDE:
        return SHOWN_SIDE / max(height, width)
    return max(1, min(-(-LEAST_SIDE // min(height, width)), SHOWN_SIDE // max(height, width)))


def shown_segments(result: SegmentedImage, labels: bool = True) -> Image.Image:
    """The overlay to show: a small image is enlarged before names are drawn, a large one scaled down."""
    scale = shown_scale(result.image)
    image, segment_map = shown_rgb(result.image), result.segment_map
    if scale < 1:
        # Names are drawn at the size that is looked at.
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
        segment_map = np.asarray(Image.fromarray(segment_map).resize(size, Image.Resampling.NEAREST))
    names = dict(result.id2label)
    return draw_segments(image, segment_map, result.segments_info, names, scale=int(max(1, scale)), labels=labels)


def shown_points(image: Any, rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The image with classified points and their best classes."""
    scale, drawn = shown_scale(image), shown_rgb(image)
    if scale != 1:
        size = (max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale)))
        drawn = drawn.resize(size, Image.Resampling.BICUBIC)
    best = [row["classes"][0] for row in rows]
    points = [[(value + 0.5) * scale - 0.5 for value in row["point"]] for row in rows]
    texts = [f"{each['label']} {each['score']:.2f}" for each in best]
    return draw_prompts(drawn, points, [], [each["label_id"] for each in best], texts)


# Tables, as HTML: what comes from a model or a file is escaped.


def segment_table(result: SegmentedImage) -> str:
    """The segments with the colours of the overlay, the largest first."""
    colors, pixels = segment_colors(result.segments_info), result.segment_map.size
    segments = sorted(result.segments, key=lambda segment: -segment.area)
    has_scores = result.task != "semantic"
    rows = [
        [
            _swatch(colors[each.id]),
            str(each.id),
            _text(each.label),
            *([_score(each.score)] if has_scores else []),
            _share(each.area, pixels),
        ]
        for each in segments
    ]
    return _table(["", "id", "class", *(["score"] if has_scores else []), "area"], rows)


def change_table(changes: Sequence[LabelChange], num_pixels: int) -> str:
    """The labels that changed, the largest segments first."""
    if not changes:
        return '<p class="hf-segvit-note">No label changed.</p>'
    rows = []
    for change in changes:
        old, new = (
            "<i>nothing</i>" if side is None else f"{_text(side.label)} {_score(side.score)}".rstrip()
            for side in (change.before, change.after)
        )
        rows.append([_share(change.area, num_pixels), old, "→", new])
    return _table(["area", "generator", "", "with ViT-P"], rows)


def point_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The points and their classes, the last point first."""
    cells = [
        [
            ", ".join(f"{value:g}" for value in row["point"]),
            *(f"{_text(each['label'])} <small>{each['score']:.1%}</small>" for each in row["classes"]),
        ]
        for row in reversed(rows)
    ]
    places = ["best", "second", "third"][: len(cells[0]) - 1] if cells else []
    return _table(["x, y", *places], cells)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows[:MAX_ROWS])
    more = f'<p class="hf-segvit-note">and {len(rows) - MAX_ROWS} more</p>' if len(rows) > MAX_ROWS else ""
    return f'<table class="hf-segvit-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}'


def _text(name: str) -> str:
    return escape(printable(name[:200]))


def _swatch(color: tuple[int, int, int]) -> str:
    return f'<span class="hf-segvit-swatch" style="background:rgb{color}"></span>'


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:.2f}"


def _share(area: int, pixels: int) -> str:
    return f"{100 * area / pixels:.1f} %"
