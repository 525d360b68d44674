"""Choosing a device: the order of preference, and errors that name what there is."""

import pytest
import torch

from hf_segvit.inference.devices import available_devices, describe_device, pick_device


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
