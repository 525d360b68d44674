"""Segment the rows of a table, in Ray, Spark, `datasets` or plain Python.

A `RowSegmenter` takes a batch of rows that hold encoded images, or paths of them, and returns a row of `ROW_COLUMNS`
for each. An image that cannot be segmented becomes a row with an `error`, so that one of them never stops a job. It is
pickled without its model, which each process loads with its first batch. `row_schema` says what the columns hold.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from ..data.mask_files import id_png
from .exports import row_of, table_schema

ROW_COLUMNS = ("source", "path", "name", "task", "width", "height", "segments", "panoptic_png", "error")
IMAGE_COLUMNS = ("image", "bytes", "content", "jpg", "jpeg", "png")
_MOST_FAULTS = 20  # of the model, one after the other; then it is the model that is broken and no image


@dataclass(frozen=True)
class _Row:
    number: int
    image: Any
    source: str
    path: str
    name: str
    page: int
    error: str | None


class RowSegmenter:
    """Segments batches of rows.

    A row has the image in a column of `IMAGE_COLUMNS` (the bytes of its file, a Pillow image, or `datasets`' struct of
    bytes and path), or else its path in `path`. Optional: `path`, for messages; `source`, which identifies the row;
    `name`, what its results are called; `page`, of a file with several, from 0; `error`, why there is no image.

    Args:
        model: folder or Hub repository.
        batch_size, workers, writers: as for `run_pipeline`.
        value_range, bands: as for `ImageSettings`; `None`: the model's.
        settings: further arguments of `Segmenter.from_pretrained`, such as `task`, `threshold` and `device`.
    """

    def __init__(
        self,
        model: str,
        *,
        batch_size: int = 1,
        workers: int | None = None,
        writers: int | None = None,
        value_range: tuple[float, float] | None = None,
        bands: tuple[int, ...] | None = None,
        **settings: Any,
    ) -> None:
        self.model, self.settings = model, settings
        self.threads = {"batch_size": batch_size, "workers": workers, "writers": writers}
        self.value_range, self.bands = value_range, bands
        self._segmenter: Any = None
        self._num_faults = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_segmenter": None}

    def __call__(self, batch: Any) -> Any:
        """The answers of a batch, in its own form.

        Args:
            batch: columns by name (lists or arrays), a `pyarrow.Table` or a pandas data frame.

        Raises:
            ValueError: there is no column of images, or the model cannot be loaded.
            Exception: the model itself is broken, as it fails for one image after the other.
        """
        if hasattr(batch, "to_pylist"):
            import pyarrow

            return pyarrow.Table.from_pylist(self.rows(batch.to_pylist()), schema=row_schema())
        if hasattr(batch, "to_dict"):
            return type(batch)(self.rows(batch.to_dict("records")), columns=list(ROW_COLUMNS))
        rows = self.rows([dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)])
        return {name: [row[name] for row in rows] for name in ROW_COLUMNS}

    def in_pandas(self, frames: Iterable[Any]) -> Iterator[Any]:
        """The answers of data frames, one by one, for Spark's `mapInPandas`."""
        for frame in frames:
            yield self(frame)

    def rows(self, batch: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The answers of rows, in their order."""
        rows = [_row(number, row) for number, row in enumerate(batch)]
        answers = {row.number: _failure(row, row.error) for row in rows if row.error}
        waiting = [row for row in rows if not row.error]
        if self._segmenter is None and waiting:
            self._segmenter = self._loaded()
        try:
            self._segment(waiting, answers)
        except Exception:  # perhaps of one image, which must not cost the others
            for row in waiting:
                if row.number in answers:
                    continue
                try:
                    self._segment([row], answers)
                except Exception as error:
                    self._num_faults += 1
                    if self._num_faults >= _MOST_FAULTS:
                        raise
                    answers[row.number] = _failure(row, f"{row.path}: {type(error).__name__}: {error}")
        return [answers[row.number] for row in rows]

    def _loaded(self) -> Any:
        from .segmenter import Segmenter

        return Segmenter.from_pretrained(self.model, **self.settings)

    def _segment(self, rows: Sequence[_Row], answers: dict[int, dict[str, Any]]) -> None:
        """Segment rows and add their answers."""
        from ..models.image_claims import FREE_FOR_INFERENCE
        from ..models.image_decoding import open_image
        from ..models.image_files import read_content
        from .pipeline import Encoded, Steps, run_pipeline

        segmenter, settings = self._segmenter, self._segmenter.file_settings
        settings = replace(
            settings, value_range=self.value_range or settings.value_range, bands=self.bands or settings.bands
        )

        def load(row: _Row) -> Encoded:
            content = read_content(row.image, row.path) if isinstance(row.image, str) else row.image
            if not isinstance(content, bytes):
                return Encoded(content, 1)
            return Encoded.of_file(content, row.path, FREE_FOR_INFERENCE)

        def decode(row: _Row, content: Any) -> Any:
            if isinstance(content, bytes):
                return open_image(content, row.path, settings, row.page, FREE_FOR_INFERENCE)
            return segmenter.opened(content, row.path)

        def finish(row: _Row, image: Any, answer: Any, before: Any) -> dict[str, Any]:
            # Ids of semantic maps count from 0, which is void here.
            png = id_png((answer.segment_map + (answer.task == "semantic")).clip(0))
            described = {**row_of(row.name, row.path, answer, whole=True), "panoptic_png": png}
            return {"source": row.source, "path": described.pop("picture"), **described, "error": None}

        steps = Steps(load, decode, finish, lambda row: row.path)
        for outcome in run_pipeline(segmenter, rows, steps, **self.threads):  # type: ignore[arg-type]
            row = outcome.item
            self._num_faults = 0
            answers[row.number] = outcome.value if outcome.error is None else _failure(row, str(outcome.error))


def row_schema() -> Any:
    """The columns of an answer as a `pyarrow.Schema`: those of `--outputs parquet`, with `source` and `error`."""
    import pyarrow

    schema = table_schema()
    return pyarrow.schema(
        [pyarrow.field("source", pyarrow.string()), *schema, pyarrow.field("error", pyarrow.string())]
    )


def _row(number: int, row: Mapping[str, Any]) -> _Row:
    image = next((row[column] for column in IMAGE_COLUMNS if row.get(column) is not None), None)
    path = row.get("path")
    if isinstance(image, Mapping):
        path = path or image.get("path")
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, bytearray | memoryview):
        image = bytes(image)
    error = row.get("error")
    if image is None and not error:
        image = path
        if image is None and not any(column in row for column in (*IMAGE_COLUMNS, "path")):
            raise ValueError(
                f"no column of images among {', '.join(row)}; call one 'bytes' (encoded images), 'image' or 'path'"
            )
        error = None if image is not None else f"row {number}: there is no image in it"
    path = str(path or f"row {number}")
    name = row.get("name") or str(PurePosixPath(path).with_suffix(""))
    return _Row(number, image, str(row.get("source") or path), path, name, int(row.get("page") or 0), error)


def _failure(row: _Row, error: str | None) -> dict[str, Any]:
    nothing = dict.fromkeys(ROW_COLUMNS)
    return {**nothing, "source": row.source, "path": row.path, "name": row.name, "error": error or "failed"}
