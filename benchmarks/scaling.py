"""Segmenting millions of images: what each stage costs, which one is the bottleneck, and how far more workers help.

    python benchmarks/scaling.py [--images 1e7] [--model-ms 7.8] [--cores 8] [--accelerators 1] [--price-per-hour P]

First, the stages between a JPEG and a row of Parquet are measured here, each alone on one thread, in processor time, so
that other work on the machine counts little: COCO-sized images and the "typical" logits of post_processing.py. The
model's own time is a parameter. From these follow a node's time an image, its bottleneck, and machine-hours and cost of
a job; there is no default price. Then a simulation of queues draws images a second from 1 to 256 workers.

What the simulation assumes is in `Assumptions`: every worker is a node; blocks of images are handed out by one driver,
read and written through one shared store, first come first served; a node decodes and finishes on its cores while its
accelerator works on another block; nodes differ in speed, a few are slow; a model has to be loaded first.
"""

import argparse
import heapq
import io
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow
import torch
from bulk import StandIn, configuration, write_images
from measuring import machine
from post_processing import CLASSES, SIDE, scene
from pyarrow import parquet

from hf_segvit import EoMTImageProcessor, Segmenter
from hf_segvit.data.mask_files import id_png
from hf_segvit.inference.exports import row_of
from hf_segvit.inference.row_segmenter import row_schema
from hf_segvit.models.image_decoding import open_image

RESULTS = Path(__file__).parent / "results"
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Stages:
    """Milliseconds of one core for an image, and its bytes."""

    read: float
    decode: float
    prepare: float
    post_process: float
    encode: float
    write: float
    bytes_in: float
    bytes_out: float

    @property
    def cpu(self) -> float:
        return self.read + self.decode + self.prepare + self.post_process + self.encode + self.write


@dataclass(frozen=True)
class Assumptions:
    """Of the simulation; seconds, and bytes a second."""

    model_ms: float = 7.8
    cores: int = 8
    accelerators: int = 1
    block: int = 32  # images that travel together
    in_flight: int = 4  # blocks of a node that are being read, decoded or segmented
    bandwidth: float = 1.25e9  # of the store for reading, and as much for writing, shared by all
    latency: float = 0.05  # of the first byte of a block
    driver: float = 0.002  # of the one driver, for each block
    speeds: float = 0.05  # standard deviation of the logarithm of a node's speed
    slow_nodes: float = 0.02  # share of nodes that take twice as long
    start: float = 60.0  # until the nodes have loaded their models
    draws: int = 8  # of the nodes' speeds, whose mean is taken


def measure(repeats: int) -> Stages:
    torch.set_num_threads(1)
    processor = EoMTImageProcessor(task="panoptic", size=SIDE, threshold=0.5, stuff_classes=list(range(80, CLASSES)))
    segmenter = Segmenter(StandIn(configuration(64), scene(30, (480, 640))), processor, device="cpu")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        write_images(Path(folder), 16, (480, 640))
        paths = sorted(Path(folder).iterdir())
        contents = [path.read_bytes() for path in paths]
        image = open_image(contents[0], "image")
        (asked,) = segmenter.prepare([image])
        asked = segmenter.infer(asked, 0.5)
        (answer,) = segmenter.results(asked, 0.5)

        def encoded() -> dict[str, object]:
            row = row_of("image", "image.jpg", answer, whole=True)
            return {
                **row,
                "path": row.pop("picture"),
                "panoptic_png": id_png(answer.segment_map.clip(0)),
                "source": "s",
            }

        def written(count: int) -> bytes:
            content = io.BytesIO()
            table = pyarrow.Table.from_pylist([encoded_row] * count, schema=row_schema())
            parquet.write_table(table, content, use_dictionary=False, compression="none")  # as rows differ in a job
            return content.getvalue()

        encoded_row = encoded()
        turns = iter(range(10**9))
        stages = {
            "read": lambda: paths[next(turns) % 16].read_bytes(),
            "decode": lambda: open_image(contents[next(turns) % 16], "image"),
            "prepare": lambda: list(segmenter.prepare([image])),
            "post_process": lambda: segmenter.results(asked, 0.5),
            "encode": encoded,
        }
        found = {name: _milliseconds(function, repeats) for name, function in stages.items()}
        found["write"] = _milliseconds(lambda: written(64), max(3, repeats // 8)) / 64
        bytes_out = len(row_bytes) / 64 if (row_bytes := written(64)) else 0.0
    return Stages(**found, bytes_in=float(np.mean([len(content) for content in contents])), bytes_out=bytes_out)


def _milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median processor time of a call."""
    function()
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return 1e3 * float(np.median(times))


def node(stages: Stages, assumed: Assumptions) -> dict[str, float]:
    """Milliseconds an image that each part of a node would take alone; the largest is its bottleneck."""
    return {"cores": stages.cpu / assumed.cores, "accelerators": assumed.model_ms / assumed.accelerators}


def simulate(workers: int, stages: Stages, assumed: Assumptions, blocks: int, seed: int = 0) -> tuple[float, float]:
    """(images a second once all have started, share of the accelerators' time that they work)."""
    random = np.random.default_rng(seed)
    factors = np.exp(random.normal(0, assumed.speeds, workers)) * np.where(
        random.random(workers) < assumed.slow_nodes, 2.0, 1.0
    )
    seconds = {name: value * assumed.block / 1e3 for name, value in node(stages, assumed).items()}
    reading, writing = (assumed.block * number / assumed.bandwidth for number in (stages.bytes_in, stages.bytes_out))
    free = {"driver": 0.0, "reading": 0.0, "writing": 0.0}
    cores, accelerators = np.zeros(workers), np.zeros(workers)
    busy, finished, left = 0.0, [], blocks * workers

    def served(server: str, now: float, duration: float) -> float:
        free[server] = max(now, free[server]) + duration
        return free[server]

    # Events in the order of time, so that every shared server sees its requests in the order of their arrival.
    events = [(0.0, number, "ask", number % workers) for number in range(workers * assumed.in_flight)]
    heapq.heapify(events)
    number = len(events)
    while events:
        now, _, kind, worker = heapq.heappop(events)
        if kind == "ask":
            if not left:
                continue
            left -= 1
            following = (served("driver", now, assumed.driver), "read")
        elif kind == "read":
            following = (served("reading", now, reading) + assumed.latency, "decode")
        elif kind == "decode":
            cores[worker] = max(now, cores[worker]) + seconds["cores"] * factors[worker]
            following = (cores[worker], "infer")
        elif kind == "infer":
            duration = seconds["accelerators"] * factors[worker]
            accelerators[worker] = max(now, accelerators[worker]) + duration
            busy += duration
            following = (accelerators[worker], "write")
        elif kind == "write":
            number += 1
            heapq.heappush(events, (now, number, "ask", worker))
            following = (served("writing", now, writing), "done")
        else:
            finished.append(now)
            continue
        number += 1
        heapq.heappush(events, (following[0], number, following[1], worker))
    # Between the first tenth and the last, where all nodes work.
    times = np.sort(finished)
    low, high = len(times) // 10, len(times) * 9 // 10
    rate = (high - low) * assumed.block / (times[high] - times[low])
    return float(rate), busy / (workers * times[-1])


def draw(curves: dict[str, list[float]], ideal: list[float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(WORKERS, ideal, color="0.6", linestyle="--", label="as many times one node")
    for name, rates in curves.items():
        axes.plot(WORKERS, rates, marker="o", markersize=4, label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="nodes", ylabel="images a second", title="Simulated, see docs/scaling.md"
    )
    axes.set_xticks(WORKERS, [str(count) for count in WORKERS])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=float, default=1e7)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--stages", type=Path, metavar="JSON", help="stages measured elsewhere, instead of here")
    parser.add_argument("--model-ms", type=float, default=7.8, help="of an image; 7.8: EoMT-L at 640 on an H100, 128/s")
    parser.add_argument("--cores", type=int, default=8, help="of a node")
    parser.add_argument("--accelerators", type=int, default=1, help="of a node")
    parser.add_argument("--price-per-hour", type=float, metavar="P", help="of a node, in any currency")
    parser.add_argument("--blocks", type=int, default=100, help="blocks for each node in the simulation")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.stages is None:
        print(machine())
        stages = measure(args.repeats)
        (args.output / "scaling.json").write_text(json.dumps(asdict(stages), indent=2) + "\n")
    else:
        stages = Stages(**json.loads(args.stages.read_text()))
    for name, value in asdict(stages).items():
        print(f"{name:13s} {value:10.2f} {'bytes' if name.startswith('bytes') else 'ms of one core'}")
    print(f"{'all cores':13s} {stages.cpu:10.2f} ms")

    assumed = Assumptions(args.model_ms, args.cores, args.accelerators)
    parts = node(stages, assumed)
    slowest = max(parts, key=lambda name: parts[name])
    hours = args.images * parts[slowest] / 3.6e6
    print(
        f"a node of {args.cores} cores and {args.accelerators} accelerator(s): {parts['cores']:.2f} and "
        f"{parts['accelerators']:.2f} ms an image, bottleneck: {slowest}; cores to keep up with the accelerators: "
        f"{stages.cpu / args.model_ms * args.accelerators:.1f}"
    )
    print(f"{args.images:,.0f} images: {hours:.1f} node-hours", end="")
    print("" if args.price_per_hour is None else f", cost {hours * args.price_per_hour:,.2f}")
    print(f"written: {args.images * stages.bytes_out / 1e9:.1f} GB, read: {args.images * stages.bytes_in / 1e9:.1f} GB")

    curves: dict[str, list[float]] = {}
    for gigabits in (1, 10, 100):
        bounded = replace(assumed, bandwidth=gigabits * 1e9 / 8)
        name, curves_of = f"store of {gigabits} Gbit/s", []
        for workers in WORKERS:
            drawn = [simulate(workers, stages, bounded, args.blocks, seed) for seed in range(bounded.draws)]
            rate, use = np.mean(drawn, axis=0).tolist()
            curves_of.append(rate)
            hours = (bounded.start + args.images / rate) / 3600
            print(
                f"{name}, {workers:3d} nodes: {rate:6.0f} images a second, accelerators busy {100 * use:3.0f} %, "
                f"{args.images:,.0f} images in {hours:6.2f} h"
            )
        curves[name] = curves_of
    one = 1e3 / max(parts.values())
    draw(curves, [count * one for count in WORKERS], args.output / "scaling.png")


if __name__ == "__main__":
    main()
