"""AIWQMonitor against hand-written loops, the golden vectors and the table of differences between its two modes."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from profit.aiwq import AIWQMonitor
from profit.errors import TrainingError
from profit.nn.baselines import LSQInput, LSQWeight
from profit.nn.conv import QuantConv2d
from tests import golden, tolerances
from tests.oracles import gaussian_kl
from tests.profit.tiny_net import batch, conv, tiny_net, train_step

RANKED = ["stem", "dw", "pw"]


def sgd(net, lr=0.3):
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)


def old_output(layer, x, weight, pad_value):
    """What `layer` would have given with `weight`, in float64 on the quantized input."""
    quantized = layer.input_quantizer(x).detach().double()
    padded = F.pad(quantized, layer.padding4(x), value=pad_value)
    return F.conv2d(padded, weight.double(), None, layer.stride, 0, layer.dilation, layer.groups)


def watch(net, seen):
    """Record input and output of every ranked layer in `seen`."""
    for name in RANKED:
        getattr(net, name).register_forward_hook(lambda m, args, y, name=name: seen.update({name: (args[0], y)}))


def quantized_weights(net):
    return {name: layer.weight_quantizer(layer.weight).detach().clone() for name in RANKED if (layer := getattr(net, name))}


@pytest.mark.parametrize("every", [1, 3])
def test_running_mean_equals_a_hand_written_loop(rng, every):
    net, decay = tiny_net(rng), 0.9
    optimizer, seen = sgd(net), {}
    watch(net, seen)
    monitor = AIWQMonitor(net, every=every, decay=decay)
    mean, samples, clamped, previous = dict.fromkeys(RANKED, 0.0), 0, 0, None
    for t in range(10):
        weights = quantized_weights(net)
        train_step(net, optimizer, *batch(rng))
        if previous is not None and t % every == 0:
            samples += 1
            for name in RANKED:
                layer, (x, y) = getattr(net, name), seen[name]
                # The input interval has moved with the step: take the one of the forward pass.
                kl = gaussian_kl(y.detach().double().numpy(), seen_old[name](previous[name]).numpy())
                clamped += int((kl > 1).sum())
                mean[name] = decay * mean[name] + (1 - decay) * np.minimum(kl, 1).mean()
        previous = weights
        # Freeze the inputs of the next iteration's comparison before the optimizer can change the quantizers.
        seen_old = {}
        for name in RANKED:
            getattr(net, name).register_forward_pre_hook(
                lambda m, args, name=name: seen_old.update({name: _comparer(m, args[0])})
            )
        monitor.step()
    assert list(monitor.running_means()) == RANKED
    assert set(monitor.samples().values()) == {samples}
    assert monitor.clamped == clamped and monitor.skipped == 0 and monitor.steps == 10
    for name, value in monitor.running_means().items():
        assert value > 1e-7
        np.testing.assert_allclose(value, mean[name], **tolerances.KL_CONV)
        np.testing.assert_allclose(
            monitor.scores()[name], mean[name] / (1 - decay**samples), **tolerances.KL_CONV
        )


def _comparer(layer, x):
    quantized = layer.input_quantizer(x).detach().double()
    padded = F.pad(quantized, layer.padding4(x), value=layer.pad_value)
    return lambda weight: F.conv2d(padded, weight.double(), None, layer.stride, 0, layer.dilation, layer.groups)
