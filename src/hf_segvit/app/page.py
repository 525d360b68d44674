"""The page in Gradio: its elements, its event handlers, the API's endpoints.

Handlers are functions of what the browser sends; nothing that belongs to one user is kept in this process, but for the
points that a session has clicked. Whatever is wrong with an input is a message on the page (`gradio.Error`).
"""

import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..inference.exports import Classes
from ..inference.memory import is_out_of_memory
from ..inference.segmented_image import save_image
from ..inference.segmenter import Segmenter
from ..lookup import printable
from ..models.image_decoding import is_address
from ..models.image_processing_eomt import TASKS
from .answers import (
    Answer,
    change_table,
    classify,
    open_upload,
    point_table,
    segment,
    segment_table,
    shown_points,
    shown_scale,
    shown_segments,
    write_files,
)
from .model_cache import ModelCache

DELETE_EVERY, DELETE_AFTER = 600, 3600  # seconds; of uploads and results
# No web fonts: the page loads nothing from elsewhere.
FONT = ("system-ui", "Segoe UI", "Roboto", "Helvetica", "sans-serif")
MONOSPACED = ("ui-monospace", "Consolas", "monospace")
CSS = """
.hf-segvit-table {width: 100%; border: 0 !important; border-collapse: collapse; font-variant-numeric: tabular-nums}
.hf-segvit-table tr, .hf-segvit-table thead, .hf-segvit-table tbody {border: 0 !important}
.hf-segvit-table th, .hf-segvit-table td {padding: 4px 10px !important; text-align: left; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important; overflow-wrap: anywhere}
.hf-segvit-table th {font-weight: 600}
.hf-segvit-table td:first-child {white-space: nowrap}
.hf-segvit-swatch {display: inline-block; width: 1.1em; height: 1.1em; border-radius: 3px; vertical-align: text-bottom;
  border: 1px solid #0006}
.hf-segvit-note {padding: 4px 2px; opacity: 0.8}
.hf-segvit-scroll {max-height: 26em; overflow-y: auto}
.hf-segvit-image img {width: auto !important; height: auto !important; max-width: 100%; max-height: 100%; margin: auto}
"""
_CLICK = "Click a point of the image or of the overlay to name what is there."
# Values of the components for an answer, and for points.
NO_ANSWER = (None, "", "", None, None, None, "")
NO_POINTS: tuple[Any, ...] = ([], None, f'<p class="hf-segvit-note">{_CLICK}</p>')
_ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
_MEANWHILE: dict[str, Any] = {"concurrency_id": "controls", "concurrency_limit": 1}  # while a model runs

logger = logging.getLogger(__name__)


def build_page(
    cache: ModelCache, folder: Path, examples: Sequence[str | Path] = (), *, queue: int = 20, title: str = "hf-segvit"
) -> gr.Blocks:
    """The page, ready to launch with `CSS`.

    Args:
        folder: Gradio's folder of uploads, to which results are written; files there are deleted after a while.
        examples: image files.
        queue: the most requests that may wait; more are refused.
    """
    handlers = Handlers(cache, folder)
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(DELETE_EVERY, DELETE_AFTER)) as page:
        with gr.Column(visible=False):
            _add_endpoints(cache, handlers)  # first, as names of endpoints are given in order
        gr.Markdown("## Segment images")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                image = _upload()
                model = gr.Dropdown(cache.names, value=cache.names[0], label="Model", visible=len(cache.names) > 1)
                about = gr.HTML("", padding=False)
                task = gr.Radio(list(TASKS), value=None, label="Task")
                threshold = gr.Slider(0, 1, value=0.5, step=0.01, label="Threshold: the score that a segment needs")
                relabel = gr.Checkbox(False, label="Relabel with ViT-P", visible=False)
                alpha = gr.Slider(0, 1, value=0.4, step=0.05, label="Weight of ViT-P", visible=False)
                labels = gr.Checkbox(True, label="Names on the overlay")
                button = gr.Button("Segment", variant="primary")
            with gr.Column(scale=3, min_width=420), gr.Tabs() as tabs:
                with gr.Tab("Segments", id="segments"):
                    overlay = _shown("Overlay")
                    note = gr.HTML("", padding=False)
                    table = gr.HTML("", padding=False, elem_classes="hf-segvit-scroll")
                    files = gr.File(label="Downloads", file_count="multiple", interactive=False)
                with gr.Tab("Changed labels", id="changes", visible=False) as changes_tab:
                    with gr.Row():
                        before = _shown("Generator alone")
                        after = _shown("With ViT-P")
                    changes = gr.HTML("", padding=False, elem_classes="hf-segvit-scroll")
                with gr.Tab("Points", id="points", visible=False) as points_tab:
                    points_image = _shown("Points")
                    points_table = gr.HTML(NO_POINTS[2], padding=False)
                    clear = gr.Button("Remove all points", size="sm")
        if examples:
            gr.Examples(
                [[str(path)] for path in examples], [image], label="Examples", examples_per_page=12,
                api_visibility="private",
            )  # fmt: skip
        points = gr.State([])

        controls = [task, threshold, about, relabel, alpha, changes_tab, points_tab]
        asked = [image, model, task, threshold, relabel, alpha, labels]
        answered = [overlay, note, table, files, before, after, changes]
        clicked = [points, points_image, points_table]
        private: dict[str, Any] = {"api_visibility": "private"}
        on_model: dict[str, Any] = {**private, **_ONE_AT_A_TIME}

        page.load(handlers.describe, [model], controls, **private, **_MEANWHILE)
        described = model.input(handlers.describe, [model], controls, **private, **_MEANWHILE)
        rated = task.input(handlers.default_threshold, [model, task], [threshold], **private, **_MEANWHILE)
        for first in (described, rated):
            first.success(handlers.segment, asked, answered, **on_model)
        gr.on(
            [button.click, threshold.release, relabel.input, alpha.release, labels.input],
            handlers.segment,
            asked,
            answered,
            trigger_mode="always_last",
            **on_model,
        )
        relabel.change(lambda on: gr.Slider(visible=on), [relabel], [alpha], queue=False, **private)
        # Nothing of the last image stays beside the next one, also if that cannot be read.
        cleared = image.change(lambda: [*NO_ANSWER, *NO_POINTS], None, [*answered, *clicked], queue=False, **private)
        cleared.then(handlers.segment, asked, answered, **on_model)
        clear.click(lambda: [*NO_POINTS], None, clicked, queue=False, **private)
        for shown in (image, overlay, points_image):
            click = handlers.click_image if shown is image else handlers.click_drawing
            shown.select(click, [image, model, points], [*clicked, tabs], trigger_mode="multiple", **on_model)
    page.queue(max_size=queue, default_concurrency_limit=1)
    return page


def _upload() -> gr.Image:
    """The image to segment, given to handlers as the path of the file as it was uploaded."""
    image = gr.Image(
        type="filepath", image_mode=None, sources=["upload", "clipboard", "webcam"], label="Image", height=360,
        buttons=["fullscreen"], elem_classes="hf-segvit-image",
    )  # fmt: skip
    _take_uploads_only(image)
    return image


def _shown(label: str) -> gr.Image:
    return gr.Image(
        type="filepath", label=label, interactive=False, buttons=["fullscreen"], elem_classes="hf-segvit-image"
    )


def _take_uploads_only(component: Any) -> None:
    """Hand on the path of the upload, not opened by anybody, and refuse addresses, which the server would download."""
    move = component.async_move_resource_to_block_cache

    async def moved(source: Any) -> Any:
        if is_address(str(source)):
            raise gr.Error("addresses are not downloaded; upload the file", print_exception=False)
        return await move(source)

    component.async_move_resource_to_block_cache = moved
    # Gradio would open the file with every decoder that Pillow has; `open_upload` checks it first.
    component.preprocess = lambda payload: None if payload is None else payload.path


def _add_endpoints(cache: ModelCache, handlers: "Handlers") -> None:
    """The API: `/segment`, `/classify` and `/models`."""
    image = gr.File(label="image")
    _take_uploads_only(image)
    model = gr.Dropdown(cache.names, value=cache.names[0], label="model")
    task = gr.Dropdown(list(TASKS), value=None, label="task")
    threshold, alpha = gr.Number(None, label="threshold"), gr.Number(None, label="alpha")
    relabel = gr.Checkbox(False, label="relabel")
    points, boxes = gr.JSON(None, label="points"), gr.JSON(None, label="boxes")
    top_k = gr.Number(3, precision=0, label="top_k")
    answer, files = gr.JSON(label="answer"), gr.File(label="files", file_count="multiple")
    asked = [image, model, task, threshold, relabel, alpha]
    for name, handler, inputs, outputs in (
        ("segment", handlers.api_segment, asked, [answer, files]),
        ("classify", handlers.api_classify, [image, points, boxes, model, top_k], [answer]),
        ("models", handlers.api_models, [], [answer]),
    ):
        gr.Button(visible=False).click(handler, inputs, outputs, api_name=name, **_ONE_AT_A_TIME)


class Handlers:
    """What the page and the API call."""

    def __init__(self, cache: ModelCache, folder: Path) -> None:
        self.cache, self.folder = cache, folder

    # Of the page.

    def describe(self, model: str) -> list[Any]:
        """The controls for a model: its tasks, its threshold, and whether there is a ViT-P."""
        with self._errors(model):
            own = self.cache.segmenter(model)
            tasks, has_points, can_relabel = (
                self.cache.tasks(model),
                self.cache.has_points(model),
                self.cache.can_relabel(model),
            )
        about = f"{escape(printable(model))}, {len(own.id2label)} classes, on {escape(own.device_description)}"
        if has_points:
            about += f"<br>{_CLICK}"
        return [
            gr.Radio(choices=[name for name in TASKS if name in tasks], value=own.task),
            _slider(own),
            f'<p class="hf-segvit-note">{about}</p>',
            gr.Checkbox(value=False, visible=can_relabel),
            gr.Slider(visible=False),
            gr.Tab(visible=can_relabel),
            gr.Tab(visible=has_points),
        ]

    def default_threshold(self, model: str, task: str) -> Any:
        """The slider for another task."""
        with self._errors(model):
            return _slider(self.cache.segmenter(model, task))

    def segment(
        self,
        image: str | None,
        model: str,
        task: str | None,
        threshold: float,
        relabel: bool,
        alpha: float,
        labels: bool,
    ) -> list[Any]:
        """The answer for the image on the page; nothing without one."""
        if image is None:
            return [*NO_ANSWER]
        with self._errors(model):
            answer, classes = self._answer(image, model, task, threshold, relabel, alpha)
            folder = self._new_folder()
            files = write_files(answer, classes, folder / "files")
            overlay = self._save(shown_segments(answer.result, labels), folder / "overlay.jpg")
            before, changes = None, ""
            if answer.before is not None:
                before = self._save(shown_segments(answer.before, labels), folder / "generator.jpg")
                changes = change_table(answer.changes, answer.result.segment_map.size)
            elif relabel is False:
                changes = '<p class="hf-segvit-note">Tick “Relabel with ViT-P” to see what it changes.</p>'
        note = _summary(answer)
        table = segment_table(answer.result) if answer.result.segments else ""
        return [overlay, note, table, [*map(str, files)], before, overlay if before else None, changes]

    def click_image(self, image: str | None, model: str, points: list[Any], event: gr.SelectData) -> list[Any]:
        """One more point, in pixels of the image."""
        return self._click(image, model, points, event.index, drawn=False)

    def click_drawing(self, image: str | None, model: str, points: list[Any], event: gr.SelectData) -> list[Any]:
        """One more point, in pixels of a drawing that is shown."""
        return self._click(image, model, points, event.index, drawn=True)

    def _click(self, image: str | None, model: str, points: list[Any], index: Any, drawn: bool) -> list[Any]:
        with self._errors(model):
            if not self.cache.has_points(model):
                return [gr.skip()] * 4
            classifier = self.cache.point_classifier(model)
            pixels = open_upload(image, classifier.file_settings)
            scale = shown_scale(pixels) if drawn else 1
            point = [int(value / scale) for value in index]
            points = [*points, point][-50:]
            rows = classify(classifier, image, points)
            path = self._save(shown_points(pixels, rows), self._new_folder() / "points.jpg")
        return [points, path, point_table(rows), gr.Tabs(selected="points")]

    # Of the API; their docstrings are its documentation.

    def api_segment(
        self,
        image: str | None,
        model: str,
        task: str | None = None,
        threshold: float | None = None,
        relabel: bool = False,
        alpha: float | None = None,
    ) -> tuple[dict[str, Any], list[str]]:
        """Segment an image file: the content of the segments' JSON file, and all files that the page offers."""
        with self._errors(model, html=False):
            answer, classes = self._answer(image, model, task, threshold, relabel, alpha)
            return answer.description, [*map(str, write_files(answer, classes, self._new_folder() / "files"))]

    def api_classify(
        self, image: str | None, points: Any = None, boxes: Any = None, model: str | None = None, top_k: int = 3
    ) -> list[dict[str, Any]]:
        """Name what is at points [[x, y], ...] and in boxes [[x0, y0, x1, y1], ...] of an image file, in pixels."""
        with self._errors(model, html=False):
            return classify(self.cache.point_classifier(model), image, points, boxes, top_k)

    def api_models(self) -> list[dict[str, Any]]:
        """The models by name, the default first, and which of them are in memory."""
        loaded = self.cache.loaded
        return [{"model": name, "loaded": name in loaded} for name in self.cache.names]

    def _answer(
        self, image: str | None, model: str, task: str | None, threshold: float | None, relabel: bool, alpha: Any
    ) -> tuple[Answer, Classes]:
        own = self.cache.segmenter(model)  # whose own task counts where none is asked for
        segmenter = self.cache.segmenter(model, task or own.task, relabel)
        answer = segment(
            segmenter, image, threshold=threshold, alpha=alpha if relabel else None, compare=relabel, model_name=model
        )
        stuff = getattr(segmenter.processor, "stuff_classes", None) or segmenter.stuff_classes
        return answer, Classes(segmenter.id2label, stuff)

    def _new_folder(self) -> Path:
        """A folder that nobody can guess, among the files that are deleted after a while."""
        folder = self.folder / secrets.token_hex(32)
        folder.mkdir(parents=True)
        return folder

    def _save(self, drawing: Any, path: Path) -> str:
        save_image(drawing, path)
        return str(path)

    @contextmanager
    def _errors(self, model: str | None, html: bool = True) -> Iterator[None]:
        """Turn errors into messages for the user, without this machine's paths; unexpected ones are logged whole."""
        try:
            yield
        except gr.Error:
            raise
        except Exception as error:
            text = str(error)
            if is_out_of_memory(error):
                text = "the memory does not suffice for this; take a smaller image, or try again later"
            elif not isinstance(error, ValueError):
                logger.exception("an unexpected error")
                text = "something went wrong here that is not your fault; the log of the app says what"
            source = self.cache.sources.get(model or "", "")
            for path, name in ((source, model), (self.cache.classifier, "the ViT-P"), (str(self.folder), "uploads")):
                text = text.replace(path, str(name)) if path else text
            text = printable(text)[:1000]
            raise gr.Error(escape(text) if html else text, duration=20, print_exception=False) from error


def _slider(segmenter: Segmenter) -> Any:
    """The threshold's slider, which semantic segmentation has no use for."""
    threshold = segmenter.default_threshold
    return gr.Slider(visible=False) if threshold is None else gr.Slider(value=round(threshold, 2), visible=True)


def _summary(answer: Answer) -> str:
    """How many segments of how many classes, or why there are none."""
    segments = answer.result.segments
    text = f"{len(segments)} segments of {len({each.label_id for each in segments})} classes. " if segments else ""
    if answer.before is not None:
        text += f"ViT-P changed {len(answer.changes)} of the labels. "
    remark = answer.remark and f"{answer.remark[0].upper()}{answer.remark[1:]}."
    return f'<p class="hf-segvit-note">{escape(printable(text + remark))}</p>'
