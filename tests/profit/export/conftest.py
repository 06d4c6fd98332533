"""One quantized net for all tests of a module: tracing takes seconds."""

from __future__ import annotations

import secrets

import pytest
import torch

from .nets import Edges, images, quantized, randomised


@pytest.fixture(scope="module")
def case():
    """(W4A4 net, its images), fresh in every run; nobody may change them."""
    rng = torch.Generator().manual_seed(secrets.randbelow(10**6))
    x = images(rng)
    return quantized(randomised(Edges(), rng), x), x
