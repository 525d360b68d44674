"""Time and memory to open a data set as large as COCO panoptic: 118,287 images with 1.3 million segments.

    python benchmarks/large_data.py [--images 118287] [--folder KEPT_FOLDER]

The folder has one JPEG and one PNG, each under as many names (hard links), and a JSON file of the full size with random
segments. Each row is a process of its own: `json.load` of the annotations, opening without a cache, the first start,
which writes the cache, the second, and two at once, as the ranks of a run. Memory is the growth of the
process' own (unshared) memory and of its resident set at its highest, since the package was imported.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from measuring import machine
from PIL import Image

from hf_segvit.data.label_tables import label_table

SEGMENTS = 11  # per image, on average
SCRIPT = """
import gc, json, resource, sys, time
import hf_segvit.data.reading as reading, torch
what, folder = sys.argv[1:]
def memory():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return [int(status[name].split()[0]) / 1024 for name in ("VmHWM", "RssAnon")]
before, start, used = memory(), time.perf_counter(), time.process_time()
if what == "json":
    kept = json.load(open(f"{folder}/annotations/panoptic_train2017.json"))
else:
    kept = reading.load_segmentation_dataset(f"coco:{folder}", split="train", cache=what != "off")
seconds, cpu = time.perf_counter() - start, time.process_time() - used
after = memory()
print(json.dumps([seconds, cpu, after[0] - before[0], after[1] - before[1], len(kept)]))
"""


def write_folder(folder: Path, num_images: int) -> None:
    """COCO's layout with hard links for all images and maps."""
    for name in ("train2017", "annotations/panoptic_train2017"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(folder / "image.jpg")
    Image.new("RGB", (64, 48)).save(folder / "map.png")
    table = label_table("coco_panoptic")
    categories = [
        {"id": label.source_id, "name": label.name, "isthing": int(label.is_thing), "supercategory": "any"}
        for label in table.classes
    ]
    ids = [category["id"] for category in categories]
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(num_images):
        name = f"{number:012d}"
        for source, target in (
            ("image.jpg", f"train2017/{name}.jpg"),
            ("map.png", f"annotations/panoptic_train2017/{name}.png"),
        ):
            link(folder / source, folder / target)
        url = f"http://images.cocodataset.org/train2017/{name}.jpg"
        images.append(
            {
                "license": 3,
                "file_name": f"{name}.jpg",
                "coco_url": url,
                "height": 48,
                "width": 64,
                "date_captured": "2013-11-14 11:18:45",
                "flickr_url": url,
                "id": number,
            }
        )
        count = int(rng.integers(1, 2 * SEGMENTS))
        values = rng.integers(1, 2**24 - 1, (count, 4)).tolist()
        segments = [
            {
                "id": one,
                "category_id": ids[two % len(ids)],
                "iscrowd": 0,
                "bbox": [three % 640, one % 480, two % 99, three % 99],
                "area": four,
            }
            for one, two, three, four in values
        ]
        annotations.append({"segments_info": segments, "file_name": f"{name}.png", "image_id": number})
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "panoptic_train2017.json").write_text(json.dumps(content), encoding="utf-8")


def link(source: Path, target: Path) -> None:
    """A hard link, or a new copy to link where a file has as many as it may."""
    try:
        os.link(source, target)
    except OSError:
        content = source.read_bytes()
        source.unlink()
        source.write_bytes(content)
        os.link(source, target)


def measure(what: Sequence[str], folder: Path, cache: Path) -> list[list[float]]:
    """Seconds, processor seconds and MB of a process for each word."""
    environment = {**os.environ, "HF_SEGVIT_CACHE": str(cache)}
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, word, str(folder)], stdout=subprocess.PIPE, env=environment)
        for word in what
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a process of {what} failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--folder", type=Path, help="where the data set is written, or is from an earlier run")
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary, "coco")
        if not (folder / "annotations" / "panoptic_train2017.json").exists():
            start = time.perf_counter()
            write_folder(folder, args.images)
            print(f"written in {time.perf_counter() - start:.0f} s")
        cache = Path(temporary, "cache")
        print(f"annotations of {(folder / 'annotations/panoptic_train2017.json').stat().st_size / 1e6:.0f} MB")
        for name, what in (
            ("json.load", ["json"]),
            ("without a cache", ["off"]),
            ("first start", ["on"]),
            ("second start", ["on"]),
            ("two processes at once", ["on", "on"]),
        ):
            for seconds, cpu, peak, own, _ in measure(what, folder, cache):
                print(
                    f"  {name:22s} {seconds:5.2f} s by the clock, {cpu:5.2f} s of the processor, "
                    f"{peak:5.0f} MB at most, {own:5.0f} MB of its own at the end",
                    flush=True,
                )
        size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
        print(f"  the cache has {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
