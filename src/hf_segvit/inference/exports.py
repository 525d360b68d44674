"""Results in the formats of annotation tools, evaluation servers and data pipelines.

Some formats have a file for each image, which `write_image_exports` writes beside the other results; the others are
made by `write_folder_exports` of what a job has recorded, so that a job that went on, or shards, make one whole file.
Polygons are at most `TOLERANCE` pixels from the exact outlines; masks, RLE and PNGs are exact. `EXPORTS` lists all.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
from PIL import Image

from ..atomic_files import write_json, writing
from ..data.bravo_files import CONFIDENCE, PREDICTION
from ..data.label_tables import LABEL_TABLES, LabelTable, label_table
from ..data.mask_files import id_png, panoptic_png
from ..data.outlines import joined, mask_polygons
from ..models.mask_encoding import decode_mask
from .segmented_image import SegmentedImage, prepare_paths, save_image

TOLERANCE = 1.0
_TABLE_ROWS = 256  # of a row group

Rows = Callable[[], Iterator[dict[str, Any]]]


def write_image_exports(kinds: Iterable[str], folder: Path, name: str, answer: SegmentedImage) -> None:
    """Write the chosen formats that have files for each image; `name` is that of the image's results.

    Raises:
        OccupiedName: something else has the name of a file.
        ValueError: a file cannot be written, or the format does not fit the task.
    """
    for kind in kinds:
        if kind in IMAGE_EXPORTS:
            IMAGE_EXPORTS[kind](folder, name, answer)


def write_folder_exports(kinds: Iterable[str], folder: Path, rows: Rows, classes: "Classes") -> list[Path]:
    """Write the chosen formats that have a file for a whole folder, and return their paths.

    Args:
        rows: gives the rows of `row_of`, anew at each call.
    """
    return [FOLDER_EXPORTS[kind](folder, rows, classes) for kind in kinds if kind in FOLDER_EXPORTS]


def refuse_exports(kinds: Iterable[str], task: str, classes: "Classes") -> None:
    """Refuse formats that the task or the model's classes do not fit, before any work."""
    for kind in kinds:
        wanted = {"ade20k": "semantic", "cityscapes": "semantic", "bravo": "semantic", "coco-panoptic": "panoptic"}.get(
            kind, task
        )
        if task != wanted:
            raise ValueError(f"--outputs {kind} is for {wanted} segmentation, not for {task}; choose another --task")
        table = "cityscapes" if kind == "bravo" else kind
        if kind in ("ade20k", "cityscapes", "bravo") and classes.table_name != table:
            raise ValueError(
                f"--outputs {kind} needs a model of its classes, which are those of {table} in their order; "
                "this one has others"
            )


def row_of(name: str, picture: str, answer: SegmentedImage, whole: bool) -> dict[str, Any]:
    """What a job records of an image: its segments if `whole`, as `write_folder_exports` needs, or their number."""
    if not whole:
        return {"name": name, "segments": len(answer.segments)}
    segments = [
        {
            "id": each.id,
            "label_id": each.label_id,
            "label": each.label,
            "score": each.score,
            "area": each.area,
            "bbox": list(each.bbox),
            "segmentation": answer.rle(each),
        }
        for each in answer.segments
    ]
    height, width = answer.segment_map.shape
    return {
        "name": name,
        "picture": picture,
        "task": answer.task,
        "width": width,
        "height": height,
        "segments": segments,
    }


class Classes:
    """The classes of a model as formats name them.

    Args:
        id2label: names by label id.
        stuff: label ids that are no things.
    """

    def __init__(self, id2label: Mapping[int, str], stuff: Iterable[int] = ()) -> None:
        self.id2label = dict(id2label)
        table = _matching_table(self.id2label)
        self.table_name = "" if table is None else table.name
        # Evaluation servers know the numbers of the data set.
        self.ids = {label: label if table is None else table.classes[label].source_id for label in self.id2label}
        stuff = set(stuff)
        if table is not None and not stuff:
            stuff = {index for index, each in enumerate(table.classes) if not each.is_thing}
        self.stuff = stuff

    def categories(self) -> list[dict[str, Any]]:
        """COCO's list of them."""
        return [
            {"id": self.ids[label], "name": name, "supercategory": "", "isthing": int(label not in self.stuff)}
            for label, name in self.id2label.items()
        ]


def _matching_table(id2label: Mapping[int, str]) -> LabelTable | None:
    """The published classes that these are, in their order."""
    for name in LABEL_TABLES:
        table = label_table(name)
        if [each.name for each in table.classes] == [id2label.get(index) for index in range(len(id2label))]:
            return table
    return None


# Formats with files for each image.


def _crops(folder: Path, name: str, answer: SegmentedImage) -> None:
    for segment in answer.segments:
        _save(answer.crop(segment), folder / "crops" / name / f"{segment.id:04}.png")


def _masks(folder: Path, name: str, answer: SegmentedImage) -> None:
    for segment in answer.segments:
        mask = np.where(answer.mask(segment), np.uint8(255), np.uint8(0))
        _save(Image.fromarray(mask), folder / "masks" / name / f"{segment.id:04}.png")


def _labelme(folder: Path, name: str, answer: SegmentedImage) -> None:
    shapes = [
        {
            "label": segment.label,
            "points": ring.tolist(),
            "group_id": segment.id,
            "description": "" if segment.score is None else f"score {segment.score:.4f}",
            "shape_type": "polygon",
            "flags": {},
        }
        for segment, parts in zip(answer.segments, answer.outlines(TOLERANCE), strict=True)
        for ring in (joined([part]) for part in parts)
    ]
    height, width = answer.segment_map.shape
    path = folder / "labelme" / f"{name}.json"
    prepare_paths([path])
    content = {"version": "5.0.0", "flags": {}, "shapes": shapes, "imagePath": PurePosixPath(answer.source).name}
    write_json(path, {**content, "imageData": None, "imageHeight": height, "imageWidth": width})


def _yolo(folder: Path, name: str, answer: SegmentedImage) -> None:
    height, width = answer.segment_map.shape
    lines = []
    for segment, parts in zip(answer.segments, answer.outlines(TOLERANCE), strict=True):
        ring = joined(parts) / (width, height)  # a line is one object, so its parts are joined
        if len(ring):
            lines.append(f"{segment.label_id} " + " ".join(f"{value:.6f}" for value in ring.ravel()))
    path = folder / "yolo" / "labels" / f"{name}.txt"
    prepare_paths([path])
    _write_text(path, ["".join(f"{line}\n" for line in lines)])


def _ade20k(folder: Path, name: str, answer: SegmentedImage) -> None:
    # The server's files have 1 to 150, and 0 for what is none of them.
    _save(Image.fromarray((answer.segment_map + 1).astype(np.uint8)), folder / "ade20k" / f"{name}.png")


def _cityscapes(folder: Path, name: str, answer: SegmentedImage) -> None:
    classes = label_table("cityscapes").classes
    ids = np.array([*(each.source_id for each in classes), 0], dtype=np.uint8)  # void is the last, at -1
    _save(Image.fromarray(ids[answer.segment_map]), folder / "cityscapes" / f"{name}.png")


def _bravo(folder: Path, name: str, answer: SegmentedImage) -> None:
    """The files of data/bravo_files.py, whose names begin as those of the challenge's images."""
    _save(answer.confidence_image(), folder / "bravo" / f"{name}{CONFIDENCE}")
    _save(Image.fromarray(answer.segment_map.astype(np.uint8)), folder / "bravo" / f"{name}{PREDICTION}")


def _save(image: Image.Image, path: Path) -> None:
    prepare_paths([path])
    save_image(image, path)


# Formats with one file, made of the rows of a job.


def _json_lines(folder: Path, rows: Rows, classes: Classes) -> Path:
    path = folder / "segments.jsonl"
    _write_text(path, (json.dumps(_public(row)) + "\n" for row in rows()))
    return path


def _parquet(folder: Path, rows: Rows, classes: Classes) -> Path:
    import pyarrow
    from pyarrow import parquet

    schema, path = table_schema(), folder / "segments.parquet"
    with writing(path) as partial, parquet.ParquetWriter(partial, schema) as writer:
        for chunk in _chunks(rows()):
            content = [{**_public(row), "path": row["picture"], "panoptic_png": id_png(_id_map(row))} for row in chunk]
            writer.write_table(pyarrow.Table.from_pylist(content, schema=schema))
    return path


def table_schema() -> Any:
    """The columns of Parquet files as a `pyarrow.Schema`."""
    import pyarrow

    rle = pyarrow.struct([("size", pyarrow.list_(pyarrow.int64())), ("counts", pyarrow.string())])
    segment = pyarrow.struct(
        [
            ("id", pyarrow.int64()),
            ("label_id", pyarrow.int64()),
            ("label", pyarrow.string()),
            ("score", pyarrow.float64()),
            ("area", pyarrow.int64()),
            ("bbox", pyarrow.list_(pyarrow.int64())),
            ("segmentation", rle),
        ]
    )
    return pyarrow.schema(
        [
            ("path", pyarrow.string()),
            ("name", pyarrow.string()),
            ("task", pyarrow.string()),
            ("width", pyarrow.int64()),
            ("height", pyarrow.int64()),
            ("segments", pyarrow.list_(segment)),
            ("panoptic_png", pyarrow.binary()),
        ]
    )


def _coco(folder: Path, rows: Rows, classes: Classes) -> Path:
    """`coco_results.json` for COCO's evaluation server, and `coco_annotations.json`, a data set of its own."""
    ids = _image_ids(rows())

    def results(with_ids: bool) -> Iterator[dict[str, Any]]:
        number = 0
        for row in rows():
            for segment in row["segments"]:
                number += 1
                result = {
                    "image_id": ids[row["name"]],
                    "category_id": classes.ids[segment["label_id"]],
                    "segmentation": segment["segmentation"],
                    "score": 1.0 if segment["score"] is None else segment["score"],
                }
                # Without boxes in results: pycocotools would take them for the answers, and their areas for the masks'.
                further = {"id": number, "bbox": segment["bbox"], "area": segment["area"], "iscrowd": 0}
                yield {**result, **further} if with_ids else result

    _write_text(folder / "coco_results.json", _json_list(results(False)))
    path = folder / "coco_annotations.json"
    _write_coco(path, ids, rows, results(True), classes)
    return path


def _coco_panoptic(folder: Path, rows: Rows, classes: Classes) -> Path:
    """`coco_panoptic/panoptic.json` and PNGs in a folder of that name, as the server and panopticapi take them."""
    ids = _image_ids(rows())

    def annotations() -> Iterator[dict[str, Any]]:
        for row in rows():
            path = folder / "coco_panoptic" / "panoptic" / f"{row['name']}.png"
            prepare_paths([path])
            panoptic_png(_id_map(row) - 1, path)
            segments = [
                {
                    "id": segment["id"],
                    "category_id": classes.ids[segment["label_id"]],
                    "area": segment["area"],
                    "bbox": segment["bbox"],
                    "iscrowd": 0,
                }
                for segment in row["segments"]
            ]
            yield {"image_id": ids[row["name"]], "file_name": f"{row['name']}.png", "segments_info": segments}

    path = folder / "coco_panoptic" / "panoptic.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_coco(path, ids, rows, annotations(), classes)
    return path


def _cvat(folder: Path, rows: Rows, classes: Classes) -> Path:
    def lines() -> Iterator[str]:
        yield '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n<meta><task><labels>\n'
        for name in classes.id2label.values():
            escaped = quoteattr(name)[1:-1].replace("&quot;", '"')
            yield f"<label><name>{escaped}</name><type>polygon</type></label>\n"
        yield "</labels></task></meta>\n"
        for number, row in enumerate(rows()):
            name = quoteattr(_picture(row))
            yield f'<image id="{number}" name={name} width="{row["width"]}" height="{row["height"]}">\n'
            for segment in row["segments"]:
                for ring in _part_rings(segment):
                    points = ";".join(f"{x:.2f},{y:.2f}" for x, y in ring.tolist())
                    yield (
                        f'<polygon label={quoteattr(segment["label"])} source="auto" occluded="0" points="{points}" '
                        f'z_order="0" group_id="{segment["id"]}"></polygon>\n'
                    )
            yield "</image>\n"
        yield "</annotations>\n"

    path = folder / "cvat_annotations.xml"
    _write_text(path, lines())
    return path


def _label_studio(folder: Path, rows: Rows, classes: Classes) -> Path:
    """Tasks with predictions, for a labelling configuration of PolygonLabels "label" on the Image "image"."""

    def tasks() -> Iterator[dict[str, Any]]:
        for row in rows():
            scale = np.array([100 / row["width"], 100 / row["height"]])
            results = [
                {
                    "id": f"{segment['id']}-{part}",
                    "type": "polygonlabels",
                    "from_name": "label",
                    "to_name": "image",
                    "original_width": row["width"],
                    "original_height": row["height"],
                    "image_rotation": 0,
                    "score": segment["score"],
                    "value": {"points": (ring * scale).tolist(), "closed": True, "polygonlabels": [segment["label"]]},
                }
                for segment in row["segments"]
                for part, ring in enumerate(_part_rings(segment))
            ]
            yield {"data": {"image": _picture(row)}, "predictions": [{"model_version": "hf-segvit", "result": results}]}

    path = folder / "label_studio.json"
    _write_text(path, _json_list(tasks()))
    return path


def _yolo_settings(folder: Path, rows: Rows, classes: Classes) -> Path:
    path = folder / "yolo" / "data.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    names = "".join(f"  {label}: {json.dumps(name)}\n" for label, name in classes.id2label.items())
    _write_text(path, [f"path: .\ntrain: images\nval: images\nnames:\n{names}"])
    return path


IMAGE_EXPORTS: dict[str, Callable[[Path, str, SegmentedImage], None]] = {
    "crops": _crops,
    "masks": _masks,
    "labelme": _labelme,
    "yolo": _yolo,
    "ade20k": _ade20k,
    "cityscapes": _cityscapes,
    "bravo": _bravo,
}
FOLDER_EXPORTS: dict[str, Callable[[Path, Rows, Classes], Path]] = {
    "jsonl": _json_lines,
    "parquet": _parquet,
    "coco": _coco,
    "coco-panoptic": _coco_panoptic,
    "cvat": _cvat,
    "label-studio": _label_studio,
    "yolo": _yolo_settings,
}


def _public(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what the job adds to it."""
    return {name: row[name] for name in ("picture", "name", "task", "width", "height", "segments")}


def _picture(row: Mapping[str, Any]) -> str:
    return PurePosixPath(row["picture"].replace("\\", "/")).name


def _image_ids(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """COCO's ids of images by the name of their results: their file names where these are numbers, or else 1, 2, ..."""
    names = [row["name"] for row in rows]
    stems = [PurePosixPath(name).name for name in names]
    numbers = [int(stem) for stem in stems if stem.isascii() and stem.isdigit()]
    if len(set(numbers)) == len(names):
        return dict(zip(names, numbers, strict=True))
    return {name: number for number, name in enumerate(names, start=1)}


def _part_rings(segment: Mapping[str, Any]) -> list[np.ndarray]:
    return [joined([part]) for part in mask_polygons(decode_mask(segment["segmentation"]), TOLERANCE)]


def _id_map(row: Mapping[str, Any]) -> np.ndarray:
    """(H, W) int32 of segment ids, void 0; the best of overlapping instances on top."""
    ids = np.zeros((row["height"], row["width"]), dtype=np.int32)
    for segment in sorted(row["segments"], key=lambda segment: segment["score"] or 0):
        # Classes of semantic maps count from 0, which is void here.
        ids[decode_mask(segment["segmentation"])] = segment["id"] + (row["task"] == "semantic")
    return ids


def _write_coco(
    path: Path, ids: Mapping[str, int], rows: Rows, annotations: Iterable[Mapping[str, Any]], classes: Classes
) -> None:
    def parts() -> Iterator[str]:
        # pycocotools before 2.0.11 loads results only beside a file with `info`.
        yield '{"info": {}, "images": '
        yield from _json_list(
            {"id": ids[row["name"]], "file_name": _picture(row), "width": row["width"], "height": row["height"]}
            for row in rows()
        )
        yield f', "categories": {json.dumps(classes.categories())}, "annotations": '
        yield from _json_list(annotations)
        yield "}\n"

    _write_text(path, parts())


def _json_list(entries: Iterable[Any]) -> Iterator[str]:
    yield "["
    for number, entry in enumerate(entries):
        yield (",\n" if number else "\n") + json.dumps(entry)
    yield "\n]"


def _write_text(path: Path, parts: Iterable[str]) -> None:
    with writing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.writelines(parts)


def _chunks(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _TABLE_ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
