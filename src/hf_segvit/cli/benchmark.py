"""`hf-segvit benchmark MODEL_OR_CONFIG ...`: speed and memory, beside other ways to run the same model."""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_files import prepare_output_folder
from ..lookup import suggestion
from ..models.published_labels import TASKS
from .model_options import QUANTIZATIONS, check_minimum, errors_name_options, model_folder, optimize_switches

if TYPE_CHECKING:
    import torch

    from ..inference.benchmarking import Variant
    from ..inference.segmenter import Segmenter

PEERS = ("transformers", "mask2former-swin-l", "oneformer-swin-l")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.onnx", "*.xml", "*.pt2")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "benchmark",
        help="measure a model's speed and memory, beside peers",
        description=(
            "Measure forward passes, and images in to segments out, of models as they are, optimised and quantised, "
            "and of peers. All variants of one type of weights take turns, and their outputs are compared first."
        ),
        epilog=(
            "MODEL_OR_CONFIG is a folder, a Hub id, or, with random weights, a config.json or the name of a released "
            "model such as coco_panoptic_eomt_large_640."
        ),
    )
    parser.add_argument("models", nargs="+", metavar="MODEL_OR_CONFIG", help="see below")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1; default: the first available of CUDA and CPU")
    parser.add_argument("--task", choices=TASKS, help="default: what the model was trained for")
    parser.add_argument(
        "--dtype",
        metavar="T,T",
        default="float32,auto",
        help="types of the weights, each measured on its own: auto, float32, bfloat16, float16 (default float32,auto)",
    )
    parser.add_argument("--batch-sizes", metavar="N,N", default="1", help="images at a time (default 1)")
    parser.add_argument(
        "--optimize",
        action="append",
        nargs="?",
        const="",
        metavar="SWITCH,...",
        help="also optimised, with these switches as for segment; may be repeated (default: once, without switches)",
    )
    parser.add_argument("--no-optimize", action="store_true", help="only as it is")
    parser.add_argument("--quantization", metavar="M,M", help=f"also quantised: {', '.join(QUANTIZATIONS)}")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME_OR_FOLDER",
        help=(
            f"also measure {', '.join(PEERS)} (the last two with random weights), or the folder of an exported model; "
            "may be repeated"
        ),
    )
    parser.add_argument("--input-size", metavar="H,W", help="of the pixels; default: the model's")
    parser.add_argument("--forward-only", action="store_true", help="leave out pre- and post-processing")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="timed passes (default 7)")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time, steadier on a busy machine, with OMP_NUM_THREADS=1 (default wall)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="also write benchmark.json, benchmark.md and benchmark.png there"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check what is asked for, measure and report."""
    check_minimum(args, repeats=1)
    batch_sizes = _whole_numbers(args.batch_sizes, "--batch-sizes")
    size = None if args.input_size is None else _whole_numbers(args.input_size, "--input-size")
    if size is not None and len(size) != 2:
        raise ValueError(f"--input-size {args.input_size}: give height and width, such as 640,640")
    quantizations = args.quantization.split(",") if args.quantization else []
    for method in quantizations:
        if method not in QUANTIZATIONS:
            raise ValueError(f"--quantization: there is no {method!r}; {suggestion(method, QUANTIZATIONS)}")
    for peer in args.peer:
        if peer not in PEERS and not Path(peer).exists():
            raise ValueError(f"--peer {peer}: neither a folder nor one of {', '.join(PEERS)}")
    if args.no_optimize and args.optimize:
        raise ValueError("--optimize and --no-optimize exclude each other; leave one out")
    if args.output is not None:
        prepare_output_folder(args.output)
    sources = [find_source(name) for name in args.models]

    import torch
    from transformers import logging

    from ..inference.benchmark_report import explanation, json_content, markdown, plot_speed, text_table
    from ..inference.benchmarking import benchmark, input_size, variants_of
    from ..inference.devices import describe_device, pick_device, pick_dtype
    from ..inference.measuring import machine_facts
    from ..inference.quantization import check_quantization

    logging.set_verbosity_error()
    device = pick_device(args.device)
    dtypes = list(dict.fromkeys(pick_dtype(name.strip(), device) for name in args.dtype.split(",")))
    exported = [peer for peer in args.peer if peer not in PEERS]
    if exported and torch.float32 not in dtypes:
        raise ValueError(f"--peer {exported[0]}: an exported model is measured in float32; add it to --dtype")
    with errors_name_options():
        for method in quantizations:
            # fp8 goes with bfloat16 only, so other types are measured without it.
            if method != "fp8" or torch.bfloat16 not in dtypes:
                check_quantization(method, device, dtypes[0])
            else:
                check_quantization(method, device, torch.bfloat16)
    rows, inputs = [], []
    for source in sources:
        reference, pixels = None, (0, 0)
        print(f"hf-segvit benchmark: {source.name} on {describe_device(device)}", file=sys.stderr)
        for dtype in dtypes:
            with errors_name_options(), tempfile.TemporaryDirectory() as folder:
                segmenter = source.load(args, dtype, device)
                pixels = (size[0], size[1]) if size is not None else input_size(segmenter)
                channels = getattr(segmenter.model.config, "num_channels", 3)
                wanted = optimizations(args, segmenter)
                methods = [each for each in quantizations if each != "fp8" or dtype == torch.bfloat16]
                variants = variants_of(segmenter, dtype, wanted, methods)
                # An exported model takes float32 pixels, so it stands beside the model in float32.
                peers = [peer for peer in args.peer if peer in PEERS or dtype == torch.float32]
                variants += [peer_variant(peer, segmenter, dtype, device, Path(folder)) for peer in peers]
                if dtype != torch.float32 and reference is None:
                    reference = source.load(args, torch.float32, device).model
                elif reference is None:
                    reference = segmenter.model
                rows += benchmark(
                    source.name,
                    variants,
                    device=device,
                    size=pixels,
                    channels=channels if isinstance(channels, int) else 3,
                    batch_sizes=batch_sizes,
                    repeats=args.repeats,
                    clock=args.clock,
                    reference=partial(_outputs, reference),
                    with_images=not args.forward_only,
                )
        inputs.append(f"{pixels[0]} x {pixels[1]}")
    facts = {
        "date": date.today().isoformat(),
        "command": f"hf-segvit {shlex.join(_words(args))}",
        "machine": machine_facts(),
        "device": describe_device(device),
        "repeats": args.repeats,
        "clock": args.clock,
        "input": ", ".join(dict.fromkeys(inputs)),
        "random": [source.name for source in sources if source.random],
    }
    print(text_table(rows))
    print("\n".join(explanation(rows, facts)))
    if args.output is not None:
        from ..atomic_files import replacing, write_json

        write_json(args.output / "benchmark.json", json_content(rows, facts))
        with replacing(args.output / "benchmark.md") as file:
            file.write_text(markdown(rows, facts), encoding="utf-8")
        plot_speed(args.output / "benchmark.png", rows, facts["device"])
        print(f"results in {args.output}", file=sys.stderr)
    return 1 if any(row.failure for row in rows) else 0


@dataclass(frozen=True)
class Source:
    """A model to measure: its name, whether its weights are random, and what loads it."""

    name: str
    random: bool
    load: Callable[[argparse.Namespace, "torch.dtype", "torch.device"], "Segmenter"]


def find_source(name: str) -> Source:
    """The model, config or released model of a name; an error that says what there is otherwise."""
    from ..conversion.official_catalogue import HUB_OWNER, released_models

    path = Path(name).expanduser()
    released = name.removeprefix(f"{HUB_OWNER}/")
    if path.is_file():
        if path.suffix != ".json":
            raise ValueError(f"{name} is a file; name a config.json, a folder, or a released model")
        return Source(name, True, lambda args, dtype, device: _random(path, args, dtype, device))
    if path.is_dir():
        folder = Path(model_folder(name))
        if (folder / "config.json").is_file() and not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
            return Source(name, True, lambda args, dtype, device: _random(folder, args, dtype, device))
        return Source(name, False, lambda args, dtype, device: _loaded(str(folder), args, dtype, device))
    if released in released_models("eomt"):
        model = released_models("eomt")[released]
        fields = model.config_fields
        return Source(released, True, lambda args, dtype, device: _random(fields, args, dtype, device, model.task))
    if released.removesuffix(".pth") in released_models("vit_p"):
        raise ValueError(f"{name} is a ViT-P, which names points; benchmark measures models that segment")
    if name.count("/") == 1 and not name.startswith((".", "~", "/")):
        return Source(name, False, lambda args, dtype, device: _loaded(name, args, dtype, device))
    near = suggestion(released, released_models("eomt"), 3, "a Hub id looks like owner/name")
    raise ValueError(f"{name}: there is no such folder or config.json, and no released model of that name; {near}")


def _loaded(source: str, args: argparse.Namespace, dtype: "torch.dtype", device: "torch.device") -> "Segmenter":
    from ..inference.segmenter import Segmenter

    return Segmenter.from_pretrained(source, task=args.task, device=device, dtype=dtype, revision=args.revision)


def _random(
    source: Path | Mapping[str, Any],
    args: argparse.Namespace,
    dtype: "torch.dtype",
    device: "torch.device",
    task: str | None = None,
) -> "Segmenter":
    from huggingface_hub.errors import StrictDataclassError

    from ..inference.benchmarking import random_segmenter
    from ..inference.loading import SEGMENTATION_TYPES
    from ..models.configuration_eomt import EoMTConfig
    from ..models.configuration_mask2former_vit import Mask2FormerViTConfig

    config: EoMTConfig | Mask2FormerViTConfig
    try:
        if isinstance(source, Path):
            model_type = EoMTConfig.get_config_dict(source)[0].get("model_type")
            types = (*SEGMENTATION_TYPES, Mask2FormerViTConfig.model_type)
            if model_type not in types:
                raise ValueError(f"its type is {model_type!r}, not one of {', '.join(types)}")
            ladder = model_type == Mask2FormerViTConfig.model_type
            config = (Mask2FormerViTConfig if ladder else EoMTConfig).from_pretrained(source)
        else:
            config = EoMTConfig(**source)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ValueError(
            f"{source}: no configuration of a model that segments: {' '.join(str(error).split())}"
        ) from error
    return random_segmenter(config, dtype, device, args.task or task)


def optimizations(args: argparse.Namespace, segmenter: "Segmenter") -> list[dict[str, bool]]:
    """The switches of each optimised variant; by default one without switches, if the model can be optimised."""
    from ..models.configuration_eomt import EoMTConfig
    from ..models.inference_optimization import refuse_masked_attention

    if args.no_optimize:
        return []
    if args.optimize is not None:
        switches = [optimize_switches(text) for text in args.optimize]
        return [each if isinstance(each, dict) else {} for each in switches]
    config = segmenter.model.config
    if not hasattr(segmenter.model, "optimize_for_inference"):
        return []
    if isinstance(config, EoMTConfig):
        try:
            refuse_masked_attention(config)
        except ValueError as error:
            print(f"hf-segvit benchmark: not optimised: {error}", file=sys.stderr)
            return []
    return [{}]


def peer_variant(
    name: str, segmenter: "Segmenter", dtype: "torch.dtype", device: "torch.device", folder: Path
) -> "Variant":
    """A peer of the model, in the same type of weights."""
    if name == "transformers":
        return _transformers_variant(segmenter, dtype, device, folder)
    if name in PEERS:
        return _swin_variant(name, dtype, device)
    from dataclasses import replace

    from ..inference.benchmarking import variant_of
    from ..inference.segmenter import Segmenter

    exported = Segmenter.from_pretrained(name, task=segmenter.task, device=device, threshold=segmenter.threshold)
    variant = variant_of(exported.model, exported.answers, Path(name).name, dtype)
    return replace(variant, facts={**variant.facts, "peer": "exported", "exported": True})


def _transformers_variant(
    segmenter: "Segmenter", dtype: "torch.dtype", device: "torch.device", folder: Path
) -> "Variant":
    """Transformers' own EoMT with the same weights."""
    from dataclasses import replace

    from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

    from ..conversion.to_transformers import export_to_transformers
    from ..inference.benchmarking import variant_of
    from ..inference.loading import quiet_transformers
    from ..models.modeling_eomt import EoMTForUniversalSegmentation

    if not isinstance(segmenter.model, EoMTForUniversalSegmentation):
        raise ValueError(
            f"--peer transformers: a {type(segmenter.model).__name__} has no counterpart in Transformers; leave it out"
        )
    with quiet_transformers():
        export_to_transformers(segmenter.model, folder / "transformers", segmenter.processor, check=False)
        model: Any = AutoModelForUniversalSegmentation.from_pretrained(folder / "transformers", dtype=dtype)
        processor: Any = AutoImageProcessor.from_pretrained(folder / "transformers")
    model = model.to(device).eval()
    task = segmenter.task
    settings: dict[str, Any] = {} if task == "semantic" else {"threshold": segmenter.default_threshold}
    if task == "panoptic":
        settings["stuff_classes"] = list(segmenter.processor.stuff_classes or segmenter.stuff_classes)

    def segment(images: Sequence[Any]) -> Any:
        inputs = processor(images=images, return_tensors="pt").to(device)
        outputs = model(**inputs)
        sizes = [image.shape[:2] for image in images]
        return getattr(processor, f"post_process_{task}_segmentation")(outputs, target_sizes=sizes, **settings)

    variant = variant_of(model, segment, "Transformers", dtype)
    return replace(variant, segment=segment, facts={**variant.facts, "peer": "transformers"})


def _outputs(model: Any, pixels: "torch.Tensor") -> Any:
    return model(pixel_values=pixels)


def _swin_variant(name: str, dtype: "torch.dtype", device: "torch.device") -> "Variant":
    """Mask2Former or OneFormer with a Swin-L and random weights, up to the logits."""
    import torch
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        OneFormerConfig,
        OneFormerForUniversalSegmentation,
        SwinConfig,
    )

    from ..inference.benchmarking import Variant

    backbone = SwinConfig(
        image_size=384,
        embed_dim=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=12,
        drop_path_rate=0.3,
        out_features=["stage1", "stage2", "stage3", "stage4"],  # type: ignore[call-arg]
    )
    torch.manual_seed(0)
    model: Any
    if name.startswith("mask2former"):
        model = Mask2FormerForUniversalSegmentation(
            Mask2FormerConfig(backbone_config=backbone, num_queries=200, num_labels=133)  # type: ignore[call-arg]
        )
    else:
        model = OneFormerForUniversalSegmentation(
            OneFormerConfig(backbone_config=backbone, num_queries=150, num_labels=133, is_training=False)  # type: ignore[call-arg]
        )
    model = model.to(device, dtype).eval()

    def forward(pixels: "torch.Tensor") -> Any:
        # A OneFormer takes the task as text tokens, which cost the same whatever they say.
        tokens = torch.ones(len(pixels), 77, device=pixels.device, dtype=pixels.dtype)
        return model(pixel_values=pixels, **({"task_inputs": tokens} if name.startswith("one") else {}))

    facts = {"attention": getattr(model.config, "_attn_implementation", None), "compiled": None, "quantization": None}
    number = sum(parameter.numel() for parameter in model.parameters())
    # Without their checkpoints there is no image processor of theirs either.
    return Variant(name, dtype, forward, None, number, {**facts, "peer": name}, same_weights=False)


def _whole_numbers(text: str, option: str) -> list[int]:
    """Positive whole numbers separated by commas."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} {text}: give whole numbers separated by commas, such as 1,8") from error
    if min(numbers) < 1:
        raise ValueError(f"{option} {text}: the smallest is 1")
    return numbers


def _words(args: argparse.Namespace) -> list[str]:
    """The command line that these arguments stand for."""
    words = ["benchmark", *args.models]
    for name, value in vars(args).items():
        if name in ("models", "command", "debug", "run", "output") or value in (None, False, []):
            continue
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        else:
            for each in value if isinstance(value, list) else [value]:
                words += [option, str(each)]
    return words
