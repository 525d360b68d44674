"""The callable class for tables: every row is answered once, whatever the table is and whatever is wrong with a row."""

import pickle
from io import BytesIO

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from hf_segvit import EoMTImageProcessor, Segmenter
from hf_segvit.cli import main
from hf_segvit.data.mask_files import color_ids
from hf_segvit.inference.row_segmenter import ROW_COLUMNS, RowSegmenter, row_schema

from .test_bulk_segmentation import draw
from .tiny_models import tiny_eomt

THRESHOLDS = {"panoptic": {"threshold": 0.3}, "instance": {"instance_threshold": 0.02}, "semantic": {}}


def save_model(folder, task="panoptic"):
    model = tiny_eomt(num_queries=9)
    with torch.no_grad():
        model.class_predictor.weight *= 4
    model.save_pretrained(folder)
    settings = {**THRESHOLDS[task], "overlap_mask_area_threshold": 0.05, "stuff_classes": [4]}
    EoMTImageProcessor(task=task, size={"height": 64, "width": 64}, **settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "panoptic"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(5):
        draw(folder / f"{index}.png", index, (48, 56 + 8 * index))
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:70])
    return folder


@pytest.fixture(scope="module")
def rows(images):
    return [{"path": str(path), "bytes": path.read_bytes()} for path in sorted(images.iterdir())]


@pytest.fixture(scope="module")
def answers(model, rows):
    return RowSegmenter(model, device="cpu").rows(rows)


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_rows_are_those_of_the_parquet_output(task, images, tmp_path):
    model = str(save_model(tmp_path / "model", task))
    words = ["segment", str(images), "--output", str(tmp_path / "out"), "--model", model, "--outputs", "parquet"]
    assert main([*words, "--device", "cpu"]) == 1
    written = parquet.read_table(tmp_path / "out" / "segments.parquet").to_pylist()
    paths = [str(path) for path in sorted(images.iterdir())]
    answers = RowSegmenter(model, device="cpu").rows([{"path": path} for path in paths])
    assert [row["path"] for row in answers if row["error"]] == [paths[2]]
    good = pyarrow.Table.from_pylist([row for row in answers if not row["error"]], schema=row_schema()).to_pylist()
    for mine, theirs in zip(good, written, strict=True):
        mine["name"] = mine["name"].rpartition("/")[2]  # the command calls results by what is below the folder
        assert {name: mine[name] for name in theirs} == theirs
    assert sum(len(row["segments"]) for row in good) > 4
    row, segmenter = good[0], Segmenter.from_pretrained(model, device="cpu")
    expected = segmenter(row["path"]).segment_map + (task == "semantic")
    assert (color_ids(row["panoptic_png"], "png") == expected.clip(0)).all()


def test_every_kind_of_table(model, rows, answers):
    segmenter = pickle.loads(pickle.dumps(RowSegmenter(model, device="cpu", batch_size=2)))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    by_list = segmenter(columns)
    assert tuple(by_list) == ROW_COLUMNS
    assert [dict(zip(by_list, row, strict=True)) for row in zip(*by_list.values(), strict=True)] == answers
    arrays = {name: np.array(values, dtype=object) for name, values in columns.items()}
    assert segmenter(arrays) == by_list
    table = segmenter(pyarrow.Table.from_pylist(rows))
    assert table.schema == row_schema()
    assert table == pyarrow.Table.from_pylist(answers, schema=row_schema())
    frames = list(segmenter.in_pandas([pandas.DataFrame(rows[:2]), pandas.DataFrame(rows[2:])]))
    assert [len(frame) for frame in frames] == [2, 3]
    assert [list(frame.columns) for frame in frames] == [list(ROW_COLUMNS)] * 2
    found = pandas.concat(frames)
    assert found["segments"].tolist()[:2] == [row["segments"] for row in answers[:2]]
    assert found["error"].notna().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("decode", [True, False])
def test_datasets_map(decode, model, images, answers):
    paths = [str(path) for path in sorted(images.iterdir()) if path.stem != "2"]
    dataset = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image(decode=decode))
    features = datasets.Features.from_arrow_schema(row_schema())
    mapped = dataset.map(
        RowSegmenter(model, device="cpu"), batched=True, batch_size=3, remove_columns=["image"], features=features
    )
    good = [row for row in answers if not row["error"]]
    assert mapped["segments"] == [row["segments"] for row in good]
    assert mapped["panoptic_png"] == [row["panoptic_png"] for row in good]


def test_what_is_wrong_with_a_row_stays_with_it(model, rows, answers):
    odd = [
        rows[0],
        {"path": "gone.png"},
        {"path": "read.png", "error": "read.png: could not be read"},
        {"path": None, "bytes": None},
        {"path": "text.png", "bytes": b"no image"},
        rows[1],
    ]
    found = RowSegmenter(model, device="cpu").rows(odd)
    assert [found[0], found[5]] == [answers[0], answers[1]]
    for row, told in zip(
        found[1:5], ("gone.png", "could not be read", "row 3: there is no image", "text.png"), strict=True
    ):
        assert told in row["error"]
        assert row["segments"] is None
    with pytest.raises(ValueError, match="no column of images among a, b; call one 'bytes'"):
        RowSegmenter(model, device="cpu")({"a": [1], "b": [2]})
    with pytest.raises(ValueError, match="nowhere"):
        RowSegmenter("./nowhere", device="cpu").rows(rows)


def test_pages_and_names(model, tmp_path):
    pages = [Image.new("RGB", (40, 32), color) for color in ("red", "blue")]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    row = {"path": str(tmp_path / "a.tif"), "source": "s", "name": "n", "page": 1}
    (found,) = RowSegmenter(model, device="cpu").rows([row])
    content = BytesIO()
    pages[1].save(content, "PNG")
    (expected,) = RowSegmenter(model, device="cpu").rows([{"bytes": content.getvalue()}])
    assert found["panoptic_png"] == expected["panoptic_png"]
    assert (found["source"], found["name"], expected["path"]) == ("s", "n", "row 0")


def test_a_model_that_fails_for_one_image_and_one_that_always_does(model, rows, answers, monkeypatch):
    infer = Segmenter.infer
    poisoned = []

    def failing(self, asked, *arguments, **settings):
        if asked.sizes[0] == (48, 64) or "always" in poisoned:
            raise RuntimeError("a kernel failed")
        return infer(self, asked, *arguments, **settings)

    monkeypatch.setattr(Segmenter, "infer", failing)
    segmenter = RowSegmenter(model, device="cpu")
    found = segmenter.rows(rows)
    assert found[1]["error"].endswith("1.png: RuntimeError: a kernel failed")
    assert [found[0], *found[2:]] == [answers[0], *answers[2:]]
    poisoned.append("always")
    with pytest.raises(RuntimeError, match="a kernel failed"):
        segmenter.rows([rows[0]] * 40)
