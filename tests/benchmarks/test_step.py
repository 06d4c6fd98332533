"""The suite step: a step or a layer that differs from the reference gets no figure."""

from __future__ import annotations

import pytest
import torch

import profit
from benchmarks.harness import options
from benchmarks.harness.children import WrongResult
from benchmarks.step import checks, jobs
from profit_kernels import dispatch
from profit_kernels.ops.duq import cpp


def test_a_wrong_step_is_seen(monkeypatch):
    job = jobs.Job("auto", options.TOY_MODEL, 8, 32, "cpu", "fp32", 1)
    images, labels = jobs.example(job)
    model = jobs.build(job, images)
    with jobs.backend_for("auto", "cpu"):
        compared = checks.check(job, model, model, images, labels)
        assert "53 layers compared" in compared
        with pytest.raises(WrongResult, match="loss .* in the eager reference"):
            checks.check(job, model, lambda x: model(x) * 2, images, labels)


def test_a_wrong_layer_is_seen(monkeypatch):
    """An operator that is right by the reference and a hundredth off by C++ in its gradient."""
    job = jobs.Job("auto", options.TOY_MODEL, 8, 32, "cpu", "fp32", 1)
    images, labels = jobs.example(job)
    model = jobs.build(job, images)
    right = cpp.backward
    monkeypatch.setattr(cpp, "backward", lambda g, *rest: (1.01 * right(g, *rest)[0], *right(g, *rest)[1:]))
    if dispatch.why_not("duq", "cpp", "cpu", torch.float32):
        pytest.skip(dispatch.why_not("duq", "cpp", "cpu", torch.float32))
    with pytest.raises(WrongResult, match="the gradient of .* from the reference"):
        checks.check_layers(model, profit.quant_layers(model), images, job)
