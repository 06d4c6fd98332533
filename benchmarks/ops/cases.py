"""The cases of the suite ops: for every operator and shape, its variants and what each must agree with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import profit_kernels as pk
from profit.nn.quantizer import apply_activation
from profit_kernels.layer import levels

from ..harness import gates, peers, registry
from ..harness.children import WrongResult
from ..harness.data import BITS, backend_context, random_data, raw_interval
from ..harness.options import DTYPES, TOY_MODEL
from ..harness.registry import KINDS, Layer
from .block_cases import block
from .variants import Case, Variant, add_float, add_ours


def duq(shape: Sequence[int], kind: str, dtype: torch.dtype, device: str) -> Case:
    """DuQ with its activation on one tensor: read x, write y; then read g and x, write gx."""
    signed, offset, activation = KINDS[kind]
    x = random_data(shape, dtype, device, 2.0).requires_grad_()
    a, c = raw_interval(3.0, device), raw_interval(3.0, device)
    settings = {"bits": BITS, "signed": signed, "offset": offset, "activation": activation}
    size = "x".join(map(str, shape))
    grad = random_data(shape, dtype, device)
    name = f"duq {kind} {size} {str(dtype).removeprefix('torch.')}"
    moved = {"forward": 2, "backward": 3, "forward+backward": 5}
    case = Case(name, x.numel(), dtype, moved, [grad], [a, c])

    def gate(out, got, want_out, want) -> None:
        gates.codes(out[0], want_out[0], x, a, c, **settings)
        gates.relative_l2("the output", out[0], want_out[0], gates.RELATIVE[dtype])
        gates.gradients(("x", "a", "c"), got, want, grad)

    add_ours(case, ["duq"], lambda: [pk.duq_fake_quantize(x, a, c, **settings)], [x, a, c], gate, device)
    if activation != "none":
        add_float(case, lambda: [apply_activation(x, activation)], [x])

    s = levels(BITS, signed)
    low, high = (-s, s) if signed else (0, s)
    scale = torch.tensor([3.0 / s], device=device, requires_grad=True)
    zero = torch.tensor([round(-offset * s / 3.0)], device=device, dtype=torch.float32, requires_grad=True)

    def learnable() -> list[Tensor]:
        h = apply_activation(x, activation)
        return [torch._fake_quantize_learnable_per_tensor_affine(h, scale, zero, low, high, 1.0)]

    def near(out, got, want_out, want) -> None:
        gates.one_step(out[0], want_out[0], c, BITS, signed)

    case.variants["torch-learnable"] = Variant(learnable, [x, scale, zero], gate=near)
    for peer in peers.PEERS:
        if peers.why_missing(peer) is None:
            _add_peer(case, peer, x, activation, signed, device)
    return case


def _add_peer(case: Case, peer: str, x: Tensor, activation: str, signed: bool, device: str) -> None:
    """Activation and another library's quantizer, which need only be finite: it is not DuQ."""
    quantizer = peers.quantizer(peer, device, signed)
    for _ in range(3):  # Brevitas takes its first scale from data
        quantizer(apply_activation(x, activation))

    def finite(out, got, want_out, want) -> None:
        if not all(bool(t.isfinite().all()) for t in (*out, *got)):
            raise WrongResult(f"wrong result: {peer} gives a value that is not finite")

    leaves = [x, *(p for p in quantizer.parameters() if p.requires_grad)]
    case.variants[peer] = Variant(lambda: [quantizer(apply_activation(x, activation))], leaves, gate=finite)


def weights(net: str, px: int, device: str) -> Case:
    """All convolution weights of a network: in one call, and layer by layer."""
    shapes = registry.weight_shapes(net, px)
    ws = [random_data(shape, torch.float32, device, 0.1).requires_grad_() for shape in shapes]
    a, c = ([raw_interval(0.3, device) for _ in ws] for _ in range(2))
    grads = [random_data(shape, torch.float32, device) for shape in shapes]
    leaves = [*ws, *a, *c]
    numel = sum(w.numel() for w in ws)
    moved = {"forward": 2, "backward": 3, "forward+backward": 5}
    case = Case(f"weights {net}, {len(ws)} layers", numel, torch.float32, moved, grads, leaves)

    def gate(out, got, want_out, want) -> None:
        n = len(ws)
        for i in range(n):
            gates.codes(out[i], want_out[i], ws[i], a[i], c[i], bits=BITS, signed=True)
            triple = (i, n + i, 2 * n + i)
            gates.gradients(("w", "a", "c"), [got[j] for j in triple], [want[j] for j in triple], grads[i])

    def together() -> list[Tensor]:
        return pk.duq_fake_quantize_weights(ws, a, c, bits=BITS)

    def one_by_one() -> list[Tensor]:
        return [pk.duq_fake_quantize(*triple, bits=BITS, signed=True) for triple in zip(ws, a, c, strict=True)]

    ops = ["duq_weights", "duq"] if "duq_weights" in pk.dispatch.OPS else ["duq"]
    add_ours(case, ops, together, leaves, gate, device)
    case.variants["auto, layer by layer"] = Variant(one_by_one, leaves, backend_context("auto", pk.dispatch.OPS), gate)
    return case


def depthwise(layer: Layer, dtype: torch.dtype, device: str) -> Case:
    """Activation + DuQ + padding + depthwise convolution, the weight quantized too where the layer is large enough."""
    x = random_data(layer.shape, dtype, device, 2.0).requires_grad_()
    w = (torch.randn(layer.weight_shape, device=device) * 0.3).requires_grad_()
    weight_bits = BITS if layer.shape[2] >= registry.MIN_HEIGHT_WITH_WEIGHTS else None
    a, c, aw, cw = raw_interval(3.0, device), raw_interval(3.0, device), raw_interval(0.9, device), raw_interval(0.9, device)
    grad = random_data(layer.output_shape, dtype, device)
    geometry = {"stride": layer.stride, "padding": layer.padding}
    settings = {"act_bits": BITS, "weight_bits": weight_bits, "signed": layer.signed, "offset": layer.offset}
    settings |= {"activation": layer.activation, "pad_value": layer.pad_value}
    share = layer.output_numel / layer.input_numel
    moved = {"forward": 1 + share, "backward": 2 + share, "forward+backward": 3 + 2 * share}
    given = "" if weight_bits else ", weight given"
    name = f"depthwise {layer.label}{given} {str(dtype).removeprefix('torch.')}"
    leaves, names = [x, w, a, c], ["x", "w", "a", "c"]
    if weight_bits:
        leaves, names = [*leaves, aw, cw], [*names, "a_w", "c_w"]
    case = Case(name, x.numel(), dtype, moved, [grad], leaves[1:])

    def gate(out, got, want_out, want) -> None:
        gates.relative_l2("the output", out[0], want_out[0], gates.RELATIVE[dtype])
        gates.gradients(names, got, want, grad)

    intervals = (a, c, aw, cw) if weight_bits else (a, c, None, None)
    ops = ["duq_depthwise", "depthwise", "duq"]
    add_ours(case, ops, lambda: [pk.duq_depthwise_conv2d(x, w, *intervals, **geometry, **settings)], leaves, gate, device)

    def full_precision() -> list[Tensor]:
        h = apply_activation(x, layer.activation)
        left, right, top, bottom = layer.padding
        border = (top, left)
        if (top, left) != (bottom, right):
            h, border = F.pad(h, layer.padding), (0, 0)
        return [F.conv2d(h, w.to(dtype), None, layer.stride, border, groups=layer.groups)]

    add_float(case, full_precision, [x, w])
    return case


def makers(batch: int, px: int, device: str, dtypes: Sequence[str], toy: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """(name of the group, a function that builds a case), in the order of their weight, one at a time for the memory."""
    kinds = [DTYPES[name] for name in dtypes]
    nets = (TOY_MODEL,) if toy else registry.NETS
    found = registry.depthwise_layers(px, batch, nets)
    found = found[:: max(1, len(found) // 2)] if toy else found
    sizes = [found[0].shape] if toy else [found[0].shape, found[len(found) // 2].shape, found[-1].shape]
    for dtype in kinds:
        for kind in KINDS:
            yield "duq", lambda kind=kind, dtype=dtype: duq(sizes[0], kind, dtype, device)
    for shape in sizes[1:]:
        yield "duq", lambda shape=shape: duq(shape, "hardswish", kinds[0], device)
    for net in nets:
        yield "weights", lambda net=net: weights(net, px, device)
    for layer in found:
        for dtype in kinds:
            yield "depthwise", lambda layer=layer, dtype=dtype: depthwise(layer, dtype, device)
    pointwise = registry.pointwise_layers(px, batch, nets)
    for group, some in (("block", found), ("pointwise", pointwise[:1] if toy else pointwise)):
        for layer in some:
            for dtype in kinds:
                yield group, lambda layer=layer, dtype=dtype: block(layer, dtype, device)
