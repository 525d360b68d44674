"""Masks as tools save them: negative and floating-point values, colours for classes."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_segvit.data.checking import check_dataset
from hf_segvit.data.reading import describe, load_segmentation_dataset

from .test_images import write_tiff

SIZE = (20, 30)  # height, width


def folder(root: Path, mask: Any, files: dict[str, Any], name: str = "a.png", **options: Any) -> str:
    """A `mask_folder` of one image; `mask` is an array, or an image of Pillow."""
    (root / "images" / "train").mkdir(parents=True)
    (root / "annotations" / "train").mkdir(parents=True)
    Image.new("RGB", SIZE[::-1], (9, 9, 9)).save(root / "images" / "train" / "a.jpg")
    path = root / "annotations" / "train" / name
    if isinstance(mask, np.ndarray) and name.endswith(".tif"):
        write_tiff(path, mask[..., None] if mask.ndim == 2 else mask, **options)
    else:
        (Image.fromarray(mask) if isinstance(mask, np.ndarray) else mask).save(path)
    for file, content in files.items():
        (root / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return f"mask_folder:{root}"


def halves(left: int, right: int, void: int, dtype: Any) -> np.ndarray:
    """Two classes, and four rows of void."""
    values = np.full(SIZE, left, dtype)
    values[:, 15:] = right
    values[:4] = void
    return values


def segment_map(spec: str) -> np.ndarray:
    (entry,) = load_segmentation_dataset(spec)
    return entry["segment_map"]


EXPECTED = halves(0, 1, -1, np.int32)


class TestNumbers:
    @pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.float32, np.float64])
    @pytest.mark.parametrize(
        "classes",
        [
            {"classes": [{"value": 0, "name": "soil"}, {"value": 1, "name": "crop"}], "void": [-100]},
            {"0": "soil", "1": "crop", "-100": "void"},
        ],
    )
    def test_negative_values_may_be_void(self, dtype: Any, classes: Any, tmp_path: Path) -> None:
        spec = folder(tmp_path, halves(0, 1, -100, dtype), {"classes.json": classes}, "a.tif")
        assert np.array_equal(segment_map(spec), EXPECTED)
        report = check_dataset(spec)
        assert all("nearly black" in problem.message for problem in report.problems)  # as the image here is
        assert report.splits[0].void_share == pytest.approx(4 / 20)

    def test_negative_classes_and_far_values(self, tmp_path: Path) -> None:
        values = halves(-1, 7, -(2**31), np.int32)
        classes = {"-1": "soil", "7": "crop", str(-(2**31)): "void"}
        assert np.array_equal(segment_map(folder(tmp_path, values, {"classes.json": classes}, "a.tif")), EXPECTED)

    def test_values_that_are_not_listed(self, tmp_path: Path) -> None:
        spec = folder(tmp_path, halves(0, 1, -9, np.int16), {"classes.json": ["soil", "crop"]}, "a.tif")
        with pytest.raises(ValueError, match=r"a\.tif: the mask holds the values \[-9\].*or as void"):
            segment_map(spec)

    def test_fractions_are_named(self, tmp_path: Path) -> None:
        values = halves(0, 1, 255, np.float32)
        values[10, :3] = 0.5
        spec = folder(tmp_path, values, {"classes.json": ["soil", "crop"]}, "a.tif")
        with pytest.raises(ValueError, match=r"a\.tif: .* floating-point.*3 are not whole, such as 0\.5"):
            segment_map(spec)

    def test_no_data_as_nan_is_named(self, tmp_path: Path) -> None:
        values = halves(0, 1, 255, np.float32)
        values[0, 0] = np.nan
        spec = folder(tmp_path, values, {"classes.json": ["soil", "crop"]}, "a.tif")
        with pytest.raises(ValueError, match=r"1 are not whole, such as nan.*listed as void"):
            segment_map(spec)

    def test_several_bands(self, tmp_path: Path) -> None:
        values = np.zeros((*SIZE, 5), np.uint8)
        spec = folder(tmp_path, values, {"classes.json": ["soil", "crop"]}, "a.tif")
        with pytest.raises(ValueError, match=r"a\.tif: a mask of 5 bands of 8 bits.*one channel"):
            segment_map(spec)


SOIL, CROP, OTHER = (140, 120, 240), (250, 50, 83), (0, 0, 0)


class TestVoidOption:
    @pytest.mark.parametrize("void", ["crop", "1", " crop ", "crop,ignore"])
    def test_a_class_by_name_or_value(self, void: str, tmp_path: Path) -> None:
        spec = folder(tmp_path, halves(2, 1, 0, np.uint8), {"classes.txt": "sky\ncrop\nsoil\n"})
        assert describe(load_segmentation_dataset(spec)).id2label == {0: "sky", 1: "crop", 2: "soil"}
        dataset = load_segmentation_dataset(f"{spec}?void={void}")
        assert describe(dataset).id2label == {0: "sky", 1: "soil"}
        assert np.array_equal(dataset[0]["segment_map"], halves(1, -1, 0, np.int32))
        assert describe(dataset).remarks[0].startswith("void in masks, neither trained nor scored: 1, 255; ")

    @pytest.mark.parametrize("value", [-100, 200, 255])
    def test_values_that_no_class_has(self, value: int, tmp_path: Path) -> None:
        spec = folder(tmp_path, halves(0, 1, value, np.int32), {"classes.txt": "soil\ncrop\n"}, "a.tif")
        assert np.array_equal(segment_map(f"{spec}?void={value}"), EXPECTED)

    @pytest.mark.parametrize(
        ("void", "message"),
        [("crops", "void=crops is no class and no value; did you mean crop"), ("0,1", "lists no class")],
    )
    def test_refusals(self, void: str, message: str, tmp_path: Path) -> None:
        spec = folder(tmp_path, halves(0, 1, 0, np.uint8), {"classes.txt": "soil\ncrop\n"})
        with pytest.raises(ValueError, match=message):
            load_segmentation_dataset(f"{spec}?void={void}")

    @pytest.mark.parametrize("has_list", [False, True])
    def test_colours(self, has_list: bool, tmp_path: Path) -> None:
        lines = "".join(
            f"{name}:{','.join(map(str, color))}::\n"
            for name, color in (("soil", SOIL), ("crop", CROP), ("other", OTHER))
        )
        files = {"labelmap.txt": lines, **({"classes.txt": "soil\ncrop\nother\n"} if has_list else {})}
        spec = folder(tmp_path, painted(), files)
        dataset = load_segmentation_dataset(f"{spec}?void=other")
        assert describe(dataset).id2label == {0: "soil", 1: "crop"}
        assert np.array_equal(dataset[0]["segment_map"], EXPECTED)
        if not has_list:
            with pytest.raises(ValueError, match=r"labelmap\.txt: void=2: colours stand for classes; give a name"):
                load_segmentation_dataset(f"{spec}?void=2")

    def test_a_saved_data_set(self, tmp_path: Path) -> None:
        images = [{"image": Image.new("RGB", SIZE[::-1]), "label": Image.fromarray(halves(2, 1, 0, np.uint8))}]
        datasets.Dataset.from_list(images).save_to_disk(tmp_path / "saved")
        (tmp_path / "classes.txt").write_text("sky\ncrop\nsoil\n")
        dataset = load_segmentation_dataset(f"hub:{tmp_path / 'saved'}?classes={tmp_path / 'classes.txt'}&void=sky,1")
        assert describe(dataset).id2label == {0: "soil"}
        assert np.array_equal(dataset[0]["segment_map"], halves(0, -1, -1, np.int32))


def painted(left: Any = SOIL, right: Any = CROP, void: Any = OTHER) -> np.ndarray:
    colours = np.zeros((*SIZE, 3), np.uint8)
    colours[:], colours[:, 15:], colours[:4] = left, right, void
    return colours


TABLES: dict[str, dict[str, Any]] = {
    "list": {"classes.json": {"classes": [{"name": "soil", "color": SOIL}, {"name": "crop", "color": CROP},
                                          {"name": "void", "color": OTHER}]}},
    "rows": {"classes.json": [{"name": "soil", "color": "#8c78f0"}, {"name": "crop", "color": "#fa3253"},
                              {"name": "ignore", "color": [0, 0, 0]}]},
    "values": {"classes.json": {"classes": [{"value": 4, "name": "soil", "color": SOIL},
                                            {"value": 9, "name": "crop", "color": CROP},
                                            {"value": 11, "name": "void", "color": OTHER}]}},
    "names": {"classes.json": {"soil": list(SOIL), "crop": list(CROP), "unlabeled": list(OTHER)}},
    "CVAT": {"labelmap.txt": "# label:color_rgb:parts:actions\nsoil:140,120,240::\n"
             "crop:250,50,83:a,b:c\nvoid:0,0,0::\n"},
    "beside": {"classes.json": ["soil", "crop"],
               "labelmap.txt": "void:0,0,0::\ncrop:250,50,83::\nsoil:140,120,240::\n"},
    "labelme first": {"labelmap.txt": "__ignore__:0,0,0::\nsoil:140,120,240::\ncrop:250,50,83::\n"},
}  # fmt: skip


class TestColours:
    @pytest.mark.parametrize("table", TABLES)
    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_tables(self, table: str, mode: str, tmp_path: Path) -> None:
        spec = folder(tmp_path, Image.fromarray(painted()).convert(mode), TABLES[table])
        assert np.array_equal(segment_map(spec), EXPECTED)
        assert list(describe(load_segmentation_dataset(spec)).id2label.values()) == ["soil", "crop"]

    def test_a_background_of_cvat_is_a_class(self, tmp_path: Path) -> None:
        table = {"labelmap.txt": "background:0,0,0::\nsoil:140,120,240::\ncrop:250,50,83::\n"}
        assert np.array_equal(segment_map(folder(tmp_path, painted(), table)), EXPECTED + 1)

    def test_palettes_count_by_colour_without_values(self, tmp_path: Path) -> None:
        palette = Image.fromarray(halves(7, 3, 0, np.uint8), mode="P")
        colours = np.zeros((256, 3), np.uint8)
        colours[7], colours[3] = SOIL, CROP
        palette.putpalette(colours.ravel().tolist())
        assert np.array_equal(segment_map(folder(tmp_path, palette, TABLES["CVAT"])), EXPECTED)

    def test_palettes_of_voc_are_indices(self, tmp_path: Path) -> None:
        palette = Image.fromarray(halves(0, 1, 255, np.uint8), mode="P")
        palette.putpalette(list(range(256)) * 3)
        assert np.array_equal(segment_map(folder(tmp_path, palette, {"classes.json": ["soil", "crop"]})), EXPECTED)

    def test_unknown_colours_are_counted(self, tmp_path: Path) -> None:
        mask = painted()
        mask[10, :5], mask[11, 0] = (1, 2, 3), (4, 5, 6)
        with pytest.raises(ValueError, match=r"a\.png: 2 colours in 6 of 600 pixels.*\(1, 2, 3\), \(4, 5, 6\)"):
            segment_map(folder(tmp_path, mask, TABLES["CVAT"]))

    def test_without_a_table_both_forms_are_shown(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r'"color": \[128, 64, 128\].*labelmap\.txt.*road:128,64,128::'):
            segment_map(folder(tmp_path, painted(), {"classes.json": ["soil", "crop"]}))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("soil:140,120::\n", r"labelmap\.txt: the class 'soil' has the colour '140,120'; give red, green and blue"),
            ("soil:1,2,3::\ncrop:1,2,3::\n", r"labelmap\.txt: the colour 1,2,3 stands for two classes"),
            ("soil:1,2,3::\nsoil:1,2,4::\n", r"labelmap\.txt: two classes are called 'soil'"),
            ("soil\n", r"labelmap\.txt: the class 'soil' has the colour ''"),
            ("", r"labelmap\.txt.*lists no class"),
        ],
    )
    def test_faulty_tables(self, text: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            load_segmentation_dataset(folder(tmp_path, painted(), {"labelmap.txt": text}))

    def test_files_that_disagree(self, tmp_path: Path) -> None:
        files = {"classes.json": ["soil", "corn"], "labelmap.txt": TABLES["CVAT"]["labelmap.txt"]}
        with pytest.raises(ValueError, match=r"'corn' is a class in one of them only"):
            load_segmentation_dataset(folder(tmp_path, painted(), files))

    def test_panoptic_masks_may_be_coloured(self, tmp_path: Path) -> None:
        table = {"classes": [{"name": "soil", "color": SOIL, "is_thing": False},
                             {"name": "crop", "color": CROP, "is_thing": True},
                             {"name": "void", "color": OTHER}]}  # fmt: skip
        spec = folder(tmp_path, painted(), {"classes.json": table})
        numbers = np.zeros(SIZE, np.uint16)
        numbers[:, 15:20], numbers[:, 20:] = 1, 2
        (tmp_path / "instances" / "train").mkdir(parents=True)
        Image.fromarray(numbers).save(tmp_path / "instances" / "train" / "a.png")
        (entry,) = load_segmentation_dataset(spec, task="panoptic")
        assert sorted((row["id"], row["label_id"]) for row in entry["segments"]) == [(0, 0), (3, 1), (5, 1)]
        assert (entry["segment_map"][4:, 20:] == 5).all()
