"""Re-estimated BatchNorm statistics against plain averages in numpy, and that nothing else changes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from profit.bn import reestimate_bn_
from profit.errors import CalibrationError
from tests import tolerances
from tests.profit.tiny_net import tiny_net


def small(rng):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.9), nn.ReLU(), nn.BatchNorm2d(4)
    )
    net[1].running_mean.normal_(generator=rng)
    net[4].running_var.fill_(7.0)
    return net


def batches_of(rng, sizes=(4, 4, 2)):
    return [(torch.randn(n, 3, 6, 6, generator=rng) * 2 + 1, torch.zeros(n)) for n in sizes]


@pytest.mark.parametrize("used", [2, 3, 10])
def test_plain_average_of_the_batches(rng, used):
    net, loader = small(rng), batches_of(rng)
    means, variances = [], []
    for x, _ in loader[:used]:
        y = net[0](x).detach().double().numpy()
        means.append(y.mean((0, 2, 3)))
        variances.append(y.var((0, 2, 3), ddof=1))
    assert reestimate_bn_(net, loader, used) == min(used, 3)
    np.testing.assert_allclose(net[1].running_mean.numpy(), np.mean(means, 0), **tolerances.CONV)
    np.testing.assert_allclose(net[1].running_var.numpy(), np.mean(variances, 0), **tolerances.CONV)
    # The second BatchNorm sees the first one's batch statistics and no dropout.
    first = net[0](loader[0][0])
    second = torch.relu(nn.functional.batch_norm(first, None, None, net[1].weight, net[1].bias, training=True))
    reestimate_bn_(net, loader, 1)
    torch.testing.assert_close(net[4].running_mean, second.detach().mean((0, 2, 3)), **tolerances.CONV)


@pytest.mark.parametrize("training", [True, False])
def test_everything_else_is_left_alone(rng, training):
    net = tiny_net(rng).train(training)
    net.bn2.eval()  # a mixed state has to come back as it was
    net.bn3.momentum = 0.01
    modes = {name: m.training for name, m in net.named_modules()}
    weights = {name: p.clone() for name, p in net.named_parameters()}
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    before = net.bn2.running_var.clone()
    reestimate_bn_(net, [torch.randn(4, 3, 8, 8, generator=rng) for _ in range(2)], 2)
    assert {name: m.training for name, m in net.named_modules()} == modes
    assert (net.bn1.momentum, net.bn3.momentum) == (0.1, 0.01)
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in net.named_parameters())
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    assert not torch.equal(net.bn2.running_var, before) and net.bn2.num_batches_tracked == 2


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "no batch"),
        (["path.png"], TypeError, "str"),
        ([torch.zeros(4, 2, 6, 6)], RuntimeError, "channels"),
        ([torch.full((4, 3, 6, 6), math.nan)], CalibrationError, "the input of '1' holds NaN or infinity"),
        ([torch.ones(4, 3, 6, 6), torch.full((4, 3, 6, 6), math.inf)], CalibrationError, "the input of '1' holds NaN"),
    ],
    ids=["empty", "text", "shape", "nan", "inf"],
)
def test_failures_leave_the_statistics(rng, loader, error, message):
    net = small(rng)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(error, match=message):
        reestimate_bn_(net, loader, 2)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net[1].momentum == 0.3 and net.training and net[2].training


def test_forms_of_a_batch(rng):
    net, x = small(rng), torch.randn(4, 3, 6, 6, generator=rng)
    found = []
    for batch in (x, (x, torch.zeros(4)), [x], {"input": x}):
        assert reestimate_bn_(net, [batch], 1) == 1
        found.append(net[1].running_var.clone())
    assert all(torch.equal(found[0], other) for other in found)


def test_wrong_arguments(rng):
    for batches in (0, 1.5, "8", True):
        with pytest.raises(ValueError, match="batches must be a whole number, at least 1; got"):
            reestimate_bn_(small(rng), batches_of(rng), batches)
    for model in (nn.Linear(3, 3), nn.BatchNorm2d(3, track_running_stats=False)):
        with pytest.raises(ValueError, match="no BatchNorm"):
            reestimate_bn_(model, [torch.zeros(2, 3)], 1)
