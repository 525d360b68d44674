"""Choose and describe the device and the floating-point type to compute in."""

import torch
from transformers.utils import logging

from ..models.cpu_kernels import KERNELS, processor_features

logger = logging.get_logger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(requested: str | torch.device | None = None) -> torch.device:
    """The device asked for, with an index if it is CUDA; `None` or `auto` chooses CUDA, then MPS, then the CPU.

    Raises:
        ValueError: this machine has no such device; the message names those it has.
    """
    if isinstance(requested, torch.device):
        return requested
    if requested is None or requested == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return pick_device(name)
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise ValueError(f"device {requested!r} is not a device that PyTorch knows; {_remedy()}") from error
    if device.type == "cuda":
        index = 0 if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"device {requested!r} is not there; {_remedy()}")
        return torch.device("cuda", index)
    # PyTorch knows names of devices that this build or machine lacks; only an allocation tells.
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {requested!r} is not there; {_remedy()}") from error
    if device.type == "meta":  # allocates without memory, so the check above lets it pass
        raise ValueError(f"device {requested!r} computes nothing; {_remedy()}")
    return device


def available_devices() -> list[str]:
    """Names of this machine's devices, the best first."""
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return [*names, "cpu"]


def describe_device(device: torch.device) -> str:
    """A device for people: its name, and the model of a GPU or the number of threads of a CPU."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({threads} thread{'s' if threads != 1 else ''})"
    return str(device)


def pick_dtype(requested: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The type of the weights; a choice, or that another would be faster, is said on stderr, once.

    `"auto"` is bfloat16 where that is faster: on GPUs that have it, and on CPUs with instructions for it (AVX512-BF16,
    AMX); else float32. float16 is never chosen, because it overflows in some models.

    Raises:
        ValueError: there is no such type, or the device lacks it.
    """
    if isinstance(requested, str) and requested not in ("auto", *DTYPES):
        raise ValueError(f"dtype {requested!r} is not one of auto, {', '.join(DTYPES)}")
    if requested == "auto":
        dtype = torch.bfloat16 if _has_fast_bfloat16(device) else torch.float32
        why = "faster here" if dtype == torch.bfloat16 else "as bfloat16 is not known to be faster here"
        logger.warning_once(f"dtype auto: weights in {_name(dtype)}, {why} ({_what_it_has(device)})")
        return dtype
    dtype = DTYPES[requested] if isinstance(requested, str) else requested
    if device.type == "cuda" and dtype == torch.bfloat16 and not _has_fast_bfloat16(device):
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no bfloat16; take float16, float32 or auto")
    if device.type not in ("cpu", "cuda"):
        try:
            torch.ones(1, dtype=dtype, device=device) * 2
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{device} has no {_name(dtype)} ({error}); take float32 or auto") from error
    if device.type == "cpu" and (dtype == torch.float16 or (dtype == torch.bfloat16 and not KERNELS.fast_bfloat16)):
        logger.warning_once(
            f"dtype {_name(dtype)} is slower than float32 on this processor ({processor_features()}); auto takes what "
            "is fastest"
        )
    return dtype


def _has_fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # older GPUs emulate it
    return device.type == "cpu" and KERNELS.fast_bfloat16


def _what_it_has(device: torch.device) -> str:
    return str(processor_features()) if device.type == "cpu" else describe_device(device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _remedy() -> str:
    return f"this machine has {', '.join(available_devices())}"
