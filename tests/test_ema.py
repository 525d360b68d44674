"""The moving average of the weights against the recursion written out, swapping, and going on."""

import pytest
import torch
from torch import nn

from hf_segvit.training.ema import MovingAverage


def model():
    net = nn.Linear(3, 2)
    net.bias.requires_grad_(False)
    return net


def test_follows_the_recursion():
    net = model()
    average = MovingAverage(net, decay=0.9)
    expected = net.weight.detach().clone()
    for step in range(1, 200):
        with torch.no_grad():
            net.weight.add_(torch.randn(2, 3))
        average.update(net)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net.weight.detach()
    assert torch.allclose(average.tensors()["weight"], expected, atol=1e-5)  # float32, 200 sums
    assert average.tensors().keys() == {"weight"}, "what is frozen needs no average"


def test_is_put_in_and_taken_out():
    net = model()
    average = MovingAverage(net, decay=0.5)
    with torch.no_grad():
        net.weight.add_(1)
    current = net.weight.detach().clone()
    with average.applied_to(net):
        assert torch.equal(net.weight, average.tensors()["weight"])
        assert not torch.equal(net.weight, current)
    assert torch.equal(net.weight, current)
    with pytest.raises(KeyError, match="an error"), average.applied_to(net):
        raise KeyError("an error")
    assert torch.equal(net.weight, current), "also after an error"


def test_goes_on_as_if_nothing_had_happened():
    net = model()
    one = MovingAverage(net, decay=0.99)
    one.update(net)
    other = MovingAverage(nn.Linear(3, 2).requires_grad_(True), decay=0.99)
    with pytest.raises(ValueError, match="other parameters, such as bias"):
        other.restore(one.tensors(), one.steps)
    other = MovingAverage(model(), decay=0.99)
    other.restore(one.tensors(), one.steps)
    with torch.no_grad():
        net.weight.mul_(2)
    one.update(net)
    other.update(net)
    assert torch.equal(one.tensors()["weight"], other.tensors()["weight"])
    assert one.tensors()["weight"].data_ptr() != other.tensors()["weight"].data_ptr()


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_refuses_a_decay_that_forgets_nothing_or_all(decay):
    with pytest.raises(ValueError, match=r"give a number in \[0, 1\)"):
        MovingAverage(model(), decay)
