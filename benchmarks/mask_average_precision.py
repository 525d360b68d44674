"""Mask AP of 100 COCO images: time compared with pycocotools, COCO's reference evaluator, on one core.

    python benchmarks/mask_average_precision.py [FOLDER] [--copies N]

FOLDER (default: `coco_instances_sample` in the sample data, see tests/conftest.py) holds annotations and results in
COCO's format. Theirs is `evaluate` and `accumulate`; ours is `add_batch` and `compute` on the same run-length encoded
masks, checks included. Reading JSON and drawing polygons is left out of both. `--copies` repeats the images under new
ids.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
from measuring import machine, report, time_pair
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hf_segvit.metrics.mask_average_precision import MaskAveragePrecision

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.coco_instances import STATISTICS, metric_inputs  # noqa: E402

BUDGET = 1 / 3


def repeated(annotations: dict, results: list[dict], copies: int) -> tuple[dict, list[dict]]:
    """The same images several times, under new ids."""
    many = {**annotations, "images": [], "annotations": []}
    found = []
    step = 1 + max(image["id"] for image in annotations["images"])
    for number in range(copies):
        many["images"] += [{**image, "id": image["id"] + number * step} for image in annotations["images"]]
        for row in annotations["annotations"]:
            new = {"id": len(many["annotations"]) + 1, "image_id": row["image_id"] + number * step}
            many["annotations"].append({**row, **new})
        found += [{**row, "image_id": row["image_id"] + number * step} for row in results]
    return many, found


def main() -> None:
    sample = Path(os.environ.get("HF_SEGVIT_SAMPLE_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=sample / "coco_instances_sample")
    parser.add_argument("--copies", type=int, default=1)
    args = parser.parse_args()
    (annotation_file,) = (path for path in args.folder.glob("instances_*.json") if "results" not in path.name)
    (result_file,) = args.folder.glob("*_results.json")
    annotations, results = repeated(
        json.loads(annotation_file.read_text()), json.loads(result_file.read_text()), args.copies
    )
    inputs = metric_inputs(annotations, results)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(annotations)
        truth.createIndex()
        # Their masks are run-length encoded beforehand, as ours are.
        for row in truth.dataset["annotations"]:
            row["segmentation"] = truth.annToRLE(row)
        found = truth.loadRes(copy.deepcopy(results))

    def theirs() -> np.ndarray:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(truth, found, "segm")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation.stats

    def ours() -> np.ndarray:
        metric = MaskAveragePrecision(num_labels=len(annotations["categories"]))
        metric.add_batch(**inputs)
        result = metric.compute()
        return np.array([result[name] for name in STATISTICS])

    difference = np.abs(ours() - theirs()).max()
    print(machine() + f", numpy {np.__version__}")
    print(f"{len(annotations['images'])} images, {len(annotations['annotations'])} objects, {len(results)} predictions")
    print(f"AP {ours()[0]:.6f}, largest difference of twelve numbers {difference:.1e}")
    if difference > 1e-12:
        raise SystemExit("the results differ: the timings would compare different things")
    report("masks to result", *time_pair(ours, theirs, repeats=5), budget=BUDGET)


if __name__ == "__main__":
    main()
