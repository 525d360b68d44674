"""Formats that a model can be exported to, and what each needs, without heavy imports."""

import re
from dataclasses import dataclass
from importlib.util import find_spec

from ..lookup import suggestion


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        description: what it is for.
        modules: modules that an export needs beside PyTorch.
        extra: the extra of this package that installs them.
        tolerance: largest difference from PyTorch, relative to the largest output.
    """

    description: str
    modules: tuple[str, ...] = ()
    extra: str | None = None
    tolerance: float = 1e-4


FORMATS = {
    "onnx": Format(
        "ONNX Runtime and whatever else reads ONNX, on any system and in the browser",
        ("onnx", "onnxscript", "onnxruntime"),
        "onnx",
    ),
    "openvino": Format("OpenVINO, on Intel's and other x86 processors", ("onnx", "onnxscript", "openvino"), "openvino"),
    "pt2": Format("AOTInductor: native code for this processor, run by PyTorch without its Python model"),
    "executorch": Format("ExecuTorch with XNNPACK, on phones", ("executorch",), "executorch"),
}


# Formats that have an int8 form, the module that makes it, and the extra that installs that.
QUANTIZATIONS = {"onnx": ("onnxruntime", "onnx"), "openvino": ("nncf", "int8")}


def check_format(name: str) -> None:
    """Refuse an unknown format, naming the nearest."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; {suggestion(name, FORMATS)}")


def check_packages(name: str) -> None:
    """Refuse a format whose packages are not installed, naming the command that installs them."""
    chosen = FORMATS[name]
    missing = [module for module in chosen.modules if find_spec(module) is None]
    if missing:
        raise ValueError(
            f"format {name} needs {', '.join(missing)}; install with `pip install 'hf-segvit[{chosen.extra}]'`"
        )


def check_quantization(quantize: str | None, calibration: str | None, file_format: str) -> None:
    """Refuse a quantisation that does not exist, has no calibration set, or whose package is not installed."""
    if quantize is None:
        if calibration is not None:
            raise ValueError(f"calibration={calibration!r} is for a quantised export; add quantize='int8'")
        return
    if quantize != "int8":
        raise ValueError(f"quantize={quantize!r} is not known; int8 is")
    if file_format not in QUANTIZATIONS:
        raise ValueError(f"quantize='int8' is for the formats {' and '.join(QUANTIZATIONS)}, not {file_format}")
    if calibration is None:
        raise ValueError(
            "quantize='int8' needs images to calibrate with: calibration='FORMAT:PATH' names a data set like those the "
            "model will see"
        )
    module, extra = QUANTIZATIONS[file_format]
    if find_spec(module) is None:
        raise ValueError(
            f"quantize='int8' for {file_format} needs {module}; install it with `pip install 'hf-segvit[{extra}]'`"
        )


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of `HxW`, or of one number for both."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if match is None:
        raise ValueError(f"size {text!r}: give HEIGHTxWIDTH in pixels, such as 512x1024, or one number")
    height = int(match[1])
    return height, int(match[2] or height)
