"""The examples run, on little data, and do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from profit import layer_table

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_pytorch() -> None:
    found = load("plain_pytorch").main(epochs=2, limit=384)
    assert set(found) == {"full precision", "W4A4"} and found["W4A4"] > 20  # of ten classes, after so little


def test_lightning_callback() -> None:
    pytest.importorskip("lightning", reason="lightning is not installed (pip install lightning)")
    model, callback = load("lightning_callback").main(epochs=5, limit=256)
    assert {row.weight_bits for row in layer_table(model)} == {4}
    ranked = [layer for layer in model.modules() if getattr(layer, "ranked", False)]
    assert 0.5 < sum(layer.frozen for layer in ranked) / len(ranked) < 0.75 and callback.monitor is None


def test_timm_loop() -> None:
    found = load("timm_loop").main(epochs=2, limit=128)
    assert found["loss"] < 10 and 0 <= found["model"] <= 100 and 0 <= found["average"] <= 100
