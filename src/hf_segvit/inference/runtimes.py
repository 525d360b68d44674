"""Runtimes of exported models: ONNX Runtime, OpenVINO, AOTInductor and ExecuTorch, behind one function.

Each is imported when it is used, and every failure is a `ValueError` with a remedy. No runtime is ever given a library
of custom operators. An AOTInductor package is native code, which runs only if the caller allows it.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..hub.export_record import RUNTIMES, GraphRecord

# The extra that installs each runtime; AOTInductor is part of PyTorch.
EXTRAS = {"onnxruntime": "onnx", "openvino": "openvino", "executorch": "executorch"}
Graph = Callable[[dict[str, Tensor]], list[Tensor]]  # inputs by name to outputs in their order, on the CPU


@dataclass(frozen=True)
class RuntimeSettings:
    """How to run a model.

    Attributes:
        runtime: `onnxruntime`, `openvino`, `aotinductor`, `executorch` or `pytorch`; `None`: the format's own.
        threads: of the processor; `None`: the runtime's default.
        device: `cpu`, `cuda`, `cuda:1` (ONNX Runtime), `gpu`, `npu` (OpenVINO); `None`: the CPU.
        dtype: in which to compute; OpenVINO also takes bfloat16 and float16.
        allow_native_code: run the native code of an AOTInductor package, which can do anything that you can.
    """

    runtime: str | None = None
    threads: int | None = None
    device: str | None = None
    dtype: torch.dtype = torch.float32
    allow_native_code: bool = False

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads={self.threads} must be at least 1")

    def runtime_for(self, file_format: str) -> str:
        """The runtime to use for a format; one that cannot read it is refused."""
        possible = RUNTIMES[file_format]
        if self.runtime is None:
            return possible[0]
        if self.runtime not in possible:
            raise ValueError(
                f"runtime={self.runtime!r} does not read {file_format} files; {' or '.join(possible)} does, or export "
                "the model to another format"
            )
        return self.runtime


def open_graph(folder: Path, record: GraphRecord, file_format: str, settings: RuntimeSettings) -> Graph:
    """Open a graph of an exported folder.

    Raises:
        ValueError: the runtime is not installed or too old, the file is damaged or another model, or device or dtype
            are not to be had.
    """
    runtime = settings.runtime_for(file_format)
    file = folder / next(iter(record.files))
    if settings.dtype is not torch.float32 and runtime != "openvino":
        raise ValueError(f"{runtime} runs {file} in float32; for dtype {settings.dtype} use OpenVINO, or PyTorch")
    return _OPENERS[runtime](file, record, settings)


@contextmanager
def no_reports_home() -> Iterator[None]:
    """Keep OpenVINO and NNCF, if they are imported in this context, from reporting their use over the network."""
    # Neither asks first, both decide while they are imported, and only in CI do they stay silent.
    settings = {"CI": "true", "NNCF_CI": "1"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _import(name: str, runtime: str) -> Any:
    try:
        with no_reports_home():
            return import_module(name)
    except ImportError as error:
        raise ValueError(
            f"the runtime {runtime} is not installed ({error}); install it with `pip install "
            f"'hf-segvit[{EXTRAS[runtime]}]'`"
        ) from error


def _open_onnxruntime(file: Path, record: GraphRecord, settings: RuntimeSettings) -> Graph:
    ort = _import("onnxruntime", "onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # its warnings are about its own optimisations
    if settings.threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = settings.threads, 1
    providers = _onnx_providers(settings.device or "cpu", ort.get_available_providers())
    try:
        session = ort.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # its classes have no common base but Exception
        raise _unreadable(file, "ONNX Runtime", ort.__version__, error) from error
    _check_names(file, record, [x.name for x in session.get_inputs()], [x.name for x in session.get_outputs()])

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        feed = {name: np.ascontiguousarray(value.numpy()) for name, value in inputs.items()}
        return [torch.from_numpy(output) for output in session.run(record.outputs, feed)]

    return run


def _onnx_providers(device: str, available: Sequence[str]) -> list[Any]:
    name, _, index = device.partition(":")
    if name == "cpu":
        return ["CPUExecutionProvider"]
    if name != "cuda" or (index and not index.isdigit()):
        raise ValueError(f"device {device!r}: ONNX Runtime runs on cpu, cuda or cuda:1 here")
    if "CUDAExecutionProvider" not in available:
        raise ValueError(
            f"device {device!r}: this ONNX Runtime has no CUDA; replace it with `pip install onnxruntime-gpu`, or use "
            "the device cpu"
        )
    return [("CUDAExecutionProvider", {"device_id": int(index or 0)}), "CPUExecutionProvider"]


def _open_openvino(file: Path, record: GraphRecord, settings: RuntimeSettings) -> Graph:
    openvino = _import("openvino", "openvino")
    core = openvino.Core()
    device = (settings.device or "cpu").upper()
    if device.partition(".")[0] not in {name.partition(".")[0] for name in core.available_devices}:
        raise ValueError(
            f"device {settings.device!r}: OpenVINO finds only {', '.join(core.available_devices).lower()} here"
        )
    # Its own default would be bfloat16 wherever the processor has it.
    precisions = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
    properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precisions[settings.dtype], "PERFORMANCE_HINT": "LATENCY"}
    if settings.threads is not None:
        properties["INFERENCE_NUM_THREADS"] = settings.threads
    try:
        model = core.read_model(file)
        names = [[port.get_any_name() for port in ports] for ports in (model.inputs, model.outputs)]
        _check_names(file, record, *names)
        compiled = core.compile_model(model, device, properties)
    except RuntimeError as error:
        raise _unreadable(file, "OpenVINO", openvino.__version__, error) from error

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        answers = compiled({name: np.ascontiguousarray(value.numpy()) for name, value in inputs.items()})
        # Copied, as the arrays are OpenVINO's own, which the next call overwrites.
        return [torch.from_numpy(np.array(answers[name])) for name in record.outputs]

    return run


def _open_aotinductor(file: Path, record: GraphRecord, settings: RuntimeSettings) -> Graph:
    if not settings.allow_native_code:
        raise ValueError(
            f"{file} is native code, which can do anything that you can; if you trust who made it, pass "
            "allow_native_code=True"
        )
    _only_cpu(settings, "aotinductor")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        package = torch._inductor.aoti_load_package(str(file))
    except Exception as error:  # whatever the loader of libraries raises
        raise _unreadable(file, "PyTorch", torch.__version__, error) from error

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        return list(package(*(inputs[name].contiguous() for name in record.inputs)))

    return run


def _open_executorch(file: Path, record: GraphRecord, settings: RuntimeSettings) -> Graph:
    runtime = _import("executorch.runtime", "executorch")
    _only_cpu(settings, "executorch")
    if settings.threads is not None:
        raise ValueError("ExecuTorch chooses its number of threads itself; leave threads out")
    try:
        program = runtime.Runtime.get().load_program(file)
        method = program.load_method("forward")
    except Exception as error:  # RuntimeError, MemoryError and others by the kind of damage
        raise _unreadable(file, "ExecuTorch", "installed", error) from error

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        # Cloned, as the tensors lie in memory that the next call overwrites.
        answers = method.execute([inputs[name].contiguous() for name in record.inputs])
        return [answer.clone() for answer in answers]

    run.program = program  # type: ignore[attr-defined] # a method does not keep its program alive
    return run


def _only_cpu(settings: RuntimeSettings, runtime: str) -> None:
    if settings.device not in (None, "cpu"):
        raise ValueError(f"device {settings.device!r}: the export for {runtime} was made for cpu")


def _check_names(file: Path, record: GraphRecord, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    if list(inputs) != record.inputs or not set(record.outputs) <= set(outputs):
        raise ValueError(
            f"{file} is another model: it takes {', '.join(inputs)} and gives {', '.join(outputs)}, but export.json "
            f"says {', '.join(record.inputs)} and {', '.join(record.outputs)}; export the model again"
        )


def _unreadable(file: Path, runtime: str, version: str, error: Exception) -> ValueError:
    text = str(error).strip() or type(error).__name__
    last = text.splitlines()[-1] if runtime == "OpenVINO" else text.splitlines()[0]
    last = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", last)
    # The words of ONNX Runtime and OpenVINO for a file from the future.
    newer = any(word in text for word in ("IR version", "ir_version", "pset", "IR with version"))
    remedy = (
        f"the file is newer than {runtime} {version}: update that, or export with a lower opset"
        if newer
        else "the file is damaged or of another kind; copy it again, or export the model again"
    )
    return ValueError(f"{runtime} {version} cannot open {file}: {last}; {remedy}")


_OPENERS = {
    "onnxruntime": _open_onnxruntime,
    "openvino": _open_openvino,
    "aotinductor": _open_aotinductor,
    "executorch": _open_executorch,
}
