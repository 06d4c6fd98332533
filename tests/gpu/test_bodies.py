"""The bodies of the GPU tests on the CPU: the same code, a few parameters, Triton under its interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import bodies
from tests.gpu.bodies import GEOMETRIES, HSWISH, OPERATORS, PLAIN
from tests.interpreter import round_as_a_device


@pytest.fixture(params=["auto", "triton"])
def backend(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        round_as_a_device(monkeypatch)  # the interpreter alone truncates to bfloat16
    return request.param


def needs(name: str, backend: str) -> None:
    reason = bodies.why_not(name, backend, "cpu", torch.float32)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("name", OPERATORS)
def test_compare(rng, name, backend):
    needs(name, backend)
    bodies.compare(name, backend, "cpu", torch.float32, "channels_last", rng, 4, GEOMETRIES["same"], HSWISH)
    bodies.compare(name, backend, "cpu", torch.bfloat16, "nchw", rng, 3, PLAIN, bodies.SIGNED)
    bodies.twice_the_same(name, backend, "cpu", rng)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "duq_codes"])
def test_one_graph_and_autocast(rng, name):
    bodies.compiled_in_one_graph(name, "auto", "cpu", rng, "aot_eager")
    bodies.under_autocast(name, "auto", "cpu", rng)


def test_training_step(rng, backend):
    if backend == "triton" and bodies.why_not("duq", backend, "cpu", torch.float32):
        pytest.skip(bodies.why_not("duq", backend, "cpu", torch.float32))
    bodies.training_step("cpu", backend, torch.float32, rng)


def test_a_wrong_result_is_seen(rng, monkeypatch):
    """The comparison is not blind: an operator that is off by two codes in one place in a hundred fails it."""
    made = bodies.OPERATORS["duq"][1](rng, 4, PLAIN, HSWISH)
    out, _ = bodies.evaluate(made, bodies.place(made, "cpu", torch.float32, "nchw"))
    wrong = out[0].clone()
    wrong.flatten()[::100] += 2 * made.step
    with pytest.raises(AssertionError, match="apart"):
        bodies.assert_near("duq", wrong, out[0], torch.float32, made.step)
