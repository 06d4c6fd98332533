"""Bytes that every x86 processor multiplies exactly.

Without VNNI, onnxruntime multiplies unsigned by signed bytes with `vpmaddubsw`, which adds two products in 16 bits and
saturates: 2 * 255 * 127 > 32767. Unsigned by unsigned bytes are widened first and added in 32 bits (docs/export.md).
"""

from __future__ import annotations

from .network import ActivationCodes, Layer

INT16_MAX = 2**15 - 1


def stored(code: int, q: ActivationCodes) -> int:
    """An input's code as an unsigned byte: the smallest code is 0."""
    return code - q.low


def has_signed_weights(layer: Layer) -> bool:
    """Whether an integer layer's weights are signed bytes: with inputs of up to 7 bits no pair saturates, 2 * 127 * 127."""
    return 2 * stored(layer.codes.steps, layer.codes) * 127 <= INT16_MAX
