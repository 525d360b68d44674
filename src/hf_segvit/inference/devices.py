"""Choose and describe the device to compute on."""

import torch


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


def _remedy() -> str:
    return f"this machine has {', '.join(available_devices())}"
