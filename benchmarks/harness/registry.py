"""What is measured: the operators by name, and the layer shapes of the networks, found by running them on the meta device."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

import profit
from profit_kernels import dispatch

from . import nets

NETS = ("mobilenetv2_100", "mobilenetv3_large_100")
# A folder of profit_kernels/ops -> the operators that it holds, as dispatch names them.
OPS = {
    "duq": ("duq", "duq_weights", "duq_codes"),
    "depthwise": ("depthwise", "duq_depthwise"),
    "aiwq": ("aiwq", "aiwq_conv"),
    "block": ("block",),
}
# Below this height per-layer weight quantization outweighs the convolution: there the weight is given, not quantized.
MIN_HEIGHT_WITH_WEIGHTS = 14

# Inputs of a quantizer: name -> (signed, offset, activation).
KINDS = {
    "hardswish": (False, -0.375, "hardswish"),
    "relu6": (False, 0.0, "relu6"),
    "signed": (True, 0.0, "none"),
}


@dataclass(frozen=True)
class Layer:
    """A convolution of a network as it runs there. `shape`: of its input, [N, C, H, W]; `padding`: (left, right, top,
    bottom); `signed`, `offset`, `activation`, `pad_value`: of its input quantizer and its border."""

    net: str
    name: str
    shape: tuple[int, int, int, int]
    out_channels: int
    kernel: int
    stride: int
    padding: tuple[int, int, int, int]
    groups: int
    signed: bool
    offset: float
    activation: str
    pad_value: float

    @property
    def depthwise(self) -> bool:
        return self.groups == self.shape[1] > 1

    @property
    def pointwise(self) -> bool:
        return self.kernel == 1 and self.groups == 1 and min(self.shape[2:]) > 1

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        n, _, height, width = self.shape
        left, right, top, bottom = self.padding
        out = ((size - self.kernel) // self.stride + 1 for size in (height + top + bottom, width + left + right))
        return n, self.out_channels, *out

    @property
    def input_numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def output_numel(self) -> int:
        return torch.Size(self.output_shape).numel()

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.out_channels, self.shape[1] // self.groups, self.kernel, self.kernel

    @property
    def label(self) -> str:
        """Geometry in words, the same for layers that are the same work."""
        n, channels, height, width = self.shape
        input_kind = self.activation if self.activation != "none" else ("signed" if self.signed else "given")
        if self.offset:
            input_kind += f"{self.offset:+g}" if self.activation != "hardswish" else ""
        kind = "" if self.depthwise else f" to {self.out_channels}"
        return f"{n}x{channels}x{height}x{width}{kind} k{self.kernel} s{self.stride} {input_kind}"


@functools.cache
def layers(net: str, px: int, batch: int) -> tuple[Layer, ...]:
    """Every convolution with a quantized input of a converted network, in the order in which they run."""
    with torch.device("meta"):
        model = nets.create(net)
        images = torch.empty(1, 3, px, px)
    seen: dict[str, tuple[int, ...]] = {}

    def note(name: str):
        return lambda module, args: seen.update({name: tuple(args[0].shape[1:])})

    # Conversion runs the model once, and these hooks with it.
    handles = [m.register_forward_pre_hook(note(n)) for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    profit.quantize_(model, profit.DuQConfig(weight_bits=None, act_bits=None), example_inputs=(images,))
    for handle in handles:
        handle.remove()
    convs = {name: m for name, m in profit.quant_layers(model).items() if isinstance(m, profit.QuantConv2d)}
    return tuple(
        Layer(
            net, name, (batch, *seen[name]), m.out_channels, m.kernel_size[0], m.stride[0],
            m.padding4(torch.empty(seen[name], device="meta")), m.groups, m.input_quantizer.signed,
            m.input_quantizer.offset, m.input_quantizer.activation, m.pad_value,
        )
        for name, m in convs.items()
        if m.input_quantizer.kind != "raw"
    )  # fmt: skip


def distinct(found: Iterable[Layer]) -> list[Layer]:
    """One layer of each geometry, the one with the largest input first."""
    unique = {replace(layer, net="", name=""): layer for layer in reversed(list(found))}
    return sorted(unique.values(), key=lambda layer: -layer.input_numel)


def depthwise_layers(px: int, batch: int, net_names: Iterable[str] = NETS) -> list[Layer]:
    """Every distinct depthwise layer of the networks."""
    return distinct(layer for net in net_names for layer in layers(net, px, batch) if layer.depthwise)


def pointwise_layers(px: int, batch: int, net_names: Iterable[str] = NETS) -> list[Layer]:
    """Every distinct pointwise layer of the networks (squeeze-and-excite left out)."""
    return distinct(layer for net in net_names for layer in layers(net, px, batch) if layer.pointwise)


def weight_shapes(net: str, px: int) -> list[tuple[int, ...]]:
    """Shapes of all convolution weights of a network with a quantized input."""
    return [layer.weight_shape for layer in layers(net, px, 1)]


def backends(op: str, device: str, dtype: torch.dtype) -> list[str]:
    """The backends besides the reference that can serve operator `op` (a name of dispatch.OPS) here."""
    return [b for b in dispatch.BACKENDS if b != "reference" and dispatch.why_not(op, b, device, dtype) is None]
