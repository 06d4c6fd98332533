"""One quantized net for all tests of a module: tracing takes seconds."""

from __future__ import annotations

import pytest
import torch

from tests.seeds import seed_of

from .nets import Edges, images, quantized, randomised


@pytest.fixture(scope="module")
def case(request):
    """(W4A4 net, its images), fresh in every run; nobody may change them."""
    rng = torch.Generator().manual_seed(seed_of(request.node.nodeid))
    x = images(rng)
    return quantized(randomised(Edges(), rng), x), x
