"""Exports as annotation tools deliver them, of one scene: what is recognised, and the classes and areas that are read.

The image has 40 x 60 pixels, a car of 20 x 10 (200 pixels) and a cat of 20 x 16 (320 pixels). Each writer returns
nothing; the truth stands in `TOOLS`.
"""

import base64
import csv
import io
import json
import zipfile
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_segvit.cli import main
from hf_segvit.data.checking import check_dataset
from hf_segvit.data.problems import ProblemList
from hf_segvit.data.readers import FORMATS, format_list
from hf_segvit.data.readers.auto import recognise
from hf_segvit.data.readers.label_studio import brush_mask
from hf_segvit.data.readers.voc import voc_color
from hf_segvit.data.reading import available_splits, available_tasks, describe, load_segmentation_dataset
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.mask_encoding import decode_mask, encode_mask

from ..data_folders import colored, write_image, write_json, write_mask
from ..tiny_models import tiny_eomt

HEIGHT, WIDTH = 40, 60
CAR = [(5, 5), (25, 5), (25, 15), (5, 15)]
CAT = [(30, 20), (50, 20), (50, 36), (30, 36)]
AREAS = {"car": 200, "cat": 320}


def box(points: list[tuple[int, int]]) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    (left, top), (right, bottom) = points[0], points[2]
    mask[top:bottom, left:right] = True
    return mask


def image(path: Path) -> None:
    write_image(path, (HEIGHT, WIDTH))


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def flat(points: list[tuple[int, int]]) -> list[int]:
    return [value for point in points for value in point]


def cvat_images(root: Path) -> None:
    image(root / "images" / "a.jpg")
    corners = ";".join(f"{x:.2f},{y:.2f}" for x, y in CAR)
    runs = ", ".join(["0", *["20"] * 1, "0", "300"])
    text(
        root / "annotations.xml",
        f"""<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><task><name>t</name><labels>
<label><name>car</name><color>#ff0000</color><type>any</type><attributes></attributes></label>
<label><name>cat</name><color>#00ff00</color><type>any</type><attributes></attributes></label>
<label><name>spot</name><type>points</type></label>
</labels></task></meta>
<image id="0" name="a.jpg" width="{WIDTH}" height="{HEIGHT}">
<polygon label="car" source="manual" occluded="0" points="{corners}" z_order="0"></polygon>
<mask label="cat" source="manual" rle="{runs}" left="30" top="20" width="20" height="16" z_order="0"></mask>
</image></annotations>""",
    )


def coco(root: Path, json_name: str, image_name: str, image_path: str) -> None:
    image(root / image_path)
    rows = [
        {"id": index, "image_id": 1, "category_id": index, "iscrowd": 0, "segmentation": [flat(points)]}
        for index, points in ((1, CAR), (2, CAT))
    ]
    content = {
        "licenses": [{"name": "", "id": 0, "url": ""}],
        "info": {"description": "x"},
        "categories": [{"id": 1, "name": "car", "supercategory": ""}, {"id": 2, "name": "cat", "supercategory": ""}],
        "images": [{"id": 1, "width": WIDTH, "height": HEIGHT, "file_name": image_name}],
        "annotations": rows,
    }
    write_json(root / json_name, content)


def cvat_coco(root: Path) -> None:
    coco(root, "annotations/instances_default.json", "a.jpg", "images/a.jpg")


def label_studio_coco(root: Path) -> None:
    coco(root, "result.json", "images/1f2e3d4c-a.jpg", "images/1f2e3d4c-a.jpg")


def makesense_coco(root: Path) -> None:
    coco(root, "labels_my-project-name_2024-05-01-10-00-00.json", "a.jpg", "a.jpg")


def roboflow_coco(root: Path) -> None:
    coco(root, "train/_annotations.coco.json", "a_jpg.rf.0123.jpg", "train/a_jpg.rf.0123.jpg")


def yolo_line(label: int, points: list[tuple[int, int]]) -> str:
    return " ".join([str(label), *(f"{x / WIDTH:.6f} {y / HEIGHT:.6f}" for x, y in points)]) + "\n"


def cvat_yolo(root: Path) -> None:
    image(root / "images" / "train" / "a.jpg")
    text(root / "labels" / "train" / "a.txt", yolo_line(0, CAR) + yolo_line(1, CAT))
    text(root / "data.yaml", "names:\n  0: car\n  1: cat\npath: .\ntrain: train.txt\n")
    text(root / "train.txt", "data/images/train/a.jpg\n")


def roboflow_yolo(root: Path) -> None:
    image(root / "train" / "images" / "a.jpg")
    text(root / "train" / "labels" / "a.txt", yolo_line(0, CAR) + yolo_line(1, CAT))
    text(root / "data.yaml", "train: ../train/images\nval: ../valid/images\n\nnc: 2\nnames: ['car', 'cat']\n")


def label_studio_yolo(root: Path) -> None:
    image(root / "images" / "a.jpg")
    text(root / "labels" / "a.txt", yolo_line(0, CAR) + yolo_line(1, CAT))
    text(root / "classes.txt", "car\ncat\n")
    write_json(root / "notes.json", {"categories": [{"id": 0, "name": "car"}], "info": {"year": 2024}})


def cvat_mask(root: Path) -> None:
    voc_masks(root, palette=False)
    text(
        root / "labelmap.txt",
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:250,50,83::\ncat:51,221,255::\n",
    )
    classes = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    classes[box(CAR)], classes[box(CAT)] = (250, 50, 83), (51, 221, 255)
    write_mask(root / "SegmentationClass" / "a.png", classes)
    (root / "ImageSets" / "Segmentation" / "train.txt").rename(root / "ImageSets" / "Segmentation" / "default.txt")


def voc_masks(root: Path, palette: bool = True) -> None:
    image(root / "JPEGImages" / "a.jpg")
    image(root / "JPEGImages" / "of_another_task.jpg")
    text(root / "ImageSets" / "Segmentation" / "train.txt", "a\n")
    classes, objects = np.zeros((2, HEIGHT, WIDTH), dtype=np.uint8)
    classes[box(CAR)], classes[box(CAT)] = 7, 8
    objects[box(CAR)], objects[box(CAT)] = 1, 2
    for folder, values in (("SegmentationClass", classes), ("SegmentationObject", objects)):
        values[0] = 255 if palette else 0
        mask = Image.fromarray(values, "P")
        mask.putpalette([channel for index in range(256) for channel in voc_color(index)])
        write_mask(root / folder / "a.png", mask)


def voc(root: Path) -> None:
    voc_masks(root / "VOCdevkit" / "VOC2012")


def cvat_datumaro(root: Path) -> None:
    image(root / "images" / "default" / "a.jpg")
    mask = encode_mask(box(CAT))
    rows = [
        {"id": 0, "type": "polygon", "attributes": {}, "group": 0, "label_id": 0, "points": flat(CAR), "z_order": 0},
        {"id": 1, "type": "mask", "group": 0, "label_id": 1, "rle": mask, "z_order": 0},
    ]
    labels = [{"name": name, "parent": "", "attributes": []} for name in AREAS]
    content = {
        "info": {},
        "categories": {"label": {"labels": labels, "attributes": []}, "points": {"items": []}},
        "items": [{"id": "a", "annotations": rows, "image": {"path": "a.jpg", "size": [HEIGHT, WIDTH]}}],
    }
    write_json(root / "annotations" / "default.json", content)


def percent(points: list[tuple[int, int]]) -> list[list[float]]:
    return [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in points]


def brush_bytes(mask: np.ndarray) -> list[int]:
    """Bytes of Label Studio's brushes, in runs of equal values."""
    values = np.repeat(mask.reshape(-1).astype(np.uint8) * 255, 4)
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{length - 1:04b}" for length in (4, 8, 12, 16))
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1), len(values)]
    for start, end in pairwise(edges):
        bits += "1" + "11" + f"{end - start - 1:016b}" + f"{values[start]:08b}"
    bits += "0" * (-len(bits) % 8)
    return [int(bits[index : index + 8], 2) for index in range(0, len(bits), 8)]


def label_studio_task(regions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    frame = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0, "from_name": "tag"}
    result = [{**frame, "to_name": "image", "id": str(index), **region} for index, region in enumerate(regions)]
    cancelled = {"id": 1, "was_cancelled": True, "result": []}
    data = {"image": "/data/upload/1/1f2e3d4c-a.jpg"}
    return [{"id": 5, "data": data, "annotations": [cancelled, {"id": 2, "result": result}], "predictions": []}]


def label_studio_json(root: Path) -> None:
    image(root / "a.jpg")
    regions = [
        {"type": "polygonlabels", "value": {"points": percent(CAR), "closed": True, "polygonlabels": ["car"]}},
        {"type": "brushlabels", "value": {"format": "rle", "rle": brush_bytes(box(CAT)), "brushlabels": ["cat"]}},
        {"type": "choices", "value": {"choices": ["blurred"]}},
    ]
    write_json(root / "project-1-at-2024-05-01.json", label_studio_task(regions))


def label_studio_brush(root: Path) -> None:
    image(root / "images" / "a.jpg")
    regions = [
        {"type": "brushlabels", "value": {"format": "rle", "rle": [], "brushlabels": [name]}} for name in ("car", "cat")
    ]
    write_json(root / "tasks.json", label_studio_task(regions))
    for name, points in (("car", CAR), ("cat", CAT)):
        write_mask(root / f"task-5-annotation-2-by-me-at-home-tag-{name}-0.png", box(points).astype(np.uint8) * 255)


def labelme(root: Path) -> None:
    image(root / "a.jpg")
    shapes = [
        {"label": name, "points": points, "shape_type": "polygon"} for name, points in (("car", CAR), ("cat", CAT))
    ]
    size = {"imageHeight": HEIGHT, "imageWidth": WIDTH}
    write_json(root / "a.json", {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": "a.jpg", **size})


def supervisely(root: Path) -> None:
    image(root / "ds0" / "img" / "a.jpg")
    classes = [{"title": "car", "shape": "polygon", "color": "#FF0000"}, {"title": "cat", "shape": "bitmap"}]
    write_json(root / "meta.json", {"classes": classes, "tags": [], "projectType": "images"})
    png = io.BytesIO()
    part = Image.fromarray(np.ones((16, 20), dtype=np.uint8), "P")
    part.putpalette([0, 0, 0, 255, 255, 255])
    part.save(png, "PNG", transparency=0, bits=1)
    bitmap = {"data": base64.b64encode(zlib.compress(png.getvalue())).decode(), "origin": [30, 20]}
    objects = [
        {"classTitle": "car", "geometryType": "polygon", "points": {"exterior": CAR, "interior": []}},
        {"classTitle": "cat", "geometryType": "bitmap", "bitmap": bitmap},
    ]
    size = {"height": HEIGHT, "width": WIDTH}
    write_json(root / "ds0" / "ann" / "a.jpg.json", {"description": "", "tags": [], "size": size, "objects": objects})


def via_regions() -> list[dict[str, Any]]:
    xs, ys = zip(*CAR, strict=True)
    polygon = {"name": "polygon", "all_points_x": xs, "all_points_y": ys}
    rectangle = {"name": "rect", "x": 30, "y": 20, "width": 20, "height": 16}
    return [
        {"shape_attributes": polygon, "region_attributes": {"class": "car", "note": "red"}},
        {"shape_attributes": rectangle, "region_attributes": {"class": "cat"}},
    ]


def via_json(root: Path) -> None:
    image(root / "a.jpg")
    entry = {"filename": "a.jpg", "size": 123, "regions": via_regions(), "file_attributes": {}}
    settings = {"_via_settings": {}, "_via_attributes": {"region": {}}, "_via_data_format_version": "2.0.10"}
    write_json(root / "via_project.json", {**settings, "_via_img_metadata": {"a.jpg123": entry}})


def via_csv(root: Path) -> None:
    image(root / "a.jpg")
    with (root / "via_region_data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "filename",
                "file_size",
                "file_attributes",
                "region_count",
                "region_id",
                "region_shape_attributes",
                "region_attributes",
            ]
        )
        for index, region in enumerate(via_regions()):
            parts = [json.dumps(region[key]) for key in ("shape_attributes", "region_attributes")]
            writer.writerow(["a.jpg", 123, "{}", 2, index, *parts])


def makesense_vgg(root: Path) -> None:
    image(root / "a.jpg")
    regions = {}
    for index, (name, points) in enumerate((("car", CAR), ("cat", CAT))):
        xs, ys = zip(*points, strict=True)
        shape = {"name": "polygon", "all_points_x": [*xs, xs[0]], "all_points_y": [*ys, ys[0]]}
        regions[str(index)] = {"shape_attributes": shape, "region_attributes": {"label": name}}
    entry = {"fileref": "", "size": 1, "filename": "a.jpg", "base64_img_data": "", "file_attributes": {}}
    write_json(root / "labels_my-project-name.json", {"a.jpg": {**entry, "regions": regions}})


def segments_ai(root: Path) -> None:
    image(root / "a.jpg")
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    ids[box(CAR)], ids[box(CAT)] = 1, 300
    alpha = np.full((HEIGHT, WIDTH, 1), 255, dtype=np.uint8)
    write_mask(root / "a_label_ground-truth.png", np.concatenate([colored(ids), alpha], axis=2))
    categories = [{"name": "car", "id": 1, "has_instances": True}, {"name": "cat", "id": 2, "has_instances": True}]
    annotations = [{"id": 1, "category_id": 1}, {"id": 300, "category_id": 2}]
    label = {"label_status": "LABELED", "attributes": {"format_version": "0.1", "annotations": annotations}}
    sample = {"name": "a.jpg", "attributes": {"image": {"url": "https://x/a.jpg"}}, "labels": {"ground-truth": label}}
    dataset = {"name": "x", "task_attributes": {"format_version": "0.1", "categories": categories}, "samples": [sample]}
    write_json(root / "x-v0.1.json", {"name": "v0.1", "dataset": dataset})


# Writer, and the format that is recognised.
TOOLS: dict[str, tuple[Callable[[Path], None], str]] = {
    "CVAT COCO": (cvat_coco, "coco_folder"),
    "CVAT YOLO": (cvat_yolo, "yolo"),
    "Label Studio COCO": (label_studio_coco, "coco_folder"),
    "Label Studio YOLO": (label_studio_yolo, "yolo"),
    "makesense COCO": (makesense_coco, "coco_folder"),
    "CVAT for images": (cvat_images, "cvat"),
    "CVAT Datumaro": (cvat_datumaro, "datumaro"),
    "CVAT mask": (cvat_mask, "voc"),
    "Label Studio JSON": (label_studio_json, "label_studio"),
    "Label Studio brush": (label_studio_brush, "label_studio"),
    "labelme": (labelme, "labelme"),
    "Roboflow COCO": (roboflow_coco, "coco_folder"),
    "Roboflow YOLO": (roboflow_yolo, "yolo"),
    "Supervisely": (supervisely, "supervisely"),
    "VIA JSON": (via_json, "via"),
    "VIA CSV": (via_csv, "via"),
    "makesense VGG": (makesense_vgg, "via"),
    "segments.ai": (segments_ai, "segments_ai"),
}


def delivered(root: Path, writer: Callable[[Path], None], form: str) -> Path:
    """The export in a folder, zipped, zipped with a folder around it, or as a zip file in a folder."""
    if form.startswith("folder"):
        writer(root / "export" / ("job (1)" if form == "folder in a folder" else ""))
        return root / "export"
    writer(root / "files" / "job_12")
    base = root / "files" / ("job_12" if form != "wrapped" else "")
    target = root / "downloads" / "export.zip"
    target.parent.mkdir()
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(base.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(base))
    return target.parent if form == "zip in a folder" else target


def areas(sample: Any, names: dict[int, str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in sample["segments"]:
        mask = decode_mask(row["rle"]) if sample["segment_map"] is None else sample["segment_map"] == row["id"]
        found[names[row["label_id"]]] = found.get(names[row["label_id"]], 0) + int(mask.sum())
    return found


FORMS = ("folder", "zip", "wrapped", "zip in a folder", "folder in a folder")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tool", TOOLS)
def test_an_export_is_recognised_and_read(tool, form, tmp_path):
    writer, name = TOOLS[tool]
    path = delivered(tmp_path, writer, form)
    assert recognise(str(path))[0] == name
    spec = f"auto:{path}"
    # How a task is read does not depend on the packing.
    for task in available_tasks(spec)[: None if form == "folder" else 1]:
        if (task == "panoptic" and name in ("coco_folder", "yolo")) or (task == "semantic" and name == "coco_folder"):
            continue
        problems = ProblemList()
        dataset = load_segmentation_dataset(spec, task=task, problems=problems)
        assert [str(problem) for problem in problems.errors] == []  # warnings name paths that were repaired
        facts = describe(dataset)
        assert (facts.format, len(dataset)) == (name, 1)
        found = areas(dataset[0], facts.id2label)
        found.pop("background", None)
        assert found == AREAS
        assert dataset[0]["image"].size == (WIDTH, HEIGHT)
    assert available_splits(spec)[0] in ("all", "train", "default", "ds0")  # never the folder around it


def test_pascal_voc(tmp_path):
    voc(tmp_path)
    assert recognise(str(tmp_path))[0] == "voc"
    semantic = load_segmentation_dataset(f"auto:{tmp_path}")
    names = describe(semantic).id2label
    assert (len(names), len(semantic)) == (21, 1)
    assert areas(semantic[0], names) == {"background": (HEIGHT - 1) * WIDTH - 520, "car": 200, "cat": 320}
    assert (semantic[0]["segment_map"][0] == -1).all()  # number 255
    instance = load_segmentation_dataset(f"voc:{tmp_path}", task="instance")
    assert len(describe(instance).id2label) == 20
    assert areas(instance[0], describe(instance).id2label) == AREAS
    void = load_segmentation_dataset(f"voc:{tmp_path}?background=void")
    assert areas(void[0], describe(void).id2label) == AREAS


def test_vocs_colour_map():
    # Published with the development kit.
    assert [voc_color(index) for index in (0, 1, 2, 7, 15, 20, 255)] == [
        (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 128), (192, 128, 128), (0, 64, 128), (224, 224, 192),
    ]  # fmt: skip


def test_the_reason_is_told_and_the_command_works(tmp_path, capsys, caplog):
    cvat_images(tmp_path / "job")
    assert main(["check-data", f"auto:{tmp_path / 'job'}", "--output", str(tmp_path), "--samples", "0"]) == 0
    assert "is read as cvat: annotations.xml begins with <annotations>, as CVAT's XML does" in caplog.text
    assert "car" in capsys.readouterr().out
    assert "auto" in FORMATS
    assert "auto: recognises the format of a tool's export" in format_list()


def test_options_are_those_of_the_recognised_format(tmp_path):
    via_json(tmp_path)
    dataset = load_segmentation_dataset(f"auto:{tmp_path}?drop=cat&background=road", task="semantic")
    assert areas(dataset[0], describe(dataset).id2label) == {"road": HEIGHT * WIDTH - 200, "car": 200}
    with pytest.raises(ValueError, match=r"format via has no option 'colour'"):
        load_segmentation_dataset(f"auto:{tmp_path}?colour=1")


def test_several_formats_are_listed(tmp_path):
    labelme(tmp_path)
    via_json(tmp_path)
    with pytest.raises(
        ValueError, match=r"several formats fit: labelme \(a.json .*via \(via_project.json .*name the one"
    ):
        recognise(str(tmp_path))


def test_what_is_there_is_listed_if_nothing_fits(tmp_path):
    image(tmp_path / "photos" / "a.jpg")
    with pytest.raises(
        ValueError, match=r"no format is recognised; there are files \(1 \.jpg\), such as photos/a\.jpg"
    ):
        recognise(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there are no files"):
        recognise(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no such file or folder"):
        recognise(str(tmp_path / "absent"))


def cvat_xml(root: Path, shapes: str, labels: str = "", attributes: str = "") -> Path:
    image(root / "images" / "a.jpg")
    meta = f"<meta><job><labels>{labels}</labels></job></meta>" if labels else "<meta/>"
    frame = f'<image id="0" name="a.jpg" width="{WIDTH}" height="{HEIGHT}" {attributes}>{shapes}</image>'
    text(root / "annotations.xml", f"<annotations><version>1.1</version>{meta}{frame}</annotations>")
    return root


def test_cvat_shapes(tmp_path):
    shapes = (
        '<box label="low" xtl="10" ytl="10" xbr="30" ybr="20" z_order="1"/>'
        '<box label="high" xtl="10" ytl="10" xbr="20" ybr="20" z_order="2"/>'
        '<box label="low" xtl="0" ytl="0" xbr="60" ybr="40" z_order="0"/>'
        '<box label="tall" xtl="40" ytl="15" xbr="50" ybr="19" rotation="90" z_order="3"/>'
        '<ellipse label="round" cx="30" cy="30" rx="8" ry="4" z_order="3"/>'
        '<polyline label="low" points="1,1;5,5"/><tag label="low"/>'
    )
    problems = ProblemList()
    spec = f"cvat:{cvat_xml(tmp_path, shapes)}"
    dataset = load_segmentation_dataset(spec, task="semantic", problems=problems)
    assert [problem.message for problem in problems] == ["the shape has no area and is left out"]
    found = areas(dataset[0], describe(dataset).id2label)
    assert found["high"] == 100  # above the box of layer 1, though both are above the one drawn last
    assert found["tall"] == 40
    rows, columns = np.nonzero(dataset[0]["segment_map"] == 3)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (10, 4)
    assert abs(found["round"] - np.pi * 8 * 4) < 5


def test_cvat_groups_are_one_object(tmp_path):
    shapes = "".join(
        f'<box label="a" xtl="{x}" ytl="0" xbr="{x + 10}" ybr="10" group_id="{group}"/>'
        for x, group in ((0, 1), (20, 1), (40, 0), (50, 0))
    )
    shapes += '<mask label="a" rle="0, 4" left="30" top="20" width="2" height="2" group_id="1"/>'
    dataset = load_segmentation_dataset(f"cvat:{cvat_xml(tmp_path, shapes)}", task="instance")
    assert [int(decode_mask(row["rle"]).sum()) for row in dataset[0]["segments"]] == [204, 100, 100]


def test_cvat_subsets(tmp_path):
    cvat_xml(tmp_path, '<box label="a" xtl="0" ytl="0" xbr="9" ybr="9"/>', attributes='subset="Train"')
    assert available_splits(f"cvat:{tmp_path}") == ["Train"]
    assert len(load_segmentation_dataset(f"cvat:{tmp_path}", split="train")) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotations>&b;</annotations>', "declares a document type"),
        ("<annotations><image>", "no valid XML"),
        ('<annotations><meta/><track id="0" label="a"/></annotations>', "CVAT for video"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_cvat_refusals(content, message, encoding, tmp_path):
    image(tmp_path / "a.jpg")
    (tmp_path / "annotations.xml").write_bytes(content.encode(encoding))
    with pytest.raises(ValueError, match=rf"annotations\.xml: .*{message}"):
        load_segmentation_dataset(f"auto:{tmp_path}")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ('<polygon label="a" points="1,2;3"/>', "pairs of numbers"),
        ('<polygon label="a" points="1,2;3,x;3,4"/>', "pairs of numbers"),
        ('<polygon label="a" points="1,2;3,4"/>', "at least 3 points"),
        ('<box label="a" xtl="1" ytl="1" xbr="5"/>', "ybr is None; it must be a number"),
        ('<mask label="a" rle="1,2" left="0" top="0" width="2" height="2"/>', "do not add up"),
        ('<mask label="a" rle="-1,5" left="0" top="0" width="2" height="2"/>', "do not add up"),
        ('<mask label="a" rle="x" left="0" top="0" width="2" height="2"/>', "whole numbers with commas"),
        ('<mask label="a" rle="4" left="59" top="0" width="2" height="2"/>', "does not fit into the image"),
        ('<mask label="a" rle="4" left="nan" top="0" width="2" height="2"/>', "must be a whole number"),
        ('<box label="b" xtl="1" ytl="1" xbr="5" ybr="5"/>', "'b' is not in the list of classes"),
        ('<box xtl="1" ytl="1" xbr="5" ybr="5"/>', "no label"),
    ],
)
def test_faulty_shapes_of_cvat_are_left_out_by_name(shape, message, tmp_path):
    problems = ProblemList()
    good = '<box label="a" xtl="1" ytl="1" xbr="5" ybr="5"/>'
    spec = f"cvat:{cvat_xml(tmp_path, good + shape, '<label><name>a</name></label>')}"
    dataset = load_segmentation_dataset(spec, problems=problems)
    assert len(dataset[0]["segments"]) == 1
    assert [(problem.file, problem.severity) for problem in problems] == [(f"{tmp_path}/annotations.xml", "error")]
    assert "image 'a.jpg'" in problems[0].item
    assert message in problems[0].message


def test_label_studio_brush_runs():
    mask = np.random.default_rng(0).random((HEIGHT, WIDTH)) > 0.8
    assert np.array_equal(brush_mask(brush_bytes(mask), (HEIGHT, WIDTH)), mask)
    for counts, message in (
        ([], "ends too early"),
        ([0, 0, 0, 8] + [0] * 9, "8 values, but the image"),
        ("text", "list of bytes"),
        (brush_bytes(mask)[:-9], "ends too early"),
    ):
        with pytest.raises(ValueError, match=message):
            brush_mask(counts, (HEIGHT, WIDTH))


def test_label_studio_rectangles_turn_about_their_corner(tmp_path):
    image(tmp_path / "a.jpg")
    # 20 x 10 pixels at (30, 10), turned by a quarter: 10 x 20 to the left of the corner.
    value = {"x": 50, "y": 25, "width": 100 / 3, "height": 25, "rotation": 90, "rectanglelabels": ["car"]}
    round_value = {"x": 75, "y": 50, "radiusX": 10, "radiusY": 10, "rotation": 0, "ellipselabels": ["cat"]}
    regions = [{"type": "rectanglelabels", "value": value}, {"type": "ellipselabels", "value": round_value}]
    write_json(tmp_path / "x.json", label_studio_task(regions))
    rows = load_segmentation_dataset(f"label_studio:{tmp_path}")[0]["segments"]
    assert np.array_equal(decode_mask(rows[0]["rle"]), box([(20, 10), (30, 10), (30, 30), (20, 30)]))
    assert abs(int(decode_mask(rows[1]["rle"]).sum()) - np.pi * 6 * 4) < 5


def test_label_studio_minimal(tmp_path):
    image(tmp_path / "a.jpg")
    size = {"original_width": WIDTH, "original_height": HEIGHT}
    labels = [{"points": percent(CAR), "polygonlabels": ["car"], **size}]
    labels.append({"points": percent(CAT), "polygonlabels": ["cat"], **size})
    write_json(tmp_path / "x.json", [{"image": "s3://bucket/some/a.jpg", "id": 1, "label": labels, "annotator": 1}])
    dataset = load_segmentation_dataset(f"auto:{tmp_path}")
    assert areas(dataset[0], describe(dataset).id2label) == AREAS


def test_label_studio_brushes_need_the_json_file(tmp_path):
    image(tmp_path / "a.jpg")
    write_mask(tmp_path / "task-5-annotation-2-by-1-tag-cat-0.png", box(CAT).astype(np.uint8) * 255)
    with pytest.raises(ValueError, match="without the JSON export"):
        load_segmentation_dataset(f"auto:{tmp_path}")


def test_supervisely_holes_and_rectangles(tmp_path):
    supervisely(tmp_path)
    hole = [(10, 7), (20, 7), (20, 12), (10, 12)]
    objects = [
        {"classTitle": "car", "geometryType": "polygon", "points": {"exterior": CAR, "interior": [hole]}},
        {
            "classTitle": "cat",
            "geometryType": "rectangle",
            "points": {"exterior": [(50, 36), (30, 20)], "interior": []},
        },
        {"classTitle": "car", "geometryType": "point", "points": {"exterior": [(1, 1)], "interior": []}},
        {"classTitle": "cat", "geometryType": "bitmap", "bitmap": {"data": "AAAA", "origin": [0, 0]}},
        {"classTitle": "cow", "geometryType": "polygon", "points": {"exterior": CAR, "interior": []}},
    ]
    size = {"height": HEIGHT, "width": WIDTH}
    write_json(tmp_path / "ds0" / "ann" / "a.jpg.json", {"size": size, "objects": objects})
    problems = ProblemList()
    dataset = load_segmentation_dataset(f"supervisely:{tmp_path}", problems=problems)
    assert areas(dataset[0], describe(dataset).id2label) == {"car": 150, "cat": 320}
    assert [(problem.item, problem.severity) for problem in problems] == [
        ("objects[2]", "warning"), ("objects[3]", "error"), ("objects[4]", "error"),
    ]  # fmt: skip


def test_supervisely_bitmaps_do_not_explode(tmp_path):
    supervisely(tmp_path)
    path = tmp_path / "ds0" / "ann" / "a.jpg.json"
    content = json.loads(path.read_text())
    bomb = base64.b64encode(zlib.compress(bytes(2**20))).decode()
    content["objects"][1]["bitmap"]["data"] = bomb
    write_json(path, content)
    with pytest.raises(ValueError, match=r"objects\[1\]"):
        load_segmentation_dataset(f"supervisely:{tmp_path}")


def test_via_shapes_and_classes(tmp_path):
    image(tmp_path / "train" / "a.jpg")
    image(tmp_path / "val" / "a.jpg")
    shapes = [
        {"name": "circle", "cx": 20, "cy": 20, "r": 6},
        {"name": "ellipse", "cx": 45, "cy": 20, "rx": 8, "ry": 4, "theta": 0},
        {"name": "polyline", "all_points_x": [1, 2], "all_points_y": [1, 2]},
        {"name": "rect", "x": 1, "y": None, "width": 5, "height": 5},
    ]
    regions = {str(index): {"shape_attributes": shape, "region_attributes": {}} for index, shape in enumerate(shapes)}
    for split in ("train", "val"):
        write_json(tmp_path / split / "via_region_data.json", {"a.jpg9": {"filename": "a.jpg", "regions": regions}})
    problems = ProblemList()
    assert available_splits(f"via:{tmp_path}") == ["train", "val"]
    dataset = load_segmentation_dataset(f"via:{tmp_path}", split="val", problems=problems)
    assert describe(dataset).id2label == {0: "object"}  # regions without attributes
    found = [int(decode_mask(row["rle"]).sum()) for row in dataset[0]["segments"]]
    assert [abs(area - truth) < 6 for area, truth in zip(found, (np.pi * 36, np.pi * 32), strict=True)] == [True, True]
    assert [problem.severity for problem in problems] == ["warning", "error"]
    assert problems[0].file == f"{tmp_path}/val/via_region_data.json"


def test_via_attributes_that_could_be_the_class(tmp_path):
    image(tmp_path / "a.jpg")
    shape = {"name": "rect", "x": 1, "y": 2, "width": 5, "height": 5}
    region = {"shape_attributes": shape, "region_attributes": {"colour": "red", "kind": {"cat": True, "dog": False}}}
    write_json(tmp_path / "via.json", {"a.jpg9": {"filename": "a.jpg", "regions": [region]}})
    with pytest.raises(ValueError, match=r"attributes colour, kind, .*attribute="):
        load_segmentation_dataset(f"via:{tmp_path}")
    dataset = load_segmentation_dataset(f"via:{tmp_path}?attribute=kind")
    assert describe(dataset).id2label == {0: "cat"}


def test_datumaro_groups_crowds_and_boxes(tmp_path):
    cvat_datumaro(tmp_path)
    path = tmp_path / "annotations" / "default.json"
    content = json.loads(path.read_text())
    rows = content["items"][0]["annotations"]
    rows[0]["group"] = 3
    rows.append({"id": 2, "type": "bbox", "group": 3, "label_id": 0, "bbox": [0, 30, 10, 5]})
    rows.append(
        {"id": 3, "type": "polygon", "group": 0, "label_id": 0, "points": flat(CAT), "attributes": {"is_crowd": True}}
    )
    rows.append({"id": 4, "type": "label", "group": 0, "label_id": 0})
    rows.append({"id": 5, "type": "polygon", "group": 0, "label_id": 9, "points": flat(CAT)})
    write_json(path, content)
    problems = ProblemList()
    rows = load_segmentation_dataset(f"datumaro:{tmp_path}", problems=problems)[0]["segments"]
    assert [(int(decode_mask(row["rle"]).sum()), row["is_crowd"]) for row in rows] == [
        (250, False), (320, False), (320, True),
    ]  # fmt: skip
    assert [problem.severity for problem in problems] == ["warning", "error"]
    rows = load_segmentation_dataset(f"datumaro:{tmp_path}?crowd=objects", problems=problems)[0]["segments"]
    assert [row["is_crowd"] for row in rows] == [False] * 3


def test_segments_ai_stuff_and_vectors(tmp_path):
    segments_ai(tmp_path)
    path = tmp_path / "x-v0.1.json"
    content = json.loads(path.read_text())
    content["dataset"]["task_attributes"]["categories"][1]["has_instances"] = False
    write_json(path, content)
    panoptic = load_segmentation_dataset(f"segments_ai:{tmp_path}", task="panoptic")
    assert describe(panoptic).stuff_classes == [1]
    instance = load_segmentation_dataset(f"segments_ai:{tmp_path}", task="instance")
    assert areas(instance[0], describe(instance).id2label) == {"car": 200}
    vectors = [{"id": 1, "category_id": 1, "type": "polygon", "points": CAR}]
    content["dataset"]["samples"][0]["labels"]["ground-truth"]["attributes"]["annotations"] = vectors
    write_json(path, content)
    instance = load_segmentation_dataset(f"segments_ai:{tmp_path}", task="instance")
    assert areas(instance[0], describe(instance).id2label) == {"car": 200}


def test_colours_of_voc_without_a_class_are_named(tmp_path):
    cvat_mask(tmp_path)
    pixels = np.array(Image.open(tmp_path / "SegmentationClass" / "a.png"))
    pixels[3] = (1, 2, 3)
    write_mask(tmp_path / "SegmentationClass" / "a.png", pixels)
    with pytest.raises(ValueError, match=r"a\.png: the colour \(1, 2, 3\) stands for no class of .*labelmap\.txt"):
        load_segmentation_dataset(f"voc:{tmp_path}")[0]


ODD_VALUES = (None, True, -1, 10**30, 1e400, "x", "", [], {}, [None], [[1, 2], [3]], {"a": None})
WITH_JSON = ("CVAT Datumaro", "Label Studio JSON", "Supervisely", "VIA JSON", "makesense VGG", "segments.ai")


def positions(content: Any) -> list[tuple[Any, Any]]:
    """Every container in some JSON content with each of its keys."""
    if not isinstance(content, dict | list):
        return []
    keys = list(content) if isinstance(content, dict) else list(range(min(3, len(content))))
    return [(content, key) for key in keys] + [pair for key in keys for pair in positions(content[key])]


@pytest.mark.parametrize("tool", WITH_JSON)
def test_odd_values_never_end_in_an_error_of_a_library(tool, tmp_path):
    writer, name = TOOLS[tool]
    writer(tmp_path)
    for path in sorted(tmp_path.rglob("*.json")):
        original = path.read_text()
        for index in range(len(positions(json.loads(original)))):
            # One odd value a position, and another one at the next: all of them at all would take minutes.
            for value in ODD_VALUES[index % 4 :: 4]:
                content = json.loads(original)
                container, key = positions(content)[index]
                container[key] = value
                write_json(path, content)
                problems = ProblemList()
                try:
                    dataset = load_segmentation_dataset(f"{name}:{tmp_path}", task="instance", problems=problems)
                    assert len(dataset) or problems
                    for sample in dataset:
                        assert sample["image"].size == (WIDTH, HEIGHT)
                except ValueError as error:
                    assert str(tmp_path) in str(error), (key, value)  # noqa: PT017
        path.write_text(original)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models for car and cat, one for each task."""
    folder = tmp_path_factory.mktemp("models")
    for task in ("instance", "panoptic", "semantic"):
        tiny_eomt(id2label=dict(enumerate(AREAS))).save_pretrained(folder / task)
        EoMTImageProcessor(task=task, size={"height": 64, "width": 64}).save_pretrained(folder / task)
    return folder


@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
def test_evaluation_takes_the_task_of_the_checkpoint(task, models, tmp_path, capsys):
    labelme(tmp_path / "export" / "val")
    command = ["evaluate", "--device", "cpu", "--model", str(models / task), "--data", f"auto:{tmp_path / 'export'}"]
    assert main([*command, "--json", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["task"] == task
    assert f"evaluate: task {task}, as of " in capsys.readouterr().err


def test_evaluation_names_what_the_data_lack(models, tmp_path, capsys):
    roboflow_coco(tmp_path / "coco")
    image(tmp_path / "masks" / "images" / "val" / "a.jpg")
    write_mask(tmp_path / "masks" / "annotations" / "val" / "a.png", (box(CAT) * 1).astype(np.uint8))
    text(tmp_path / "masks" / "classes.txt", "car\ncat\n")
    command = ["evaluate", "--device", "cpu", "--model"]

    def error(task: str, data: str, *more: str) -> str:
        assert main([*command, str(models / task), "--data", f"auto:{tmp_path / data}", *more]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "masks has labels for semantic and panoptic segmentation, and " in error("instance", "masks")
    assert "is for instance segmentation alone; give --data that has such labels" in error("instance", "masks")
    assert "no class is a thing; say so in classes.json with is_thing" in error("panoptic", "masks")
    assert "has no split to score on, only train; name one with --split" in error("instance", "coco")
    assert "outlines do not say which classes are stuff" in error("panoptic", "coco", "--split", "train")


def test_evaluation_says_it_where_another_task_is_scored(models, tmp_path, capsys):
    voc_masks(tmp_path / "voc")
    text(
        tmp_path / "voc" / "classes.txt",
        "background\n" + "".join(f"{number}\n" for number in range(1, 7)) + "car\ncat\n",
    )
    main(["evaluate", "--device", "cpu", "--model", str(models / "panoptic"), "--data", f"auto:{tmp_path / 'voc'}"])
    assert "task semantic, as of " in (said := capsys.readouterr().err)
    assert "and the data, which have no panoptic labels" in said


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", "0 0.5 0.5 0.2 0.2\n"), ("labels_street.csv", "car,5,5,20,10,a.jpg,60,40\n")],
)
def test_boxes_are_called_boxes(name, content, tmp_path):
    image(tmp_path / "a.jpg")
    text(tmp_path / name, content)
    with pytest.raises(ValueError, match=rf"{name} lists boxes, .* which cannot train masks; export polygons"):
        recognise(str(tmp_path))


def test_semantic_maps_of_numbered_segments_have_no_missing_ones(tmp_path):
    segments_ai(tmp_path)
    assert check_dataset(f"auto:{tmp_path}", task="semantic").problems == []


def test_a_mask_folder_in_a_folder(tmp_path):
    image(tmp_path / "street" / "images" / "train" / "a.jpg")
    write_mask(tmp_path / "street" / "annotations" / "train" / "a.png", (box(CAT) * 1).astype(np.uint8))
    text(tmp_path / "street" / "classes.txt", "car\ncat\n")
    dataset = load_segmentation_dataset(f"auto:{tmp_path}")
    assert areas(dataset[0], describe(dataset).id2label) == {"car": HEIGHT * WIDTH - 320, "cat": 320}


def test_the_split_for_training_decides_the_order_of_classes(tmp_path):
    for split, names in (("Train", ("wood", "cat", "car")), ("Test", ("car", "dog", "cat"))):
        cvat_datumaro(tmp_path)
        file = tmp_path / "annotations" / "default.json"
        content = json.loads(file.read_text())
        content["categories"]["label"]["labels"] = [{"name": name} for name in names]
        write_json(tmp_path / "annotations" / f"{split}.json", content)
        file.unlink()
    for split in ("Test", "train"):
        labels = describe(load_segmentation_dataset(f"auto:{tmp_path}", split=split)).id2label
        assert list(labels.values()) == ["wood", "cat", "car", "dog"]


def test_names_that_differ_in_case_are_named(tmp_path):
    cvat_images(tmp_path)
    (tmp_path / "images" / "a.jpg").rename(tmp_path / "images" / "A.JPG")
    with pytest.raises(ValueError, match=r"there is 'images/A\.JPG', which differs in case"):
        load_segmentation_dataset(f"auto:{tmp_path}")


@pytest.mark.parametrize(("writer", "name"), [(via_csv, "via_region_data.csv"), (cvat_mask, "labelmap.txt")])
def test_encodings_of_text_files(writer, name, tmp_path):
    for encoding in ("utf-16", "gbk"):
        writer(tmp_path / encoding)
        file = tmp_path / encoding / name
        file.write_bytes(file.read_text().replace("cat", "\u6c7d\u8f66").encode(encoding))
    dataset = load_segmentation_dataset(f"auto:{tmp_path / 'utf-16'}")
    assert areas(dataset[0], describe(dataset).id2label)["\u6c7d\u8f66"] == 320
    with pytest.raises(ValueError, match=rf"{name}: no valid UTF-8 text .*perhaps GBK"):
        load_segmentation_dataset(f"auto:{tmp_path / 'gbk'}")


def test_tasks_that_nobody_annotated_are_left_out(tmp_path):
    label_studio_json(tmp_path)
    file = tmp_path / "project-1-at-2024-05-01.json"
    tasks = json.loads(file.read_text())
    skipped = [{"id": 3, "was_cancelled": True, "result": []}]
    empty = [{"id": 4, "was_cancelled": False, "result": []}]
    for number, annotations in ((6, []), (7, skipped), (8, empty)):
        image(tmp_path / f"{number}.jpg")
        tasks.append({"id": number, "data": {"image": f"{number}.jpg"}, "annotations": annotations})
    write_json(file, tasks)
    problems = ProblemList()
    dataset = load_segmentation_dataset(f"auto:{tmp_path}", problems=problems)
    assert [row["image_id"] for row in dataset.with_format(None)] == ["a", "8"]
    assert [(problem.severity, problem.item) for problem in problems] == [("warning", "task 6"), ("warning", "task 7")]


def test_regions_of_label_studio_without_a_label_are_errors(tmp_path):
    image(tmp_path / "a.jpg")
    value = {"points": percent(CAR), "closed": True}
    regions = [
        {"id": "r1", "type": "polygonlabels", "value": {**value, "polygonlabels": ["car"]}},
        {"id": "r1", "type": "choices", "value": {**value, "choices": ["blurred"]}},
        {"id": "r2", "type": "polygon", "value": {"points": percent(CAT), "closed": True}},
        {"id": "r2", "type": "labels", "value": {"points": percent(CAT), "closed": True, "labels": ["cat"]}},
        {"id": "r3", "type": "polygonlabels", "value": {**value, "polygonlabels": []}},
    ]
    write_json(tmp_path / "x.json", label_studio_task(regions))
    problems = ProblemList()
    dataset = load_segmentation_dataset(f"label_studio:{tmp_path}", problems=problems)
    assert areas(dataset[0], describe(dataset).id2label) == AREAS
    assert [problem.message for problem in problems] == [
        "the region has no label; choose one in Label Studio, or delete it"
    ]


def test_alpha_masks_of_supervisely_are_bitmaps(tmp_path):
    supervisely(tmp_path)
    file = tmp_path / "ds0" / "ann" / "a.jpg.json"
    file.write_text(file.read_text().replace('"geometryType": "bitmap"', '"geometryType": "alpha_mask"'))
    dataset = load_segmentation_dataset(f"auto:{tmp_path}")
    assert areas(dataset[0], describe(dataset).id2label) == AREAS


@pytest.mark.parametrize("status", ["UNLABELED", "SKIPPED"])
def test_samples_that_nobody_labelled_are_left_out(status, tmp_path):
    segments_ai(tmp_path)
    image(tmp_path / "b.jpg")
    file = tmp_path / "x-v0.1.json"
    release = json.loads(file.read_text())
    label = {"label_status": status, "attributes": {"format_version": "0.1", "annotations": []}}
    release["dataset"]["samples"].append({"name": "b.jpg", "labels": {"ground-truth": label}})
    write_json(file, release)
    problems = ProblemList()
    assert len(load_segmentation_dataset(f"auto:{tmp_path}", problems=problems)) == 1
    assert [str(problem.item) for problem in problems] == ["sample 'b.jpg'"]
