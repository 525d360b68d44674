"""Post-processing compared with Transformers' EoMT image processor on the same logits: time and agreement.

    python benchmarks/post_processing.py [--device cpu|cuda] [--threads 2] [--repeats 5] [--clock wall|cpu]

EoMT at 640 with COCO's 133 classes: Q = 200 queries, masks of 160 x 160 cells. The logits are made up to look like a
trained model's: blobs of +8 on -8 with soft, noisy borders, some of them touching and nested. "typical" has 30
confident queries, "crowded" 120 that all survive. One line a task, size and scene: medians and spread (largest minus
smallest) of both, their ratio beside its budget, and the share of pixels whose answers differ (ids, or classes of
semantic maps; of instances only pixels in at most one mask, as elsewhere the two paint in different orders). On a
machine that others use too, `--clock cpu` (processor time of all threads) is the steadier measure.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import transformers
from torch import Tensor
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.models.eomt.image_processing_eomt import EomtImageProcessor

from hf_segvit.models.image_post_processing import instance_segments, panoptic_segments, semantic_segments

SIDE, QUERIES, CLASSES, CELLS = 640, 200, 133, 160
STUFF = list(range(80, 133))
SCENES = {"typical": 30, "crowded": 120}
TARGETS = [(480, 640), (1080, 1920)]
BUDGETS = {
    ("panoptic", TARGETS[0]): 1 / 12,
    ("panoptic", TARGETS[1]): 1 / 15,
    ("instance", TARGETS[0]): 1 / 20,
    ("instance", TARGETS[1]): 1 / 12,
}


def scene(confident: int, content: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Class logits (1, Q, C+1) and mask logits (1, Q, h, w) with `confident` queries; blobs lie in the content."""
    generator = torch.Generator().manual_seed(0)
    rows = (torch.arange(CELLS) + 0.5) / CELLS * SIDE / content[0]
    columns = (torch.arange(CELLS) + 0.5) / CELLS * SIDE / content[1]
    centre = torch.rand(confident, 2, 1, 1, generator=generator)
    radius = 0.04 + 0.2 * torch.rand(confident, 2, 1, 1, generator=generator) * (30 / confident) ** 0.5
    distance = ((rows[:, None] - centre[:, 0]) / radius[:, 0]) ** 2 + ((columns - centre[:, 1]) / radius[:, 1]) ** 2
    masks = torch.randn(QUERIES, CELLS, CELLS, generator=generator) * 0.3 - 8
    masks[:confident] += 8 + 8 * torch.tanh(2 * (1 - distance))
    classes = torch.randn(QUERIES, CLASSES + 1, generator=generator)
    classes[confident:, -1] += 12
    classes[torch.arange(confident), torch.randint(0, CLASSES, (confident,), generator=generator)] += 12
    return classes[None], masks[None]


def seconds(function: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    start = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def differing_instances(classes: Tensor, masks: Tensor, target: tuple[int, int], geometry: dict, ids: Tensor) -> float:
    """Share of pixels in at most one mask whose instance is not the one in transformers' id map."""
    [answer] = instance_segments(
        classes, masks, [target], **geometry, threshold=0.5, num_instances=QUERIES, return_binary_maps=True
    )
    maps = answer["segmentation"]
    coverage = maps.sum(0)
    own = torch.where(coverage == 1, maps.to(torch.uint8).argmax(0), -1)
    return (own != ids.long())[coverage <= 1].float().mean().item()


def compare(task: str, scene_name: str, target: tuple[int, int], device: torch.device, repeats: int, clock: str) -> str:
    content = tuple(get_size_with_aspect_ratio(target, SIDE, SIDE))
    classes, masks = (logits.to(device) for logits in scene(SCENES[scene_name], content))
    processor = EomtImageProcessor(size={"shortest_edge": SIDE, "longest_edge": SIDE})
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks, patch_offsets=[])
    upstream = getattr(processor, f"post_process_{task}_segmentation")
    ours_of = {"panoptic": panoptic_segments, "instance": instance_segments, "semantic": semantic_segments}[task]
    options = {"panoptic": {"stuff_classes": STUFF}, "instance": {"threshold": 0.5}, "semantic": {}}[task]
    geometry: dict = {"input_size": (SIDE, SIDE)}
    if task != "semantic":  # transformers does not crop the padding of semantic maps, so neither do we here
        geometry["content_sizes"] = [content]

    def ours() -> list:
        return ours_of(classes, masks, [target], **geometry, **options)

    def theirs() -> list:
        return upstream(outputs, [target], **options)

    mine, other = ours()[0], theirs()[0]
    if task == "instance":
        differing = differing_instances(classes, masks, target, geometry, other["segmentation"])
    else:
        if task == "panoptic":
            mine, other = mine["segmentation"], other["segmentation"]
        differing = (mine.long() != other.long()).float().mean().item()
    # Alternating, so that a busy spell of the machine meets both.
    now = time.perf_counter if clock == "wall" else time.process_time
    pairs = [(seconds(ours, device, now), seconds(theirs, device, now)) for _ in range(repeats)]
    columns = [[1e3 * value for value in column] for column in zip(*pairs, strict=True)]
    medians = [statistics.median(column) for column in columns]
    spreads = [max(column) - min(column) for column in columns]
    budget = BUDGETS.get((task, target))
    return (
        f"{task:9} {target[0]:4}x{target[1]:<4} {scene_name:8} {medians[0]:8.1f} (+-{spreads[0]:6.1f}) "
        f"{medians[1]:9.1f} (+-{spreads[1]:7.1f})   1/{medians[1] / medians[0]:<6.1f} "
        f"{f'1/{1 / budget:.0f}' if budget else '-':6} {100 * differing:.3f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--tasks", nargs="+", default=["panoptic", "instance", "semantic"])
    parser.add_argument("--scenes", nargs="+", default=list(SCENES), choices=list(SCENES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{arguments.threads} threads"
    print(f"{time.strftime('%Y-%m-%d')}  {platform.processor() or platform.machine()}, {device} ({name}), ", end="")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, python {platform.python_version()}")
    print(f"{arguments.clock} time, median of {arguments.repeats}")
    print("task         target scene      ours ms (spread)  transformers ms (spread)   ratio    budget differing")
    with torch.inference_mode():
        for task in arguments.tasks:
            for target in TARGETS:
                for scene_name in arguments.scenes:
                    print(compare(task, scene_name, target, device, arguments.repeats, arguments.clock), flush=True)


if __name__ == "__main__":
    main()
