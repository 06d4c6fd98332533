"""Tests marked `gpu` are skipped, with the reason, where there is no GPU; they are never left out of the collection."""

from __future__ import annotations

import pytest
import torch

WHY_NOT = None if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA GPU here"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if WHY_NOT is not None and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=WHY_NOT))


@pytest.fixture(autouse=True)
def exact_convolutions():
    """No TF32 in the convolutions that the operators are compared with."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
