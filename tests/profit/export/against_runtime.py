"""onnxruntime against the integer runtime."""

from __future__ import annotations

from profit.export.compare import Comparison, layers_by_run
from profit.export.onnx_layers import FLOAT32_STEPS
from profit.export.onnx_runtime import codes_on, session, with_given_codes
from profit.export.runtime import IntegerRuntime


def compared(network, x, proto, allowed=None):
    """The codes of all layers, every layer on the same codes."""
    codes, inputs = {}, {}

    def keep(name, value, own):
        codes[name], inputs[name] = own, value
        return own

    IntegerRuntime(network)(x, keep)
    running = session(with_given_codes(proto, {name: tuple(c.shape) for name, c in codes.items()}))
    comparison, layers = Comparison("onnxruntime", FLOAT32_STEPS, allowed or {}), layers_by_run(network)
    for name, own in codes_on(running, x, codes).items():
        comparison.add(name, layers[name], inputs[name], own, codes[name])
    assert set(comparison.layers) == set(layers) and not comparison.failures()
    return comparison
