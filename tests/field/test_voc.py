"""Pascal VOC's layout as labelme2voc, CVAT and people write it, and the classes and pixels that must be read."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_segvit.data.checking import check_dataset
from hf_segvit.data.readers.auto import recognise
from hf_segvit.data.readers.voc import voc_color
from hf_segvit.data.reading import available_splits, available_tasks, describe, load_segmentation_dataset

from ..data_folders import write_image, write_mask
from .test_exports import AREAS, CAR, CAT, HEIGHT, WIDTH, areas, box, delivered, image, text

GROUND = HEIGHT * WIDTH - sum(AREAS.values())


def palette(values: np.ndarray) -> Image.Image:
    mask = Image.fromarray(values.astype(np.uint8), "P")
    mask.putpalette([channel for index in range(256) for channel in voc_color(index)])
    return mask


def labelme2voc(root: Path, ending: str = "", first: str = "_background_") -> None:
    """As labelme's script writes it: arrays and drawings lie beside the masks."""
    image(root / "JPEGImages" / "a.jpg")
    classes, objects = box(CAR) * 1 + box(CAT) * 2, box(CAR) * 1 + box(CAT) * 2
    for kind, values in (("SegmentationClass", classes), ("SegmentationObject", objects)):
        write_mask(root / f"{kind}{ending}" / "a.png", palette(values))
        arrays = root / (kind if ending else f"{kind}Npy")
        arrays.mkdir(exist_ok=True)
        np.save(arrays / "a.npy", values)
        write_image(root / f"{kind}Visualization" / "a.jpg", (HEIGHT, WIDTH))
    text(root / "class_names.txt", f"{first}\ncar\ncat\n")


@pytest.mark.parametrize("form", ["folder", "zip", "wrapped", "zip in a folder"])
@pytest.mark.parametrize("ending", ["", "PNG"])
def test_labelme2voc_as_delivered(ending: str, form: str, tmp_path: Path) -> None:
    path = delivered(tmp_path, lambda root: labelme2voc(root, ending), form)
    assert recognise(str(path))[0::2] == ("voc", "there is a folder SegmentationClass and class_names.txt")
    spec = f"auto:{path}"
    assert available_tasks(spec) == ("semantic", "instance")
    semantic = load_segmentation_dataset(spec)
    names = describe(semantic).id2label
    assert names == {0: "_background_", 1: "car", 2: "cat"}
    assert areas(semantic[0], names) == {"_background_": GROUND, **AREAS}
    instance = load_segmentation_dataset(spec, task="instance")
    assert describe(instance).id2label == {0: "car", 1: "cat"}
    assert areas(instance[0], describe(instance).id2label) == AREAS


def test_options_of_labelme2voc(tmp_path: Path) -> None:
    labelme2voc(tmp_path)
    for options, expected in (
        ("background=void", AREAS),
        ("background=wall", {"wall": GROUND, **AREAS}),
        ("void=car", {"_background_": GROUND, "cat": 320}),
        ("drop=car", {"_background_": GROUND, "cat": 320}),
    ):
        dataset = load_segmentation_dataset(f"voc:{tmp_path}?{options}")
        assert areas(dataset[0], describe(dataset).id2label) == expected, options


@pytest.mark.parametrize("name", ["labels.txt", "classes.txt", "class_names.txt"])
def test_own_classes_in_vocs_layout(name: str, tmp_path: Path) -> None:
    labelme2voc(tmp_path / "VOC2012")
    (tmp_path / "VOC2012" / "class_names.txt").unlink()
    text(
        tmp_path / "VOC2012" / name,
        "__ignore__\n_background_\ncar\ncat\n" if "labels" in name else "background\ncar\ncat\n",
    )
    names = describe(load_segmentation_dataset(f"auto:{tmp_path}")).id2label
    assert list(names.values())[1:] == ["car", "cat"]


def test_classes_that_nothing_lists_are_said_to_be_vocs(tmp_path: Path) -> None:
    labelme2voc(tmp_path)
    (tmp_path / "class_names.txt").unlink()
    (split,) = check_dataset(f"voc:{tmp_path}").splits
    assert any("taken to be Pascal VOC's; classes=FILE names others" in remark for remark in split.remarks)
    dataset = load_segmentation_dataset(f"voc:{tmp_path}", classes=["background", "car", "cat"])
    assert areas(dataset[0], describe(dataset).id2label) == {"background": GROUND, **AREAS}


@pytest.mark.parametrize("listed", ["a\n", "a.jpg\n", '"a"\n'])
def test_cvats_lists_of_names(listed: str, tmp_path: Path) -> None:
    image(tmp_path / "JPEGImages" / "a.jpg")
    rgb = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    rgb[box(CAR)], rgb[box(CAT)] = (250, 50, 83), (51, 221, 255)
    write_mask(tmp_path / "SegmentationClass" / "a.png", rgb)
    text(
        tmp_path / "labelmap.txt",
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:250,50,83::\ncat:51,221,255::\n",
    )
    text(tmp_path / "ImageSets" / "Segmentation" / "train.txt", listed)
    text(tmp_path / "ImageSets" / "Segmentation" / "val.txt", "")
    assert available_splits(f"auto:{tmp_path}") == ["train"]
    dataset = load_segmentation_dataset(f"auto:{tmp_path}")
    assert areas(dataset[0], describe(dataset).id2label) == {"background": GROUND, **AREAS}


def test_palettes_of_other_colours_count_by_their_numbers(tmp_path: Path) -> None:
    labelme2voc(tmp_path)
    values = (box(CAR) * 1 + box(CAT) * 2).astype(np.uint8)
    grey = Image.fromarray(values, "P")
    grey.putpalette([value for value in range(256) for _ in range(3)])
    write_mask(tmp_path / "SegmentationClass" / "a.png", grey)
    dataset = load_segmentation_dataset(f"voc:{tmp_path}")
    assert areas(dataset[0], describe(dataset).id2label) == {"_background_": GROUND, **AREAS}
    # VOC's colours in another order, as after a conversion from RGB: the colours count.
    turned = Image.fromarray(2 - values, "P")
    turned.putpalette([channel for index in (2, 1, 0) for channel in voc_color(index)])
    write_mask(tmp_path / "SegmentationClass" / "a.png", turned)
    assert areas(load_segmentation_dataset(f"voc:{tmp_path}")[0], describe(dataset).id2label) == {
        "_background_": GROUND,
        **AREAS,
    }


def test_listed_names_without_an_image_are_told(tmp_path: Path) -> None:
    labelme2voc(tmp_path)
    text(tmp_path / "ImageSets" / "Segmentation" / "train.txt", "a\nb\nc\n")
    (problem,) = check_dataset(f"voc:{tmp_path}").problems
    assert problem.severity == "warning"
    assert problem.message == "2 of its names have no image: b, c"
