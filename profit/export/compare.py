"""Comparing codes layer by layer, each layer on the same codes in front of it, so that one difference does not make others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from profit_kernels.testing import BAND_ULPS

from ..nn import QuantConv2d, QuantLayer
from ..nn.quantizer import inverse_softplus
from ..quantize import quant_layers
from .layers import positive, weight_codes
from .network import Layer, Network
from .runtime import AtCodes, scaled
from .trace import plain_copy

# (name of a layer's run) -> int32 codes
Codes = dict[str, Tensor]


@dataclass
class LayerDifference:
    """Codes of one layer's input from two sides.

    `inside` counts the codes within 4 ulp (float32) of a rounding edge; `differing_inside` and `differing_outside` those that
    differ. `farthest` is the largest distance of a differing one from a rounding edge, in steps: where the two sides differ
    by rounding alone it is tiny, and 0.5 is the most there can be.
    """

    name: str
    bits: str
    codes: int = 0
    inside: int = 0
    differing_inside: int = 0
    differing_outside: int = 0
    farthest: float = 0.0

    @property
    def differing(self) -> int:
        return self.differing_inside + self.differing_outside


@dataclass
class Comparison:
    """All layers of a network, from two sides. `allowed` is how far from an edge, in steps, the two may differ by rounding
    (for one layer, where it is not the common value); None allows differences inside the band only."""

    what: str
    allowed: float | None
    allowed_at: Mapping[str, float] = field(default_factory=dict)
    layers: dict[str, LayerDifference] = field(default_factory=dict)

    def add(self, run: str, layer: Layer, x: Tensor, one: Tensor, other: Tensor) -> None:
        """Count the differences between the codes `one` and `other` of `x`, the layer's float64 input."""
        row = self.layers.setdefault(run, LayerDifference(run, layer.bits))
        v = scaled(x, layer.codes, layer.activation).double()
        distance = (v - (v.floor() + 0.5)).abs()
        single = v.float()
        ulp = (torch.nextafter(single.abs(), torch.full_like(single, torch.inf)) - single.abs()).double()
        inside = distance <= BAND_ULPS * ulp
        # Two codes apart is no rounding, wherever the value lies.
        gap = (one.long() - other.long()).abs()
        differs = gap > 0
        row.codes += v.numel()
        row.inside += int(inside.sum())
        row.differing_inside += int((differs & inside & (gap == 1)).sum())
        row.differing_outside += int((differs & ~(inside & (gap == 1))).sum())
        if bool(differs.any()):
            row.farthest = max(row.farthest, float(torch.where(gap > 1, 0.5, distance)[differs].max()))

    def failures(self) -> list[LayerDifference]:
        """The layers whose codes differ where rounding does not explain it."""
        if self.allowed is None:
            return [row for row in self.layers.values() if row.differing_outside]
        return [row for row in self.layers.values() if row.farthest > self.allowed_at.get(row.name, self.allowed)]

    def total(self, what: str) -> int:
        """The sum of one count over all layers."""
        return sum(getattr(row, what) for row in self.layers.values())

    @property
    def farthest(self) -> float:
        return max((row.farthest for row in self.layers.values()), default=0.0)


def compare_runtime(comparison: Comparison, given: Codes, layers: Mapping[str, Layer]) -> AtCodes:
    """An `at_codes` for the runtime: compares its codes with the given ones and goes on with those."""

    def at_codes(run: str, x: Tensor, codes: Tensor) -> Tensor:
        comparison.add(run, layers[run], x, codes, given[run])
        return given[run]

    return at_codes


def layers_by_run(network: Network) -> dict[str, Layer]:
    """The layers whose input is quantized, by the name of their run."""
    return {run: layer for run, _, layer in network.layer_runs() if layer.codes is not None}


@torch.no_grad()
def model_codes(model: nn.Module, images: Tensor) -> tuple[Tensor, Codes]:
    """(output, codes of every quantized layer's input) of a converted model, read off what its quantizers really give."""
    codes: Codes = {}
    handles = []

    def watch(name: str, layer: QuantLayer) -> None:
        quantizer = layer.input_quantizer
        runs = [0]

        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            runs[0] += 1
            steps = 2 ** (quantizer.bits - 1) - 1 if quantizer.signed else 2**quantizer.bits - 1
            x = layer.after_norm(inputs[0]) if isinstance(layer, QuantConv2d) else inputs[0]
            y = quantizer.fake_quantize(x).double().cpu()
            scale = F.softplus(quantizer.c.cpu()) if quantizer.c.dtype == torch.float64 else positive(quantizer.c)
            code = torch.round((y - quantizer.offset) * (steps / scale))
            codes[name if runs[0] == 1 else f"{name}#{runs[0]}"] = code.to(torch.int32)

        handles.append(layer.register_forward_pre_hook(before))

    try:
        for name, layer in quant_layers(model).items():
            if layer.input_quantizer.bits is not None:
                watch(name, layer)
        return model(images), codes
    finally:
        for handle in handles:
            handle.remove()


def exact_copy(model: nn.Module) -> nn.Module:
    """The same network computed in float64: its float32 intervals and weight codes, without the rounding of float32 sums."""
    exact = plain_copy(model)
    for name, layer in quant_layers(exact).items():
        w = layer.weight_quantizer
        if w.bits is not None:
            codes, _ = weight_codes(layer, name)
            interval = positive(w.a).view(-1, *[1] * (codes.dim() - 1))
            centres = codes.double() * interval / (2 ** (w.bits - 1) - 1)
        values = {(q, p): positive(getattr(q, p)) for q in (layer.input_quantizer, w) for p in ("a", "c")}
        layer.double()
        for (quantizer, p), value in values.items():
            getattr(quantizer, p).data = inverse_softplus(value)
        if w.bits is not None:
            layer.weight.data = centres
        layer.refresh_cache()
    return exact.double()
