"""Every kernel once on small, odd shapes, for compute-sanitizer: it looks at the accesses, not at the results."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import bodies
from tests.gpu.bodies import GEOMETRIES, HSWISH, OPERATORS


@pytest.mark.gpu
@pytest.mark.parametrize("geometry", ["k3s2", "same"])
@pytest.mark.parametrize("name", OPERATORS)
def test_runs(rng, name, geometry):
    for dtype in (torch.float32, torch.bfloat16):
        sample = OPERATORS[name][1](rng, 4, GEOMETRIES[geometry], HSWISH)
        out, grads = bodies.evaluate(sample, bodies.place(sample, "cuda", dtype, "channels_last"))
        assert all(bool(t.isfinite().all()) for t in (*out, *grads))
