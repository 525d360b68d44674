"""EoMT here and in Transformers: same weights, same machine, one run, a ratio for each step that takes time.

    python benchmarks/compare_transformers.py [--clock=cpu] [forward] [post] [pipeline] [train] [compile]
        [compiled-train] [large]

`--clock=cpu` counts processor time; use it with OMP_NUM_THREADS=1 on a machine that others use too. Without names of
parts, the first four are run. The outputs are compared before anything is timed. Model: ViT-S (`large`: ViT-L) at 640
pixels, 200 queries, 133 classes, random weights; where segments are merged, the logits are replaced by ones that look
like a trained model's, with 30 confident queries.
"""

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

import post_processing
import torch
from measuring import PeakResidentMemory, machine, peak_memory, report, time_pair, verdict
from PIL import Image
from transformers import EomtConfig, EomtForUniversalSegmentation, EomtImageProcessor

from hf_segvit import EoMTForUniversalSegmentation, EoMTImageProcessor
from hf_segvit.inference.devices import pick_dtype
from hf_segvit.training.start import compile_blocks

SIZES = {
    "S": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "num_blocks": 3},
    "L": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_blocks": 4},
}
CLOCK = "wall"
SWITCHES_OFF = {"fuse_qkv": False, "channels_last": False, "prune_masks": False, "compile": False}


def make_pair(size: str = "S", image_size: int = 640, probability: float = 0.0, dtype: torch.dtype = torch.float32):
    """Our model and Transformers' with the same random weights."""
    torch.manual_seed(0)
    theirs = EomtForUniversalSegmentation(EomtConfig(**SIZES[size], image_size=image_size, num_labels=133))
    theirs.attn_mask_probs.fill_(probability)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = EoMTForUniversalSegmentation.from_pretrained(folder)
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def make_targets(num_segments: int = 12, batch_size: int = 2, size: int = 640, device: str = "cpu"):
    generator = torch.Generator().manual_seed(0)
    owners = torch.randint(0, num_segments, (batch_size, 20, 20), generator=generator)
    owners = owners.repeat_interleave(size // 20, 1).repeat_interleave(size // 20, 2)
    masks = [torch.stack([owner == i for i in range(num_segments)]) for owner in owners]
    classes = [torch.randint(0, 133, (num_segments,), generator=generator) for _ in range(batch_size)]
    return [m.to(device) for m in masks], [c.to(device) for c in classes]


def check_agreement(ours, theirs, pixels: torch.Tensor) -> None:
    with torch.inference_mode():
        answer, reference = ours(pixels), theirs(pixels)
    for name in ("class_queries_logits", "masks_queries_logits"):
        error = (answer[name] - reference[name]).abs().max() / reference[name].abs().max()
        print(f"agreement of {name}: {error:.1e} of the largest value")
        if error > 1e-4:
            raise SystemExit(f"{name} differ: the timings would compare different things")


def clocked(name: str, ours: Callable, theirs: Callable, budget: float | None = None, repeats: int = 5) -> None:
    report(name, *time_pair(ours, theirs, repeats, CLOCK), budget=budget)


@torch.inference_mode()
def compare_forward() -> None:
    """Each precision beside the same, and each switch of `optimize_for_inference` beside the model without."""
    pixels = torch.randn(1, 3, 640, 640)
    for dtype, budget in ((torch.float32, 0.97), (torch.bfloat16, 0.80)):
        ours, theirs = make_pair()
        check_agreement(ours, theirs, pixels)
        name, x = str(dtype).removeprefix("torch."), pixels.to(dtype)
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        clocked(f"forward, annealed, {name}", partial(ours, x), partial(theirs, x), budget)
        # The class head is random, so the threshold is one that about a sixth of the queries pass, as in a photo.
        best = ours(x).class_queries_logits.float().softmax(-1)[..., :-1].amax(-1).flatten()
        threshold = best.sort().values[-30].item()
        for switches in ({"fuse_qkv": True}, {"channels_last": True}, {"prune_masks": True}, {}):
            fast = copy.deepcopy(ours).optimize_for_inference(**({**SWITCHES_OFF, **switches} if switches else {}))
            given = {"task": "instance", "pruning_threshold": threshold} if fast.prunes_masks else {}
            what = ", ".join(switches) or "all defaults"
            optimised = partial(fast, x, **given)
            clocked(f"  with {what}: ours beside ours", optimised, partial(ours, x))
        clocked(f"forward, optimised, {name}", optimised, partial(theirs, x))


@torch.inference_mode()
def compare_compiled() -> None:
    pixels = torch.randn(1, 3, 640, 640)
    for dtype, budget in ((torch.float32, None), (torch.bfloat16, 0.72)):
        ours, theirs = make_pair()
        check_agreement(ours, theirs, pixels)
        name, x = str(dtype).removeprefix("torch."), pixels.to(dtype)
        ours, theirs = ours.to(dtype), torch.compile(theirs.to(dtype))
        ours.optimize_for_inference(**{**SWITCHES_OFF, "compile": True})
        clocked(f"forward, {name}, both compiled", partial(ours, x), partial(theirs, x), budget)


def compare_post_processing() -> None:
    """The budgets of the "typical" scene; `benchmarks/post_processing.py` has crowded ones and semantic maps too."""
    for target in post_processing.TARGETS:
        for task in ("panoptic", "instance"):
            print(post_processing.compare(task, "typical", target, torch.device("cpu"), 5, CLOCK), flush=True)


@torch.inference_mode()
def compare_image_to_segments() -> None:
    """From a decoded image to panoptic segments; the logits are replaced so that both have segments to merge."""
    image = Image.effect_noise((640, 480), 80).convert("RGB")
    our_processor = EoMTImageProcessor(task="panoptic", size={"height": 640, "width": 640}, stuff_classes=[])
    their_processor = EomtImageProcessor(size={"shortest_edge": 640, "longest_edge": 640}, do_pad=True)
    classes, masks = post_processing.scene(30, (480, 640))

    def run(model, processor, dtype):
        outputs = model(processor(images=image, return_tensors="pt")["pixel_values"].to(dtype))
        outputs["class_queries_logits"], outputs["masks_queries_logits"] = classes.to(dtype), masks.to(dtype)
        return processor.post_process_panoptic_segmentation(outputs, target_sizes=[(480, 640)])

    fp32, bf16 = torch.float32, torch.bfloat16
    pairs = {dtype: make_pair(dtype=dtype) for dtype in (fp32, bf16)}
    for name, ours_dtype, theirs_dtype, budget in (
        ("float32", fp32, fp32, 0.60),
        ("bfloat16", bf16, bf16, None),
        ("our dtype auto, their default", pick_dtype("auto", torch.device("cpu")), fp32, 0.35),
    ):
        clocked(
            f"image in, panoptic segments out, {name}",
            lambda t=ours_dtype: run(pairs[t][0], our_processor, t),
            lambda t=theirs_dtype: run(pairs[t][1], their_processor, t),
            budget,
        )


def training_step(model, masks, classes, pixels, optimizer) -> torch.Tensor:
    loss = model(pixels, mask_labels=masks, class_labels=classes).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def prepare_step(which: str):
    ours, theirs = make_pair(probability=1.0)
    model = (theirs if which == "theirs" else ours).train()
    if which == "compiled":
        compile_blocks(model)
    masks, classes = make_targets()
    if which == "theirs":
        masks = [m.float() for m in masks]  # upstream takes no bool masks
    pixels = torch.randn(2, 3, 640, 640, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    return lambda: training_step(model, masks, classes, pixels, optimizer)


def compare_training() -> None:
    ours, theirs = prepare_step("ours"), prepare_step("theirs")
    print(f"first losses (random points differ): ours {ours():.3f}, theirs {theirs():.3f}")
    report("training step, 2 x 640, 12 segments each", *time_pair(ours, theirs, 3, CLOCK), budget=0.65)
    memory = {which: peak_memory(__file__, f"--peak-memory={which}") for which in ("ours", "theirs")}
    ratio = memory["ours"] / memory["theirs"]
    print(
        f"{'training step, peak memory above the start':44s} ours {memory['ours']:8.0f} MiB  theirs "
        f"{memory['theirs']:8.0f} MiB  ratio {ratio:.3f}{verdict(ratio, 0.55)}"
    )


def compare_compiled_training() -> None:
    """A step with `compile: true` beside one without; compilation happens in the first step, which is not counted."""
    compiled, eager = prepare_step("compiled"), prepare_step("ours")
    start = time.perf_counter()
    losses = compiled(), eager()
    print(f"first losses (random points differ): {losses[0]:.3f}, {losses[1]:.3f}; {time.perf_counter() - start:.0f} s")
    report("training step, 2 x 640, compiled beside eager", *time_pair(compiled, eager, 3, CLOCK))


@torch.inference_mode()
def compare_large() -> None:
    """The forward pass of a ViT-L."""
    ours, theirs = make_pair("L")
    pixels = torch.randn(1, 3, 640, 640)
    check_agreement(ours, theirs, pixels)
    for dtype, budget in ((torch.float32, 0.97), (torch.bfloat16, 0.80)):
        ours, theirs, x = ours.to(dtype), theirs.to(dtype), pixels.to(dtype)
        name = str(dtype).removeprefix("torch.")
        clocked(f"forward, ViT-L, annealed, {name}", partial(ours, x), partial(theirs, x), budget, repeats=3)


PARTS = {
    "forward": compare_forward,
    "post": compare_post_processing,
    "pipeline": compare_image_to_segments,
    "train": compare_training,
    "compile": compare_compiled,
    "compiled-train": compare_compiled_training,
    "large": compare_large,
}

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments and arguments[0].startswith("--peak-memory="):
        step = prepare_step(arguments[0].split("=")[1])
        with PeakResidentMemory() as memory:
            step()
        print(memory.mebibytes)
        raise SystemExit
    CLOCK = "cpu" if "--clock=cpu" in arguments else "wall"
    arguments = [argument for argument in arguments if argument != f"--clock={CLOCK}"]
    unknown = set(arguments) - set(PARTS)
    if unknown:
        raise SystemExit(f"unknown parts {sorted(unknown)}; there are {list(PARTS)}")
    print(machine())
    print(f"command: python benchmarks/compare_transformers.py {' '.join(sys.argv[1:])}  ({CLOCK} time)")
    for part in arguments or ("forward", "post", "pipeline", "train"):
        PARTS[part]()
