"""Schema, registrations and public entry of DuQ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ... import dispatch
from ...layer import check_quantizer, check_settings
from ...registration import differentiable, differentiable_lists, operator
from . import reference

_SETTINGS = "int bits, bool signed, float offset, str activation"


def _duq(tensors, settings):
    return dispatch.serving(__package__, "duq", tensors[0]).forward(*tensors, *settings)


def _duq_backward(grad, tensors, settings, needed):
    return dispatch.serving(__package__, "duq", tensors[0]).backward(grad, *tensors, *settings)


_apply = differentiable(
    "duq", f"Tensor x, Tensor a, Tensor c, {_SETTINGS}", _duq, _duq_backward,
    fake=lambda tensors, settings: torch.empty_like(tensors[0]),
    fake_backward=lambda grad, tensors, settings, needed: tuple(torch.empty_like(t) for t in tensors),
    gradients="x a c", public="duq_fake_quantize",
)  # fmt: skip


def _codes(tensors, settings):
    return dispatch.serving(__package__, "duq_codes", tensors[0]).codes(*tensors, *settings)


def _fake_codes(tensors, settings):
    _, signed, *_ = settings
    return torch.empty_like(tensors[0], dtype=torch.int8 if signed else torch.uint8)


_apply_codes = operator("duq_codes", f"Tensor x, Tensor a, {_SETTINGS}", "Tensor", _codes, _fake_codes)


def _serving_weights(weights):
    return dispatch.serving(__package__, "duq_weights", weights[0], triton="weights_launch")


def _weights(weights, *rest):
    return _serving_weights(weights).weights_forward(weights, *rest)


def _weights_backward(grads, weights, *rest):
    return _serving_weights(weights).weights_backward(grads, weights, *rest)


_apply_weights = differentiable_lists(
    "duq_weights", "Tensor[] weights, Tensor[] a, Tensor[] c, int[] bits", _weights, _weights_backward,
    lists=3, public="duq_fake_quantize_weights",
)  # fmt: skip


def duq_fake_quantize(
    x: Tensor, a: Tensor, c: Tensor, *, bits: int, signed: bool = False, offset: float = 0.0, activation: str = "none"
) -> Tensor:
    """Quantize and dequantize `act(x)` with DuQ; differentiable in x, a and c.

    Args:
        x: any shape, float32, bfloat16, float16 (computed in float32) or float64. Non-contiguous and empty are fine.
        a, c: raw clipping interval and raw scale, A = softplus(a) and C = softplus(c); one value, or one per index of
            dimension 0 of x (weights: per output channel). float32, or float64 with float64 x.
        bits: 2 to 8.
        signed: codes from -(2^(bits-1) - 1) to 2^(bits-1) - 1, else 0 to 2^bits - 1.
        offset: the lower bound d <= 0 of the input, such as -0.375 for h-swish; unsigned only.
        activation: "none", "relu", "relu6" or "hardswish", applied to x first.

    Returns:
        C * q + d, with the shape, dtype and memory format of x. NaN stays NaN; infinities clip.

    Raises:
        ValueError, TypeError: an argument out of its range. BackendError: the backend asked for cannot serve the call.

    Source: PROFIT (Park & Yoo, ECCV 2020), section 4.1; the gradients are in docs/maths.md, section 1.
    Under autocast x is taken in the dtype it comes in, and a, c stay in float32.
    """
    check_settings("duq_fake_quantize", signed, offset, activation)
    check_quantizer("duq_fake_quantize", x, bits, a=a, c=c)
    if dispatch.choose("duq", x) == "reference":  # plain PyTorch, so that torch.compile can fuse it
        return reference.duq(x, a, c, bits, signed, offset, activation)
    return _apply(x, a, c, bits, signed, offset, activation)


def duq_codes(
    x: Tensor, a: Tensor, *, bits: int, signed: bool = False, offset: float = 0.0, activation: str = "none"
) -> Tensor:
    """The integer codes round(u * s) of `duq_fake_quantize`, as int8 (signed) or uint8; not differentiable.

    Arguments as there. Raises ValueError if the input holds NaN, which has no code.
    """
    check_settings("duq_codes", signed, offset, activation)
    check_quantizer("duq_codes", x, bits, a=a)
    return _apply_codes(x, a, bits, signed, offset, activation)


def duq_fake_quantize_weights(
    weights: Sequence[Tensor], a: Sequence[Tensor], c: Sequence[Tensor], *, bits: int | Sequence[int]
) -> list[Tensor]:
    """Signed DuQ of all weights of a net at once: one kernel launch for all of them where the backend has one.

    Args:
        weights: float tensors of any shapes, with the output channels in dimension 0; of any number of dtypes and devices.
        a, c: raw interval and scale of each weight, one value, or one per output channel.
        bits: one width from 2 to 8, or one per weight.

    Returns: the quantized weights, each like its weight (shape, dtype, memory format); differentiable in all tensors.
    Raises: as duq_fake_quantize, and ValueError where the lists differ in length.
    """
    op = "duq_fake_quantize_weights"
    for name, values in (("weights", weights), ("a", a), ("c", c)):
        if isinstance(values, Tensor) or not isinstance(values, Iterable):
            raise TypeError(f"{op}: {name} must be a list of tensors, got {type(values).__name__}")
    widths = list(bits) if isinstance(bits, (list, tuple)) else [bits] * len(weights)
    if not len(weights) == len(a) == len(c) == len(widths):
        raise ValueError(
            f"{op}: weights, a, c and bits must have one length, got {len(weights)}, {len(a)}, {len(c)} and {len(widths)}"
        )
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, w in enumerate(weights):
        check_quantizer(f"{op}: weight {i}", w, widths[i], a=a[i], c=c[i])
        groups.setdefault((w.device, w.dtype), []).append(i)
    result: list[Tensor] = list(weights)
    for members in groups.values():
        for i, q in zip(members, _quantize_group(*([s[i] for i in members] for s in (weights, a, c, widths))), strict=True):
            result[i] = q
    return result


def _quantize_group(weights: list[Tensor], a: list[Tensor], c: list[Tensor], bits: list[int]) -> list[Tensor]:
    """Weights of one device and dtype."""
    if dispatch.choose("duq_weights", weights[0]) == "reference":
        # No kernel for lists here: one by one, each on the backend that serves it best.
        rows = zip(weights, a, c, bits, strict=True)
        return [duq_fake_quantize(w, a_i, c_i, bits=k, signed=True) for w, a_i, c_i, k in rows]
    return _apply_weights(weights, a, c, bits)
