"""EoMT on a GPU, in one command of at most seven minutes: forward, training, images, kernels, tests.

    python benchmarks/gpu.py --output gpu_results [--seconds 400] [--profile] [--dry-run]

Needs this repository, torch >= 2.11 and transformers >= 5.17, nothing installed and no network. All that is compiled is
compiled first, a process for each step, since compilation takes one core most of the time; the tests marked gpu run
meanwhile, and nothing is timed. The steps are in order of value. After each of them gpu.json and gpu.md are written, an
error of a step is recorded there and the next one runs, and a second call with the same folder continues where the
first was cut off. A step is not begun if less time is left than the longest of its kind took, or than it had without
coming to an end when all was compiled. Weights are random; ours
and Transformers' are the same, and outputs are compared before anything is timed. `--profile` writes the kernels of a
forward pass and of a training step beside the figures. `--dry-run` runs every step with tiny models on the CPU, whose
figures say nothing.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
LADDER = ("row0", "row1", "row2", "row3", "row4", "row5", "row0_annealed")  # those of benchmarks/ladder.py
SWITCHES_OFF = {"fuse_qkv": False, "channels_last": False, "prune_masks": False, "compile": False}


@dataclass(frozen=True)
class Machine:
    """Where to run, and how much of it."""

    device: torch.device
    dry_run: bool
    rehearsal: bool = False  # only to compile
    profiles: Path | None = None  # folder for tables of kernels

    @property
    def repeats(self) -> int:
        return 1 if self.rehearsal else 2 if self.dry_run else 30

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


def repeat(function: Callable[[], Any], times: int) -> None:
    """Call without waiting for the device in between."""
    for _ in range(times):
        function()


@torch.inference_mode()
def forward(
    machine: Machine, size: str, image_size: int, batch_size: int, peer: bool, peer_mode: str | None = None
) -> dict[str, Any]:
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
            # Their comparison of `attn_mask_probs` waits for the device, so their graph breaks.
            theirs.compile(mode=peer_mode)
        calls.append(partial(theirs, pixels))
    else:
        del theirs
    seconds = time_interleaved(calls, machine.repeats, machine.clock, warm_up=3)
    (queued,) = time_interleaved([partial(repeat, calls[0], machine.repeats)], 1, machine.clock)
    with profiled(machine, f"forward-{size}-{image_size}-{batch_size}"):
        calls[0]()
    fps = [batch_size / statistics.median(each) for each in seconds]
    macs = multiply_adds(config, side)
    peak = peak_bf16(torch.cuda.get_device_name()) if machine.device.type == "cuda" else None
    return {
        "fps": fps[0],
        "queued_fps": batch_size * machine.repeats / queued[0],
        "paper": PAPER_FPS[size, image_size],
        "theirs": fps[1] if peer else None,
        "range_ms": [1e3 * min(seconds[0]), 1e3 * max(seconds[0])],
        "share_of_peak": None if peak is None else 2 * macs * fps[0] / peak,
        "giga_multiply_adds": macs / 1e9,
        "difference": differs,
    }


@contextmanager
def profiled(machine: Machine, name: str) -> Iterator[None]:
    """Write a table of the kernels that run meanwhile, if there is a folder for it."""
    if machine.profiles is None or machine.rehearsal:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if machine.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        yield
        if machine.device.type == "cuda":
            torch.cuda.synchronize()
    averages = profile.key_averages()
    tables = [
        averages.table(sort_by=f"self_{kind}_time_total", row_limit=40, max_name_column_width=90)
        for kind in ("device", "cpu")
    ]
    (machine.profiles / f"profile-{name}.txt").write_text("\n".join(tables), encoding="utf-8")


def training(machine: Machine, compiled: bool = False, batch_size: int = 4) -> dict[str, Any]:
    """One step of L 640 under bf16 autocast, beside Transformers: time, and memory above the start of the step."""
    from hf_segvit.training.start import compile_blocks

    ours, theirs = make_pair(machine, "L", 640, torch.float32, probability=1.0)
    side = ours.config.image_height_width[0]
    masks, classes = targets(batch_size, side, machine.device, 5 if machine.dry_run else 133)
    pixels = torch.randn(batch_size, 3, side, side, device=machine.device)
    found: dict[str, Any] = {}
    steps = []
    for which, model in (("ours", ours), ("theirs", theirs)):
        model.train()
        if compiled and not machine.dry_run:
            if which == "ours":
                compile_blocks(model)
            else:  # the same parts
                for module in model.modules():
                    if type(module).__name__ in ("EomtEmbeddings", "EomtLayer", "EomtScaleLayer"):
                        module.compile(dynamic=None if type(module).__name__ == "EomtLayer" else False)
        labels = masks if which == "ours" else [each.float() for each in masks]  # upstream takes no bool masks
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
        step = partial(training_step, model, optimizer, pixels, labels, classes, machine.device.type)
        for _ in range(2):
            step()  # the optimiser's state is there from now on
        with PeakMemory(machine.device) as memory:
            step()
        found[which] = {"mebibytes": memory.mebibytes}
        if not compiled:
            with profiled(machine, f"training-{which}"):
                step()
        steps.append(step)
    for which, seconds in zip(found, time_interleaved(steps, max(2, machine.repeats // 3), machine.clock), strict=True):
        found[which]["ms"], found[which]["range_ms"] = (
            1e3 * statistics.median(seconds),
            [1e3 * min(seconds), 1e3 * max(seconds)],
        )
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


@torch.inference_mode()
def ladder(machine: Machine, name: str, compiled: bool) -> dict[str, Any]:
    """Frames a second of a row of the paper's Table 1, L 640, bf16: compiled, or plain and as a CUDA graph."""
    from ladder import BY_NAME, build, full_size

    from hf_segvit.models.inference_optimization import compile_module

    row = BY_NAME[name]
    with machine.device:
        model = build(row, "medium") if machine.dry_run else full_size(row, "L")
    model.set_masked_attention_probabilities(float(row.mode == "masked"))
    model = model.to(machine.device, torch.bfloat16).eval()
    side = model.config.image_height_width[0]
    pixels = torch.randn(1, 3, side, side, device=machine.device, dtype=torch.bfloat16)
    if compiled and not machine.dry_run:
        if row.removed is None and row.mode == "masked":  # `optimize_for_inference` wants the masks annealed
            compile_module(model.eomt, None, None)
            model.uses_cuda_graphs = True
        else:
            model.optimize_for_inference()
    (seconds,) = time_interleaved([partial(model, pixels)], machine.repeats, machine.clock, warm_up=3)
    found: dict[str, Any] = {"fps": 1 / statistics.median(seconds), "paper": row.frames}
    if not compiled and not machine.dry_run:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model(pixels)
            (seconds,) = time_interleaved([graph.replay], machine.repeats, machine.clock, warm_up=3)
            found["graph_fps"] = 1 / statistics.median(seconds)
        except Exception as error:
            found["graph_error"] = str(error).splitlines()[0]
    return found


def tests(machine: Machine, left: Callable[[], float]) -> dict[str, Any]:
    """The tests marked `gpu`; in a dry run only whether they can be collected."""
    files = sorted(str(path) for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "--tb=short",
        *files,
    ]
    words += ["--continue-on-collection-errors"] + (["--collect-only"] if machine.dry_run else [])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(1.0, left()), check=False
    )
    lines = (run.stdout + run.stderr).strip().splitlines()
    if run.returncode not in (0, 1):
        raise RuntimeError("\n".join(lines[-3:]))
    failed = [line[:300] for line in lines if line.startswith(("FAILED", "E  "))]
    return {"returncode": run.returncode, "summary": lines[-1], "failed": failed}


def steps(machine: Machine, left: Callable[[], float]) -> dict[str, Callable[[], dict[str, Any]]]:
    """All steps by name, in order of value."""

    def at(size: str, image_size: int, batch_size: int, peer: bool) -> Callable[[], dict[str, Any]]:
        return partial(forward, machine, size, image_size, batch_size, peer)

    return {
        "forward L 640, batch 1": at("L", 640, 1, True),
        "training step L 640, batch 4": partial(training, machine),
        "training step L 640, batch 4, blocks compiled": partial(training, machine, True),
        "forward S 640, batch 1": at("S", 640, 1, True),
        "forward L 1280, batch 1": at("L", 1280, 1, True),
        "forward B 640, batch 1": at("B", 640, 1, True),
        "forward g 640, batch 1": at("g", 640, 1, False),
        "tests marked gpu": partial(tests, machine, left),
        "forward L 640, batch 1, Transformers with CUDA graphs": partial(
            forward, machine, "L", 640, 1, True, "reduce-overhead"
        ),
        "image in, segments out": partial(images, machine),
        "switch: compile without CUDA graphs": partial(switch, machine, {"compile": True, "cuda_graphs": False}),
        "switch: fused q/k/v": partial(switch, machine, {"fuse_qkv": True}),
        "switch: fp8, compiled": partial(switch, machine, {"compile": True}, "fp8"),
        "forward L 640, batch 8": at("L", 640, 8, True),
        "switch: fused q/k/v, compiled, CUDA graphs": partial(switch, machine, {"fuse_qkv": True, "compile": True}),
        "switch: int8, compiled": partial(switch, machine, {"compile": True}, "int8"),
        **{f"ladder {name}": partial(ladder, machine, name, False) for name in LADDER},
        **{f"compiled ladder {name}": partial(ladder, machine, name, True) for name in LADDER},
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
    lines += ["FPS with a wait for the device after each call; queued: after all calls.", ""]
    lines += ["| forward | FPS | queued | paper, H100 | Transformers, compiled | share of the peak | difference |"]
    lines += ["|---|---|---|---|---|---|---|"]
    done = record["steps"]
    for name in (name for name in names if name.startswith("forward") and "fps" in done.get(name, {})):
        row = done[name]
        theirs = "-" if row["theirs"] is None else f"{row['theirs']:.1f}"
        share = "-" if row["share_of_peak"] is None else f"{100 * row['share_of_peak']:.1f} %"
        paper = row["paper"] if name.endswith("batch 1") else "-"
        cells = [
            name.removeprefix("forward "),
            f"{row['fps']:.1f}",
            f"{row['queued_fps']:.1f}",
            str(paper),
            theirs,
            share,
        ]
        lines.append(f"| {' | '.join(cells)} | {row['difference']:.1e} |")
    lines += ["", "| other | result | seconds |", "|---|---|---|"]
    for name in names:
        row = done.get(name)
        if row is None:
            lines.append(f"| {name} | not reached | |")
        elif "error" in row:
            lines.append(f"| {name} | error: {row['error'].splitlines()[-1]} | {row['seconds']:.0f} |")
        elif not name.startswith("forward"):
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


def compile_ahead(
    args: argparse.Namespace, names: Sequence[str], record: dict[str, Any], seconds: float
) -> dict[str, float]:
    """Run the steps that compile, each in a process of its own, which fills PyTorch's cache on disk for the timing.

    The tests are among them: they take no times, so their result counts. Returns the seconds that unfinished steps had.
    """
    deadline, cores = time.monotonic() + seconds, os.cpu_count() or 1
    waiting = [name for name in names if kind_of(name) in ("forward", "switch", "tests") or "compiled" in name]
    waiting = [name for name in waiting if name not in record["steps"]]
    waiting.sort(key=lambda name: not any(word in name for word in ("row0", "row1", "fp8", "int8", "autotune")))  # long
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    running: dict[str, subprocess.Popen] = {}
    with tempfile.TemporaryDirectory() as folder:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < cores:
                name = waiting.pop(0)
                words = [sys.executable, __file__, "--output", os.path.join(folder, name), "--rehearsal", name]
                words += ["--dry-run"] if args.dry_run else []
                running[name] = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
            time.sleep(0.5)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                del running[name]
                file = Path(folder, name, "gpu.json")
                done = json.loads(file.read_text(encoding="utf-8"))["steps"] if file.exists() else {}
                row = done.get(name, {"error": "the process ended early"})
                print(f"ahead: {name}: {row.get('error', 'ready')}", flush=True)
                if kind_of(name) == "tests" and "error" not in row:
                    record["steps"][name] = row
        for process in running.values():
            process.kill()
            process.wait()
    return dict.fromkeys([*running, *waiting], seconds)


def kind_of(name: str) -> str:
    """Steps of one kind take about as long."""
    return name.split()[0].rstrip(":")


def main(argv: Sequence[str] | None = None) -> int:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for gpu.json and gpu.md")
    parser.add_argument("--seconds", type=float, default=400, metavar="N", help="time for all steps (default 400)")
    parser.add_argument("--only", metavar="TEXT", nargs="+", help="only steps whose name contains one of these")
    parser.add_argument("--profile", action="store_true", help="write tables of kernels")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--rehearsal", metavar="STEP", help=argparse.SUPPRESS)  # only this, without times
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run runs every step with tiny models on the CPU")
    device = torch.device("cpu" if args.dry_run else "cuda")
    machine = Machine(device, args.dry_run, args.rehearsal is not None, args.output if args.profile else None)

    def left() -> float:
        return args.seconds - (time.monotonic() - begun)

    chosen = steps(machine, left)
    if args.only is not None:
        chosen = {name: step for name, step in chosen.items() if any(text in name for text in args.only)}
    if machine.rehearsal:
        chosen = {args.rehearsal: chosen[args.rehearsal]}
    record: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine_facts(), "dry_run": args.dry_run}
    args.output.mkdir(parents=True, exist_ok=True)
    record["steps"] = previous(args.output, record)
    names = list(dict.fromkeys([*record["steps"], *chosen]))
    write(args.output, record, names)
    needed: dict[str, float] = {}  # at least, by steps that compile longer than there was time for
    if device.type == "cuda" and not machine.rehearsal:
        needed = compile_ahead(args, list(chosen), record, 0.36 * args.seconds)
        write(args.output, record, names)
    longest: dict[str, float] = {}  # seconds of a step of each kind: mostly compilation, which cannot be cut short
    for name, step in chosen.items():
        if name in record["steps"]:
            continue
        if left() <= max(longest.get(kind_of(name), 0.0), needed.get(name, 0.0)):
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
