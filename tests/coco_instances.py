"""COCO files of instances, evaluated by pycocotools and brought to what our metrics take."""

import contextlib
import io
from typing import Any

import numpy as np
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

# In the order of pycocotools' twelve numbers.
STATISTICS = (
    *("ap", "ap_50", "ap_75", "ap_small", "ap_medium", "ap_large"),
    *("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"),
)


def pycocotools_statistics(annotations: dict[str, Any], results: list[dict[str, Any]]) -> np.ndarray:
    """The twelve numbers; NaN where pycocotools says -1."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = annotations
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.where(evaluation.stats < 0, np.nan, evaluation.stats)


def metric_inputs(annotations: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Keyword arguments of `MaskAveragePrecision.add_batch`, with masks as RLE."""
    label_of = {category["id"]: index for index, category in enumerate(annotations["categories"])}
    sizes = {image["id"]: (image["height"], image["width"]) for image in annotations["images"]}
    sides: tuple[dict, dict] = tuple({i: {"segmentation": [], "segments_info": []} for i in sizes} for _ in range(2))  # type: ignore[assignment]
    for side, rows in zip(sides, (results, annotations["annotations"]), strict=True):
        for number, row in enumerate(rows):
            segmentation = row["segmentation"]
            if isinstance(segmentation, list):
                segmentation = coco_masks.merge(coco_masks.frPyObjects(segmentation, *sizes[row["image_id"]]))
            side[row["image_id"]]["segmentation"].append(segmentation)
            info = {"id": number, "label_id": label_of[row["category_id"]]}
            extra = {"score": row["score"]} if "score" in row else {"is_crowd": row["iscrowd"], "area": row["area"]}
            side[row["image_id"]]["segments_info"].append(info | extra)
    ids = list(sizes)
    return {"predictions": [sides[0][i] for i in ids], "references": [sides[1][i] for i in ids], "image_ids": ids}
