"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import zlib

import pytest
import torch

BASE_SEED = int(os.environ.get("PROFIT_TEST_SEED", "0"))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator of its own for each test and parameter; PROFIT_TEST_SEED moves them all to fresh data."""
    seed = zlib.crc32(f"{BASE_SEED}:{request.node.nodeid}".encode())
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def poisoned_empty():
    """torch.empty filled with NaN (or the largest integer), so that an element nobody wrote is seen."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)
