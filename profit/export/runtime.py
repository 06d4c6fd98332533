"""A small runtime for exported networks in plain PyTorch: integer convolutions with 32-bit sums, and nothing from training.

It serves as the truth for other runtimes, not for speed. Between the layers it computes in float64 by default, so that the
only rounding in the whole network is that of the quantizers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import brief
from ..errors import ExportError
from .network import ActivationCodes, Layer, Network
from .operators import OPERATORS

# (name of the layer's run, its input before the activation, int32 codes) -> the codes to go on with
AtCodes = Callable[[str, Tensor, Tensor], Tensor]


def activate(x: Tensor, activation: str) -> Tensor:
    """act(x) for the activations that a quantizer may hold."""
    if activation == "relu":
        return F.relu(x)
    if activation == "relu6":
        return F.relu6(x)
    if activation == "hardswish":  # -inf gives 0, as in training, where x * relu6(x + 3) would be NaN
        return x.clamp(min=-3.0) * F.relu6(x + 3.0) / 6.0
    return x


def scaled(x: Tensor, quantizer: ActivationCodes, activation: str) -> Tensor:
    """clip((act(x) - d) / A, lo, 1) * s: what is rounded."""
    u = (activate(x, activation) - quantizer.offset) / quantizer.interval
    return u.clamp(-1.0 if quantizer.signed else 0.0, 1.0) * quantizer.steps


def quantize(x: Tensor, layer: Layer) -> Tensor:
    """int32 codes of a layer's input. Raises ExportError for NaN, which has no code."""
    v = scaled(x, layer.codes, layer.activation)
    if bool(v.isnan().any()):
        raise ExportError(f"layer {layer.name!r}: its input holds NaN, which has no integer code")
    return torch.round(v).to(torch.int32)


def convolve(x: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """The plain sum of products, in the dtype of x and weight; integers stay integers."""
    if layer.type == "linear":
        return F.linear(x, weight)
    padded = F.pad(x, layer.pads, value=layer.pad_value)
    return F.conv2d(padded, _spread(weight, layer.dilation), None, layer.stride, 0, 1, layer.groups)


def _spread(weight: Tensor, dilation: tuple[int, int]) -> Tensor:
    """The filter with zeros between its taps: PyTorch has no dilated convolution of integers."""
    if dilation == (1, 1):
        return weight
    (dh, dw), (kh, kw) = dilation, weight.shape[2:]
    wide = weight.new_zeros(*weight.shape[:2], dh * (kh - 1) + 1, dw * (kw - 1) + 1)
    wide[:, :, ::dh, ::dw] = weight
    return wide


def run_layer(x: Tensor, layer: Layer, run: str = "", at_codes: AtCodes | None = None) -> Tensor:
    """multiplier * conv(codes of x, weight) + bias, in the dtype of x."""
    if layer.codes is None:
        operand = activate(x, layer.activation)
    else:
        operand = quantize(x, layer)
        if at_codes is not None:
            operand = at_codes(run, x, operand)
    weight = layer.weight.to(torch.int32 if layer.is_integer else x.dtype)
    if not layer.is_integer:
        operand = operand.to(x.dtype)
    sums = convolve(operand, weight, layer)
    per_channel = (-1,) if layer.type == "linear" else (-1, 1, 1)
    y = sums.to(x.dtype) * layer.multiplier.to(x.dtype).view(per_channel) + layer.bias.to(x.dtype).view(per_channel)
    if layer.real_zero_border:
        under_image = convolve(torch.ones_like(operand[:1]), weight, layer).to(x.dtype)
        y = y + layer.offset_term.to(x.dtype).view(per_channel) * under_image
    return y


class IntegerRuntime:
    """Runs a :class:`Network` on the CPU.

    Args:
        network: from `read_packed` or `trace_network`.
        dtype: of everything between the layers; the sums themselves are int32.

    Raises:
        TypeError: no network, or no floating-point dtype.
    """

    def __init__(self, network: Network, dtype: torch.dtype = torch.float64) -> None:
        if not isinstance(network, Network):
            raise TypeError(f"network must be a Network, got {brief(network)}: IntegerRuntime(read_packed(path)) runs a file")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point torch.dtype, got {brief(dtype)}")
        self.network, self.dtype = network, dtype
        self._constants = {name: value.to(dtype) for name, value in network.constants.items()}

    @torch.no_grad()
    def __call__(self, images: Tensor, at_codes: AtCodes | None = None) -> Tensor:
        """The output for images [N, C, H, W] of the size the network was exported for, in `dtype`.

        Args:
            at_codes: sees (name of the layer's run, its input, its codes) and returns the codes to go on with: to look at
                them, or to compare a layer on codes from elsewhere.

        Raises:
            ValueError: images of another size. TypeError: images that are no tensor. ExportError: a NaN reached a quantizer.
        """
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor [N, C, H, W], got {brief(images)}")
        expected = self.network.input_shape[1:]
        if tuple(images.shape[1:]) != expected:
            raise ValueError(f"the network was exported for images {list(expected)}, got {list(images.shape[1:])}")
        values: dict[str, Tensor] = {"input": images.detach().to("cpu", self.dtype), **self._constants}
        readers = self.network.reader_counts()
        runs = {step.output: (run, layer) for run, step, layer in self.network.layer_runs()}
        for step in self.network.steps:
            inputs = [values[x] if isinstance(x, str) else x for x in step.inputs]
            if step.op == "layer":
                run, layer = runs[step.output]
                values[step.output] = run_layer(inputs[0], layer, run, at_codes)
            else:
                values[step.output] = OPERATORS[step.op](*inputs, **step.settings)
            for name in step.inputs:
                if isinstance(name, str) and name not in self._constants:
                    readers[name] -= 1
                    if readers[name] == 0:
                        del values[name]
        return values[self.network.output]
