"""Options that several subcommands share, and checks of options before PyTorch is imported."""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..lookup import entry_points, suggestion

QUANTIZATIONS = ("int8", "int8-weight-only", "fp8")
# models.confidence.CONFIDENCES, whose import takes seconds
CONFIDENCES = ("maxscore", "msp", "maxlogit", "entropy", "energy", "rba", "rejection")


def add_model_options(parser: Any) -> None:
    """Add the model, its revision and the device."""
    parser.add_argument("--model", required=True, metavar="ID_OR_FOLDER", help="Hub repository or local folder")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub repository")
    parser.add_argument(
        "--device", metavar="D", help="cpu, cuda, cuda:1, mps; default: the first available of CUDA, MPS, CPU"
    )


def add_dtype_option(parser: Any) -> None:
    """Add the type of the weights."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights; auto: bfloat16 where that is faster on this machine (default float32)",
    )


def name_of_dtype(text: str, device: Any) -> str:
    """The name of the type that `--dtype` asks for, with `auto` decided."""
    from ..inference.devices import DTYPES, pick_dtype

    dtype = pick_dtype(text, device)
    return next(name for name, known in DTYPES.items() if known == dtype)


def add_optimize_option(parser: Any) -> None:
    """Add optimisation for inference."""
    parser.add_argument(
        "--optimize",
        nargs="?",
        const="",
        metavar="SWITCH,...",
        help=(
            "optimise the model for inference, which changes no segment; optionally with switches such as compile "
            "(worth its minute for hundreds of images) or no-prune-masks"
        ),
    )


def optimize_switches(text: str | None) -> bool | dict[str, bool]:
    """What `--optimize` asks for: `a,no-b` is a on and b off."""
    if not text:
        return text is not None
    names = [part.strip().replace("-", "_") for part in text.split(",")]
    return {name.removeprefix("no_"): not name.startswith("no_") for name in names}


def add_runtime_options(parser: Any) -> None:
    """Add how to run an exported model."""
    group = parser.add_argument_group("models exported by `hf-segvit export`")
    group.add_argument(
        "--runtime", metavar="R", help="onnxruntime, openvino, aotinductor, executorch; default: the export's own"
    )
    group.add_argument("--threads", type=int, metavar="N", help="of the processor; default: the runtime's choice")
    group.add_argument(
        "--allow-native-code",
        action="store_true",
        help="run the native code of a .pt2 package, which can do anything that you can",
    )


def runtime_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Segmenter.from_pretrained` for these options."""
    return {"runtime": args.runtime, "threads": args.threads, "allow_native_code": args.allow_native_code}


def add_token_merging_option(parser: Any) -> None:
    """Add token merging."""
    parser.add_argument(
        "--token-merging",
        type=threshold_or_off,
        metavar="THRESHOLD",
        help=(
            "merge tokens of EoMT from this cosine similarity on, such as 0.9, which is faster for large inputs and "
            "changes segments; off: also not where the checkpoint says so; default: the checkpoint's"
        ),
    )


def add_quantization_option(parser: Any) -> None:
    """Add quantisation."""
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help=(
            "quantise the transformer blocks while loading (the checkpoint stays as it is); fp8 needs an NVIDIA GPU "
            'that has it; needs pip install "hf-segvit[quantization]"'
        ),
    )


def threshold_or_off(text: str) -> float | bool:
    """A threshold in (0, 1], or False for `off`."""
    if text == "off":
        return False
    try:
        threshold = float(text)
    except ValueError:
        threshold = -1.0
    if not 0 < threshold <= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither off nor a cosine similarity above 0 and at most 1, such as 0.9"
        )
    return threshold


def add_cache_option(parser: Any) -> None:
    """Add `--no-cache`."""
    parser.add_argument(
        "--no-cache",
        action=_WithoutCache,
        help="read large annotation files anew instead of from the cache (in HF_SEGVIT_CACHE, or ~/.cache/hf_segvit)",
    )


class _WithoutCache(argparse.Action):
    """Switch the cache off in this process and in those that it starts, which inherit the variable."""

    def __init__(self, option_strings: Any, dest: str, **settings: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=False, **settings)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        os.environ["HF_SEGVIT_CACHE"] = "off"
        setattr(namespace, self.dest, True)


def add_classifier_options(parser: Any) -> None:
    """Add a ViT-P that names the masks of the model."""
    group = parser.add_argument_group("labels by ViT-P")
    group.add_argument(
        "--classifier",
        metavar="ID_OR_FOLDER",
        help=(
            "ViT-P that corrects the labels of --model's masks; --model may then be any universal segmentation model "
            "of Transformers, such as a Mask2Former"
        ),
    )
    group.add_argument(
        "--alpha", type=float, metavar="A", help="weight of ViT-P, from 0 (none) to 1; default 0.4, or the checkpoint's"
    )
    group.add_argument(
        "--label-mismatch",
        choices=("error", "keep"),
        default="error",
        help="if ViT-P knows other classes than --model: stop (default), or correct only those that both know",
    )


def add_view_options(parser: Any) -> None:
    """Add test-time augmentation."""
    group = parser.add_argument_group("test-time augmentation (semantic segmentation)")
    group.add_argument(
        "--tta-scales",
        metavar="S,S,...",
        help="average over these factors of the input size, such as 0.5,1,1.5; default 1",
    )
    group.add_argument("--tta-flip", action="store_true", help="average over each image and its mirror image")


def add_pixel_limit(parser: Any) -> None:
    """Add the most pixels that an image may have."""
    parser.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help=(
            "most pixels that an image may have, also in a file that is small for them (default 178956970, fewer in "
            "small files; or the environment's HF_SEGVIT_MAX_PIXELS)"
        ),
    )


def apply_pixel_limit(args: argparse.Namespace) -> None:
    """Let the limit hold for all that reads images, in other processes too."""
    if args.max_pixels is not None:
        check_minimum(args, max_pixels=1)
        os.environ["HF_SEGVIT_MAX_PIXELS"] = str(args.max_pixels)  # as if the user had set it


def model_folder(source: str) -> str:
    """The model of a run's folder, said on stderr; anything else is returned as it is."""
    folder = Path(source).expanduser()
    if not folder.is_dir() or (folder / "config.json").is_file():
        return source
    model = folder / "model"
    if (model / "config.json").is_file():
        print(f"hf-segvit: {source} is the folder of a run; its model is {model}", file=sys.stderr)
        return str(model)
    inside = sorted(path.parent for path in folder.glob("*/config.json"))
    if inside:
        raise ValueError(f"{source} holds no model itself; name one of {', '.join(map(str, inside[:5]))}")
    if (folder / "history.jsonl").is_file():
        raise ValueError(
            f"{source} is the folder of a run that has not finished, so there is no {model} yet; finish it with the "
            "same `hf-segvit train` command"
        )
    return source


def refuse_missing_models(*sources: str | None) -> None:
    """Refuse a model folder that does not exist."""
    for source in sources:
        # Anything but a path may be a Hub id, which only inference/loading.py can judge.
        if source is None or not (source.startswith((".", "~")) or Path(source).is_absolute()):
            continue
        if not Path(source).exists():
            raise ValueError(f"there is no folder {source}, and a Hub id looks like owner/name; check the path")


def check_model_options(args: argparse.Namespace) -> None:
    """Refuse a threshold or alpha outside [0, 1], and `--label-mismatch` without a classifier."""
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold} is outside [0, 1]")
    if args.alpha is not None and not 0 <= args.alpha <= 1:
        raise ValueError(f"--alpha {args.alpha} is outside [0, 1]: 0 is the generator's answer, 1 is ViT-P's")
    if args.label_mismatch == "keep" and args.classifier is None:
        raise ValueError("--label-mismatch keep is about a --classifier; name one")


def check_minimum(args: argparse.Namespace, **minimums: int) -> None:
    """Refuse numbers that are too small; an option that was not given is `None`, which passes."""
    for name, minimum in minimums.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {minimum}")


def refuse_missing_data(spec: str) -> None:
    """Refuse FORMAT:PATH with an unknown format or a missing path, before the seconds that importing a reader takes."""
    from ..data.readers import FORMATS, READER_GROUP

    written, separator, path = spec.partition(":")
    if not separator:
        raise ValueError(f"{spec!r}: give FORMAT:PATH, where FORMAT is one of {', '.join(FORMATS)}")
    written = written.strip()
    name = written.lower().replace("-", "_")
    if name not in FORMATS:
        offered = entry_points(READER_GROUP)
        # A reader may also be given by its import path. One with a dot is left to the import itself: looking for it
        # would already import the packages around it.
        is_module = "." in written or (written.isidentifier() and find_spec(written) is not None)
        if written not in offered and not is_module:
            near = suggestion(written, [*FORMATS, *offered])
            raise ValueError(f"there is no format {written!r}; {near}, or give the import path of a reader")
        return
    # The PATH of these two is a Hub repository, or a difficulty.
    if name in ("hub", "generated") or not path:
        return
    # Options may follow a `?`, but a folder's name may contain one, too.
    from ..data.folders import path_exists

    paths = [path, path.partition("?")[0]]
    if not any(map(path_exists, paths)):
        raise ValueError(f"{paths[1]}: no such file or folder; check the path (it is read from {Path.cwd()})")


def views_of(args: argparse.Namespace) -> Any:
    """The `Views` that the options of test-time augmentation ask for."""
    from ..inference.views import Views

    return Views(numbers(args.tta_scales, "--tta-scales") if args.tta_scales is not None else (1.0,), args.tta_flip)


@contextmanager
def errors_name_options() -> Iterator[None]:
    """Name options instead of function arguments in errors of loading."""
    try:
        yield
    except ValueError as error:
        text = str(error).replace("label_mismatch='keep'", "--label-mismatch keep")
        text = text.replace("leave optimize out", "leave --optimize out").replace("leave quant", "leave --quant")
        text = text.replace("model.merge_tokens(None)", "--token-merging off")
        text = re.sub("(use|or) dtype ", r"\1 --dtype ", text).replace("use quantization ", "use --quantization ")
        for name, option in (
            ("compile=True", "--optimize compile"),
            ("max_segments=", "--max-segments "),
            ("confidence=", "--confidence "),
            ("say with classes which", "say with --classes which"),
            ("token_merging=", "--token-merging "),
            ("allow_native_code=True", "--allow-native-code"),
            ("runtime=", "--runtime "),
            ("threads=", "--threads "),
            ("quantize=", "--quantize "),
            ("calibration=", "--calibration "),
        ):
            text = text.replace(name, option)
        raise ValueError(text.replace("task='semantic'", "--task semantic")) from error


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} {text}: give numbers separated by commas, such as 0.5,1,1.5") from error
