"""Panoptic quality of 100 images: time compared with panopticapi, COCO's reference evaluator, on one core.

    python benchmarks/metrics.py [FOLDER]

FOLDER (default: `coco_train100` in the sample data, see tests/conftest.py) is in COCO's panoptic layout. Predictions
are its annotations shifted by a few pixels, with a tenth of the labels swapped. panopticapi counts from PNG files, so
two rows are printed: everything from files to result, and the counting alone, where its time is the whole less the
time of its own decoding. Where panopticapi is not installed
(`pip install git+https://github.com/cocodataset/panopticapi`), the plain-loop reference of the tests stands in for it.
"""

import contextlib
import importlib.util
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measuring import machine, report, spread
from PIL import Image

from hf_segvit.data.mask_files import panoptic_png, read_color_ids
from hf_segvit.metrics.panoptic_quality import PanopticQuality

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 5


def read_panoptic_png(path: Path) -> np.ndarray:
    """(H, W) ids of a COCO panoptic PNG, less one so that void is -1."""
    return read_color_ids({"archive": None, "member": str(path)}) - 1


def make_predictions(annotations: list[dict], truth: Path, folder: Path, generator: np.random.Generator) -> list[dict]:
    """Write plausible predictions as COCO files and return their rows."""
    predictions = []
    for annotation in annotations:
        segmentation = read_panoptic_png(truth / annotation["file_name"])
        segmentation = np.roll(segmentation, generator.integers(-12, 13, 2), axis=(0, 1))
        panoptic_png(segmentation, folder / annotation["file_name"])
        rows = annotation["segments_info"]
        labels = [row["category_id"] for row in rows]
        swapped = [int(generator.choice(labels)) if generator.random() < 0.1 else label for label in labels]
        segments = [{"id": row["id"], "category_id": label} for row, label in zip(rows, swapped, strict=True)]
        predictions.append(annotation | {"segments_info": segments})
    return predictions


def load(annotations: list[dict], folder: Path, label_of: dict[int, int]) -> list[dict]:
    """What the metric takes; decoded ids are those of the files less one."""
    return [
        {
            "segmentation": read_panoptic_png(folder / annotation["file_name"]),
            "segments_info": [
                {"id": row["id"] - 1, "label_id": label_of[row["category_id"]], "is_crowd": row.get("iscrowd", 0)}
                for row in annotation["segments_info"]
            ],
        }
        for annotation in annotations
    ]


def seconds(function) -> tuple[float, object]:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        result = function()
    return time.perf_counter() - start, result


def main() -> None:
    sample = Path(os.environ.get("HF_SEGVIT_SAMPLE_DATA", ROOT.parent / "shared" / "data"))
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else sample / "coco_train100"
    (annotation_file,) = (folder / "annotations").glob("panoptic_*.json")
    truth = annotation_file.with_suffix("")
    data = json.loads(annotation_file.read_text())
    label_of = {category["id"]: index for index, category in enumerate(data["categories"])}
    stuff = [index for index, category in enumerate(data["categories"]) if not category["isthing"]]

    with tempfile.TemporaryDirectory() as temporary:
        predicted = Path(temporary)
        predictions = make_predictions(data["annotations"], truth, predicted, np.random.default_rng(0))

        def decode():
            return load(predictions, predicted, label_of), load(data["annotations"], truth, label_of)

        def count(images):
            metric = PanopticQuality(num_labels=len(label_of), stuff_classes=stuff)
            metric.add_batch(predictions=images[0], references=images[1])
            return metric.compute()

        if importlib.util.find_spec("panopticapi"):
            from panopticapi.evaluation import pq_compute_single_core, rgb2id

            name, budget = "panopticapi", 0.1
            categories = {category["id"]: category for category in data["categories"]}
            pairs = list(zip(data["annotations"], predictions, strict=True))
            files = [path / a["file_name"] for a in predictions for path in (predicted, truth)]

            def their_decoding():
                for file in files:
                    rgb2id(np.array(Image.open(file), dtype=np.uint32))

            def their_whole():
                stat = pq_compute_single_core(0, pairs, str(truth), str(predicted), categories)
                return stat.pq_average(categories, isthing=None)[0]["pq"]

        else:
            sys.path.insert(0, str(ROOT))
            from tests.panoptic_quality_reference import reference_counts, reference_quality

            name, budget = "plain loops (panopticapi is not installed)", None
            their_decoding = decode

            def their_whole():
                total = sum(reference_counts(*pair, len(label_of)) for pair in zip(*decode(), strict=True))
                return reference_quality(total, range(len(label_of)))["pq"]

        times: dict[str, list[float]] = {key: [] for key in ("decode", "count", "their_decoding", "their_whole")}
        for _ in range(REPEATS):  # taking turns, so that a slower moment of the machine hits all
            duration, images = seconds(decode)
            times["decode"].append(duration)
            duration, result = seconds(lambda: count(images))  # noqa: B023 - called at once
            times["count"].append(duration)
            times["their_decoding"].append(seconds(their_decoding)[0])
            duration, reference = seconds(their_whole)
            times["their_whole"].append(duration)

    difference = abs(result["pq"] - reference)
    print(machine() + f", numpy {np.__version__}")
    print(f"{len(predictions)} images, {sum(len(p['segments_info']) for p in predictions)} segments, beside {name}")
    print(f"PQ {result['pq']:.6f}, difference {difference:.1e}")
    if difference > 1e-9:
        raise SystemExit("the results differ: the timings would compare different things")
    print(f"decoding the files: ours {spread(times['decode'])}, theirs {spread(times['their_decoding'])}")
    whole = [a + b for a, b in zip(times["decode"], times["count"], strict=True)]
    counting = [a - b for a, b in zip(times["their_whole"], times["their_decoding"], strict=True)]
    report("files to result", whole, times["their_whole"])
    report("counting alone", times["count"], counting, budget=budget)
    report("our counting beside their whole", times["count"], times["their_whole"], budget=budget)


if __name__ == "__main__":
    main()
