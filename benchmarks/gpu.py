"""EoMT on a GPU, in one command of at most seven minutes: forward, training, images, kernels, tests.

    python benchmarks/gpu.py --output gpu_results [--seconds 400] [--dry-run]

Needs this repository, torch >= 2.11 and transformers >= 5.17, nothing installed and no network. The steps are in order
of value. After each of them gpu.json and gpu.md are written, an error of a step is recorded there and the next one
runs, and a second call with the same folder continues where the first was cut off. A step is not begun if less time is
left than the longest of its kind took. Weights are random; ours and Transformers' are the same, and outputs are
compared before anything is timed. `--dry-run` runs every step with tiny models on the CPU, whose figures say nothing.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import EomtConfig, EomtForUniversalSegmentation, EomtImageProcessor  # noqa: E402

from hf_segvit.inference.measuring import (  # noqa: E402
    PeakMemory,
    describe_machine,
    machine_facts,
    peak_bf16,
    relative_difference,
    time_interleaved,
)
from hf_segvit.models.configuration_eomt import EoMTConfig  # noqa: E402
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor  # noqa: E402
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation  # noqa: E402
from hf_segvit.models.transformers_eomt import translate_config, translate_state_dict  # noqa: E402

SIZES: dict[str, dict[str, Any]] = {
    "S": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "num_blocks": 3},
    "B": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_blocks": 3},
    "L": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_blocks": 4},
    "g": {
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "num_blocks": 5,
        "use_swiglu_ffn": True,
    },
}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_blocks": 1, "num_queries": 8}
PAPER_FPS = {("S", 640): 330, ("B", 640): 261, ("L", 640): 128, ("g", 640): 55, ("L", 1280): 30}  # Table 3 and 4, H100
SWITCHES_OFF = {"fuse_qkv": False, "channels_last": False, "prune_masks": False, "compile": False}


@dataclass(frozen=True)
class Machine:
    """Where to run, and how much of it."""

    device: torch.device
    dry_run: bool

    @property
    def repeats(self) -> int:
        return 2 if self.dry_run else 30

    def config(self, size: str, image_size: int) -> EomtConfig:
        if self.dry_run:
            swiglu = {"use_swiglu_ffn": size == "g"}
            return EomtConfig(**TINY, **swiglu, image_size=image_size // 10, num_labels=5, train_num_points=16)
        return EomtConfig(**SIZES[size], image_size=image_size, num_labels=133)

    @property
    def clock(self) -> str:
        return "wall"


def make_pair(machine: Machine, size: str, image_size: int, dtype: torch.dtype, probability: float = 0.0) -> Any:
    """Our model and Transformers' with the same random weights, on the device."""
    config = machine.config(size, image_size)
    torch.manual_seed(0)
    with machine.device:
        theirs = EomtForUniversalSegmentation(config)
        theirs.attn_mask_probs.fill_(probability)
        ours_config = EoMTConfig.from_dict(translate_config(config.to_dict()))
        ours_config.masked_attention_probabilities = [probability] * config.num_blocks
        ours = EoMTForUniversalSegmentation(ours_config)
    ours.load_state_dict(translate_state_dict(dict(theirs.state_dict()))[0])
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def multiply_adds(config: EoMTConfig, image_size: int) -> int:
    """Of one pass over one image, attention included."""
    config = EoMTConfig(**{**config.to_dict(), "attn_implementation": "eager"})
    with torch.device("meta"):
        model = EoMTForUniversalSegmentation(config).eval()
        pixels = torch.empty(1, 3, image_size, image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixels)
    return counter.get_total_flops() // 2


def difference(ours: Callable, theirs: Callable, pixels: torch.Tensor) -> float:
    answer, reference = ours(pixels), theirs(pixels)
    names = ("class_queries_logits", "masks_queries_logits")
    found = [relative_difference(answer[name], reference[name]) for name in names]
    if not all(each < 0.1 for each in found):  # bf16, through up to 40 blocks
        raise RuntimeError(f"outputs differ by {found} of the largest value: times would say nothing")
    return max(found)


def fresh() -> None:
    """Forget compiled code and free memory of the step before."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.inference_mode()
def forward(machine: Machine, size: str, image_size: int, batch_size: int, peer: bool) -> dict[str, Any]:
    """Frames a second in bf16, compiled, beside the paper's and, with `peer`, beside Transformers' compiled."""
    ours, theirs = make_pair(machine, size, image_size, torch.bfloat16)
    side = ours.config.image_height_width[0]
    pixels = torch.randn(batch_size, 3, side, side, device=machine.device, dtype=torch.bfloat16)
    differs = difference(ours, theirs, pixels)
    config = ours.config
    ours.optimize_for_inference(compile=None, prune_masks=False)
    calls = [partial(ours, pixels)]
    if peer:
        if not machine.dry_run:
            # Their comparison of `attn_mask_probs` waits for the device, so their graph breaks and is not captured.
            theirs.compile()
        calls.append(partial(theirs, pixels))
    else:
        del theirs
    seconds = time_interleaved(calls, machine.repeats, machine.clock, warm_up=3)
    fps = [batch_size / statistics.median(each) for each in seconds]
    macs = multiply_adds(config, side)
    peak = peak_bf16(torch.cuda.get_device_name()) if machine.device.type == "cuda" else None
    return {
        "fps": fps[0],
        "paper": PAPER_FPS[size, image_size],
        "theirs": fps[1] if peer else None,
        "range_ms": [1e3 * min(seconds[0]), 1e3 * max(seconds[0])],
        "share_of_peak": None if peak is None else 2 * macs * fps[0] / peak,
        "giga_multiply_adds": macs / 1e9,
        "difference": differs,
    }


def training(machine: Machine, batch_size: int = 4) -> dict[str, Any]:
    """One step of L 640 under bf16 autocast, beside Transformers: time and memory above the start of the step."""
    found: dict[str, Any] = {}
    for which in ("ours", "theirs"):
        fresh()
        ours, theirs = make_pair(machine, "L", 640, torch.float32, probability=1.0)
        model = (ours if which == "ours" else theirs).train()
        del ours, theirs
        side = machine.config("L", 640).image_size
        masks, classes = targets(batch_size, side, machine.device, 5 if machine.dry_run else 133)
        if which == "theirs":
            masks = [each.float() for each in masks]  # upstream takes no bool masks
        pixels = torch.randn(batch_size, 3, side, side, device=machine.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
        step = partial(training_step, model, optimizer, pixels, masks, classes, machine.device.type)
        step()  # the optimiser's state is there from now on
        with PeakMemory(machine.device) as memory:
            step()
        (seconds,) = time_interleaved([step], max(2, machine.repeats // 3), machine.clock)
        found[which] = {"ms": 1e3 * statistics.median(seconds), "mebibytes": memory.mebibytes}
    found["time_ratio"] = found["ours"]["ms"] / found["theirs"]["ms"]
    if found["ours"]["mebibytes"] and found["theirs"]["mebibytes"]:
        found["memory_ratio"] = found["ours"]["mebibytes"] / found["theirs"]["mebibytes"]
    return found


def training_step(model, optimizer, pixels, masks, classes, device_type: str) -> None:
    with torch.autocast(device_type, torch.bfloat16):
        loss = model(pixels, mask_labels=masks, class_labels=classes).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def targets(batch_size: int, side: int, device: torch.device, num_labels: int, num_segments: int = 12):
    generator = torch.Generator().manual_seed(0)
    owners = torch.randint(0, num_segments, (batch_size, 16, 16), generator=generator)
    owners = owners.repeat_interleave(side // 16, 1).repeat_interleave(side // 16, 2)
    masks = [torch.stack([owner == i for i in range(num_segments)]).to(device) for owner in owners]
    classes = [torch.randint(0, num_labels, (num_segments,), generator=generator).to(device) for _ in range(batch_size)]
    return masks, classes


@torch.inference_mode()
def images(machine: Machine) -> dict[str, Any]:
    """From a decoded image to panoptic segments, L 640; the logits are replaced so that there are segments to merge."""
    from PIL import Image
    from post_processing import scene

    ours, theirs = make_pair(machine, "L", 640, torch.bfloat16)
    ours.optimize_for_inference(prune_masks=False)
    side = ours.config.image_height_width[0]
    image = Image.effect_noise((side, side * 3 // 4), 80).convert("RGB")
    our_processor = EoMTImageProcessor(task="panoptic", size={"height": side, "width": side}, stuff_classes=[])
    their_processor = EomtImageProcessor(size={"shortest_edge": side, "longest_edge": side}, do_pad=True)
    logits = [each.to(machine.device, torch.bfloat16) for each in scene(30, (480, 640))]

    def run(model, processor):
        pixels = processor(images=image, return_tensors="pt")["pixel_values"].to(machine.device, torch.bfloat16)
        outputs = model(pixels)
        outputs["class_queries_logits"], outputs["masks_queries_logits"] = logits
        return processor.post_process_panoptic_segmentation(outputs, target_sizes=[(image.height, image.width)])

    mine, peer = run(ours, our_processor)[0], run(theirs, their_processor)[0]
    seconds = time_interleaved(
        [partial(run, ours, our_processor), partial(run, theirs, their_processor)], machine.repeats, machine.clock, 3
    )
    medians = [1e3 * statistics.median(each) for each in seconds]
    counts = [len(answer["segments_info"]) for answer in (mine, peer)]
    return {"ours_ms": medians[0], "theirs_ms": medians[1], "ratio": medians[0] / medians[1], "segments": counts}


@torch.inference_mode()
def switch(machine: Machine, switches: dict[str, Any], quantization: str | None = None) -> dict[str, Any]:
    """L 640, bf16, batch 1, with these switches, beside the same model without any."""
    import copy

    plain, theirs = make_pair(machine, "L", 640, torch.bfloat16)
    del theirs
    side = plain.config.image_height_width[0]
    pixels = torch.randn(1, 3, side, side, device=machine.device, dtype=torch.bfloat16)
    fast = copy.deepcopy(plain)
    if quantization is not None:
        from hf_segvit.inference.quantization import quantize_model

        method = "int8" if machine.dry_run and quantization == "fp8" else quantization
        quantize_model(fast, method)
    mode = switches.get("mode")
    given = {name: value for name, value in switches.items() if name != "mode"}
    if machine.dry_run:
        given = {name: value for name, value in given.items() if name not in ("compile", "cuda_graphs")}
        mode = None
    fast.optimize_for_inference(**{**SWITCHES_OFF, **given})
    if mode is not None:
        fast.eomt.compile(fullgraph=True, mode=mode)
    answer, expected = fast(pixels), plain(pixels)
    differs = relative_difference(answer.masks_queries_logits, expected.masks_queries_logits)
    seconds = time_interleaved([partial(fast, pixels), partial(plain, pixels)], machine.repeats, machine.clock, 3)
    medians = [1e3 * statistics.median(each) for each in seconds]
    return {"ms": medians[0], "without_ms": medians[1], "ratio": medians[0] / medians[1], "difference": differs}


def tests(machine: Machine, left: Callable[[], float]) -> dict[str, Any]:
    """The tests marked `gpu`; in a dry run only whether they can be collected."""
    files = sorted(str(path) for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--no-header", *files]
    words += ["--continue-on-collection-errors"] + (["--collect-only"] if machine.dry_run else [])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(1.0, left()), check=False
    )
    lines = (run.stdout + run.stderr).strip().splitlines()
    if run.returncode not in (0, 1):
        raise RuntimeError("\n".join(lines[-3:]))
    return {"returncode": run.returncode, "summary": lines[-1], "failed": [x for x in lines if x.startswith("FAILED")]}


def steps(machine: Machine, left: Callable[[], float]) -> dict[str, Callable[[], dict[str, Any]]]:
    """All steps by name, in order of value."""

    def at(size: str, image_size: int, batch_size: int, peer: bool) -> Callable[[], dict[str, Any]]:
        return partial(forward, machine, size, image_size, batch_size, peer)

    return {
        "forward L 640, batch 1": at("L", 640, 1, True),
        "training step L 640, batch 4": partial(training, machine),
        "forward S 640, batch 1": at("S", 640, 1, True),
        "forward L 1280, batch 1": at("L", 1280, 1, True),
        "forward B 640, batch 1": at("B", 640, 1, True),
        "forward g 640, batch 1": at("g", 640, 1, False),
        "image in, segments out": partial(images, machine),
        "switch: compile without CUDA graphs": partial(switch, machine, {"compile": True, "cuda_graphs": False}),
        "switch: fused q/k/v": partial(switch, machine, {"fuse_qkv": True}),
        "switch: fp8, compiled": partial(switch, machine, {"compile": True}, "fp8"),
        "forward L 640, batch 8": at("L", 640, 8, True),
        "tests marked gpu": partial(tests, machine, left),
        "switch: fused q/k/v, compiled, CUDA graphs": partial(switch, machine, {"fuse_qkv": True, "compile": True}),
        "switch: int8, compiled": partial(switch, machine, {"compile": True}, "int8"),
        "forward S 640, batch 8": at("S", 640, 8, True),
        "forward B 640, batch 8": at("B", 640, 8, True),
        "forward L 1280, batch 8": at("L", 1280, 8, True),
        "forward g 640, batch 8": at("g", 640, 8, False),
        "switch: max-autotune": partial(switch, machine, {"fuse_qkv": True, "mode": "max-autotune"}),
    }


def markdown(record: dict[str, Any], names: Sequence[str]) -> str:
    """The page of what there is so far."""
    lines = ["# EoMT on a GPU", "", f"{record['date']}. {describe_machine(record['machine'])}.", ""]
    if record["dry_run"]:
        lines += ["**A dry run with tiny models on the CPU: the figures say nothing.**", ""]
    lines += ["bf16, random weights, medians; ours through `optimize_for_inference()`.", ""]
    lines += ["| forward | FPS | paper, H100 | Transformers, compiled | share of the peak | difference |"]
    lines += ["|---|---|---|---|---|---|"]
    done = record["steps"]
    for name in (name for name in names if name.startswith("forward") and "fps" in done.get(name, {})):
        row = done[name]
        theirs = "-" if row["theirs"] is None else f"{row['theirs']:.1f}"
        share = "-" if row["share_of_peak"] is None else f"{100 * row['share_of_peak']:.1f} %"
        paper = row["paper"] if name.endswith("batch 1") else "-"
        cells = [name.removeprefix("forward "), f"{row['fps']:.1f}", str(paper), theirs, share]
        lines.append(f"| {' | '.join(cells)} | {row['difference']:.1e} |")
    lines += ["", "| other | result | seconds |", "|---|---|---|"]
    for name in names:
        row = done.get(name)
        if row is None:
            lines.append(f"| {name} | not reached | |")
        elif "error" in row:
            lines.append(f"| {name} | error: {row['error'].splitlines()[-1]} | {row['seconds']:.0f} |")
        elif "fps" not in row:
            text = json.dumps({key: value for key, value in row.items() if key != "seconds"})
            lines.append(f"| {name} | `{text}` | {row['seconds']:.0f} |")
    return "\n".join([*lines, ""])


def write(folder: Path, record: dict[str, Any], names: Sequence[str]) -> None:
    """Both files, each replaced in one go, so that a cut leaves the ones before."""
    contents = {"gpu.json": json.dumps(record, indent=1), "gpu.md": markdown(record, names)}
    for name, text in contents.items():
        partial_file = folder / f"{name}.partial"
        partial_file.write_text(text, encoding="utf-8")
        partial_file.replace(folder / name)


def previous(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Steps that succeeded in an earlier call on the same machine with the same versions."""
    try:
        before = json.loads((folder / "gpu.json").read_text(encoding="utf-8"))
        same = all(before[name] == record[name] for name in ("machine", "dry_run"))
    except (OSError, ValueError, KeyError):
        return {}
    return {name: row for name, row in before["steps"].items() if "error" not in row} if same else {}


def kind_of(name: str) -> str:
    """Steps of one kind take about as long."""
    return name.split()[0]


def main(argv: Sequence[str] | None = None) -> int:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for gpu.json and gpu.md")
    parser.add_argument("--seconds", type=float, default=400, metavar="N", help="time for all steps (default 400)")
    parser.add_argument("--only", metavar="TEXT", help="only steps whose name contains this")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run runs every step with tiny models on the CPU")
    machine = Machine(torch.device("cpu" if args.dry_run else "cuda"), args.dry_run)

    def left() -> float:
        return args.seconds - (time.monotonic() - begun)

    chosen = {name: step for name, step in steps(machine, left).items() if args.only is None or args.only in name}
    record: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine_facts(), "dry_run": args.dry_run}
    args.output.mkdir(parents=True, exist_ok=True)
    record["steps"] = previous(args.output, record)
    names = list(dict.fromkeys([*record["steps"], *chosen]))
    write(args.output, record, names)
    longest: dict[str, float] = {}  # seconds of a step of each kind: mostly compilation, which cannot be cut short
    for name, step in chosen.items():
        if name in record["steps"]:
            continue
        if left() <= longest.get(kind_of(name), 0.0):
            print(f"{name}: not reached in {args.seconds:g} s", flush=True)
            continue
        start = time.monotonic()
        try:
            row = step()
        except Exception as error:  # whatever it is, the next step may work
            row = {"error": "".join(traceback.format_exception_only(error)).strip()}
        fresh()
        took = time.monotonic() - start
        longest[kind_of(name)] = max(took, longest.get(kind_of(name), 0.0))
        record["steps"][name] = {**row, "seconds": took}
        write(args.output, record, names)
        print(f"{name}: {json.dumps(record['steps'][name])}", flush=True)
    failed = [name for name in chosen if "error" in record["steps"].get(name, {"error": ""})]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
