"""Choosing a device: the order of preference, and errors that name what there is."""

import pytest
import torch

from hf_segvit.inference import devices
from hf_segvit.inference.devices import available_devices, describe_device, pick_device, pick_dtype
from hf_segvit.models.cpu_kernels import CPUKernels, ProcessorFeatures


def test_the_best_device_is_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == pick_device("auto") == torch.device("cuda", 0)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert available_devices() == ["cuda:0", "cuda:1", "mps", "cpu"]
    assert pick_device() == torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"'cuda:2' is not there; this machine has cuda:0, cuda:1, mps, cpu"):
        pick_device("cuda:2")


def test_cpu_is_always_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")
    assert describe_device(pick_device("cpu")).startswith("cpu (")
    for name in ("cuda", "mps", "xpu"):
        with pytest.raises(ValueError, match=f"device '{name}' is not there; this machine has cpu"):
            pick_device(name)


def test_names_that_are_no_devices():
    with pytest.raises(ValueError, match="'toaster' is not a device that PyTorch knows"):
        pick_device("toaster")


@pytest.fixture
def said(monkeypatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(devices.logger, "warning_once", messages.append)
    return messages


@pytest.mark.parametrize(("fast", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_bfloat16_where_the_processor_is_faster_in_it_and_says_so(fast, chosen, said, monkeypatch):
    monkeypatch.setattr(devices, "KERNELS", CPUKernels(fast_bfloat16=fast))
    monkeypatch.setattr(devices, "processor_features", lambda: ProcessorFeatures(avx512=True, avx512_bf16=fast))
    assert pick_dtype("auto", torch.device("cpu")) == chosen
    [message] = said
    assert str(chosen).removeprefix("torch.") in message
    assert ("(AVX-512, AVX512-BF16)" if fast else "(AVX-512)") in message


@pytest.mark.parametrize(("capability", "chosen"), [((9, 0), torch.bfloat16), ((7, 5), torch.float32)])
def test_auto_asks_a_gpu_for_its_capability(capability, chosen, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Example GPU")
    cuda = torch.device("cuda", 0)
    assert pick_dtype("auto", cuda) == chosen
    assert "Example GPU" in said[0]
    if capability < (8, 0):
        with pytest.raises(ValueError, match="Example GPU has no bfloat16; take float16, float32 or auto"):
            pick_dtype("bfloat16", cuda)
    assert pick_dtype(torch.float16, cuda) == torch.float16
    assert len(said) == 1


def test_a_slow_type_is_never_taken_silently(said, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(devices, "KERNELS", CPUKernels(fast_bfloat16=True))
    assert pick_dtype("float32", cpu) == torch.float32
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    assert not said
    assert pick_dtype("float16", cpu) == torch.float16
    monkeypatch.setattr(devices, "KERNELS", CPUKernels())
    assert pick_dtype(torch.bfloat16, cpu) == torch.bfloat16
    assert [message.split(" on this")[0] for message in said] == [
        "dtype float16 is slower than float32",
        "dtype bfloat16 is slower than float32",
    ]
    with pytest.raises(ValueError, match="dtype 'half' is not one of auto, float32, bfloat16, float16"):
        pick_dtype("half", cpu)
