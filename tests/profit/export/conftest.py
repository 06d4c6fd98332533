"""One quantized net for all tests of a module: tracing takes seconds."""

from __future__ import annotations

import pytest
import torch

from profit.export.onnx_layers import MAX_BIAS_STEPS, rounded_bias_steps
from profit.export.trace import trace_network
from tests.seeds import seed_of

from .nets import Edges, images, quantized, randomised


@pytest.fixture(scope="module")
def case(request):
    """(W4A4 net, its images), fresh in every run; nobody may change them.

    Drawn again where factors are so large that both layers which can have integer sums in onnxruntime would be left float.
    """
    rng = torch.Generator().manual_seed(seed_of(request.node.nodeid))
    while True:
        x = images(rng)
        model = quantized(randomised(Edges(), rng), x)
        layers = trace_network(model, x).layers
        steps = [rounded_bias_steps(layers[one], layers[other]) for one, other in (("expand", "wide"), ("wide", "project"))]
        if min(steps) <= MAX_BIAS_STEPS:
            return model, x
