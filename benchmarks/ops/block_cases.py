"""The cases of the block operator: BatchNorm, activation, DuQ and a convolution as one, and one after the other."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import profit_kernels as pk
from profit.nn.quantizer import apply_activation

from ..harness import gates, registry
from ..harness.data import BITS, backend_context, random_data, raw_interval
from ..harness.registry import Layer
from .variants import Case, Variant, add_float, add_ours

EPS = 1e-5
# The dtype in which a gate computes what one layer should give.
WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
UNFUSED = "auto, unfused"


def block(layer: Layer, dtype: torch.dtype, device: str) -> Case:
    """A layer with the BatchNorm (statistics of the batch) in front of it; the weight as in `cases.depthwise`.

    The floor: BatchNorm needs all of x before it can give one value, and its backward all of g and x before it can give one
    gradient, so each direction reads them twice.
    """
    x = random_data(layer.shape, dtype, device, 2.0).requires_grad_()
    channels = layer.shape[1]
    gamma = torch.full((channels,), 2.0, device=device, requires_grad=True)
    beta = torch.zeros(channels, device=device, requires_grad=True)
    w = (torch.randn(layer.weight_shape, device=device) * 0.3).requires_grad_()
    weight_bits = BITS if layer.shape[2] >= registry.MIN_HEIGHT_WITH_WEIGHTS else None
    a, c, aw, cw = (raw_interval(value, device) for value in (3.0, 3.0, 0.9, 0.9))
    if weight_bits is None:  # as the model gives it, quantized with all others at the start of its forward
        w = pk.duq_fake_quantize(w, aw, cw, bits=BITS, signed=True).detach().requires_grad_()
    intervals = (a, c, aw, cw) if weight_bits else (a, c, None, None)
    leaves, names = [x, gamma, beta, w, a, c], ["x", "gamma", "beta", "w", "a", "c"]
    if weight_bits:
        leaves, names = [*leaves, aw, cw], [*names, "a_w", "c_w"]
    grad = random_data(layer.output_shape, dtype, device)
    share = layer.output_numel / layer.input_numel
    moved = {"forward": 2 + share, "backward": 3 + 2 * share, "forward+backward": 5 + 3 * share}
    given = "" if weight_bits else ", weight given"
    name = f"block {layer.label}{given} {str(dtype).removeprefix('torch.')}"
    case = Case(name, x.numel(), dtype, moved, [grad], leaves[1:])
    settings = {
        "act_bits": BITS, "weight_bits": weight_bits, "signed": layer.signed, "offset": layer.offset,
        "activation": layer.activation, "pad_value": layer.pad_value, "stride": layer.stride, "padding": layer.padding,
    }  # fmt: skip

    if not layer.depthwise:
        settings["weight_codes"] = None if weight_bits else (cw.detach(), BITS)

    def gate(out, got, want_out, want) -> None:
        gates.relative_l2("the output", out[0], want_out[0], gates.LAYER[dtype])
        gates.gradients(names, got, want, grad, gates.LAYER[dtype])

    def block_of(x: Tensor, gamma: Tensor, beta: Tensor, w: Tensor, *raw: Tensor) -> Tensor:
        raws = raw if weight_bits else (*raw, None, None)
        return pk.block_conv2d(
            x, gamma, beta, None, None, w, *raws, training=True, eps=EPS, groups=layer.groups, **settings
        )

    def fused() -> list[Tensor]:
        return [block_of(*leaves)]

    @functools.cache
    def in_wider() -> tuple[Tensor, tuple[Tensor, ...]]:
        wide = [leaf.detach().to(WIDER[dtype]).requires_grad_() for leaf in leaves]
        with pk.use_backend("reference"):
            y = block_of(*wide)
        exact = torch.autograd.grad(y, wide, grad.to(y.dtype))
        return y.detach().to(dtype), tuple(g.to(leaf.dtype) for g, leaf in zip(exact, leaves, strict=True))

    def gate_in_wider(out, got, want_out, want) -> None:
        """The reference takes BatchNorm from torch, which rounds more than the kernels do: over 65536 values in float32 it
        moved codes, its output was 4e-4 from float64 and its gradients up to 1e-2, a kernel's 3e-8 and 2e-5; in bfloat16 its
        gradient of gamma was 0.09 from float32, the block's 0.002."""
        y, exact = in_wider()
        gate(out, got, [y], exact)

    def norm() -> Tensor:
        return F.batch_norm(x, None, None, gamma, beta, True, 0.1, EPS)

    add_ours(case, ["block", "duq", "duq_depthwise", "depthwise"], fused, leaves, gate, device)
    for name in [name for name in case.variants if name != "reference-eager"]:
        if dtype == torch.float32 or not name.startswith("reference"):
            case.variants[name] = replace(case.variants[name], gate=gate_in_wider)
    behind = pk.duq_depthwise_conv2d if layer.depthwise else pk.duq_conv2d
    unfused = lambda: [behind(norm(), w, *intervals, **settings)]  # noqa: E731
    case.variants[UNFUSED] = Variant(unfused, leaves, backend_context("auto", pk.dispatch.OPS), gate)

    def full_precision() -> list[Tensor]:
        left, right, top, bottom = layer.padding
        h, border = apply_activation(norm(), layer.activation), (top, left)
        if (top, left) != (bottom, right):
            h, border = F.pad(h, layer.padding), (0, 0)
        return [F.conv2d(h, w.to(dtype), None, layer.stride, border, groups=layer.groups)]

    add_float(case, full_precision, [x, gamma, beta, w])
    return case
