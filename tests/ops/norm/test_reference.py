"""The reference of BatchNorm and activation in one, against torch's functions through autograd, in float64."""

from __future__ import annotations

import copy

import pytest
import torch

import profit_kernels as pk
from tests import tolerances
from tests.ops.conv.cases import Case, sample
from tests.ops.conv.registered import registered as registered_operators
from tests.oracles import ACTIVATIONS


@pytest.fixture
def registered():
    with registered_operators():
        yield


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "hardswish"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("path", ["registered", "parts"])
def test_batch_norm_act(path, training, activation, rng, request):
    if path == "registered":
        request.getfixturevalue("registered")
    s = sample(Case("p"), rng, torch.float64)
    theirs = copy.deepcopy(s)
    with pk.use_backend("reference"):
        y = pk.batch_norm_act(s.x, s.gamma, s.beta, s.mean, s.var, training=training, momentum=0.3, activation=activation)
        v = torch.nn.functional.batch_norm(theirs.x, theirs.mean, theirs.var, theirs.gamma, theirs.beta, training, 0.3)
        expected = ACTIVATIONS[activation](v)
        g = torch.randn(y.shape, generator=rng, dtype=y.dtype)
        got = torch.autograd.grad(y, [s.x, s.gamma, s.beta], g)
        want = torch.autograd.grad(expected, [theirs.x, theirs.gamma, theirs.beta], g)
    for mine, other in zip((y, *got, s.mean, s.var), (expected, *want, theirs.mean, theirs.var), strict=True):
        torch.testing.assert_close(mine, other, **tolerances.TEXTBOOK[torch.float64])
    with pytest.raises(ValueError, match="activation must be one of"):
        pk.batch_norm_act(s.x, s.gamma, s.beta, s.mean, s.var, training=True, activation="silu")
