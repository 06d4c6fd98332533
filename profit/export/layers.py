"""One layer in numbers: its weight codes and the folding of everything that multiplies or shifts its sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ExportError
from ..nn import InputQuantizer, QuantConv2d, QuantLayer, WeightQuantizer
from .network import ActivationCodes, Layer


def positive(raw: Tensor) -> Tensor:
    """softplus of a raw float32 interval parameter as the operators use it: rounded to float32. float64, on the CPU."""
    return F.softplus(raw.detach().cpu().double()).float().double()


def activation_codes(quantizer: InputQuantizer) -> ActivationCodes | None:
    """The numbers of an input quantizer, None where it only applies its activation."""
    if quantizer.bits is None:
        return None
    interval, scale = positive(quantizer.a).item(), positive(quantizer.c).item()
    return ActivationCodes(quantizer.bits, quantizer.signed, quantizer.offset, interval, scale)


def weight_codes(layer: QuantLayer, name: str) -> tuple[Tensor, Tensor]:
    """(int8 codes shaped as the weight, float64 [1] or [C_out] value of one code): what the layer computes with.

    The codes are read off the quantized weight itself, so they are those of whatever kernel made it.

    Raises:
        ExportError: the quantized weight is not on the grid (NaN).
    """
    quantizer: WeightQuantizer = layer.weight_quantizer
    steps = 2 ** (quantizer.bits - 1) - 1
    with torch.no_grad():
        weight = layer.quantized_weight().double()
    step = positive(quantizer.c) / steps
    per_channel = step.view(-1, *[1] * (weight.dim() - 1))
    codes = torch.round(weight / per_channel)
    on_grid = (codes * per_channel - weight).abs() <= 1e-3 * per_channel  # 127 codes in float32 err by 1e-5 of a step
    if not bool(on_grid.all()) or codes.abs().max() > steps:
        raise ExportError(f"layer {name!r}: its quantized weight is not finite or not on its grid of {quantizer.bits} bits")
    return codes.to(torch.int8), step


def quantized_layer(
    name: str, source: QuantLayer, stride: Sequence[int] = (1, 1), pads: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Layer:  # fmt: skip
    """The numbers of a quantized layer, without its BatchNorm.

    Args:
        stride, dilation: (h, w). pads: (left, right, top, bottom), as they are for the traced image size.

    Raises:
        ExportError: its border holds a value that is neither code 0 nor real 0.
    """
    codes = activation_codes(source.input_quantizer)
    if source.weight_quantizer.bits is None:
        weight, weight_step = source.weight.detach().clone(), torch.ones(1, dtype=torch.float64)
    else:
        weight, weight_step = weight_codes(source, name)
    channels = weight.shape[0]
    bias = torch.zeros(channels, dtype=torch.float64) if source.bias is None else source.bias.detach().double()
    layer = Layer(
        name=name,
        type="conv" if isinstance(source, QuantConv2d) else "linear",
        weight=weight,
        weight_bits=source.weight_quantizer.bits,
        codes=codes,
        activation=source.input_quantizer.activation,
        multiplier=(weight_step * (1.0 if codes is None else codes.step)).expand(channels).clone(),
        bias=bias,
        stride=tuple(stride),
        pads=tuple(pads),
        dilation=tuple(dilation),
        groups=getattr(source, "groups", 1),
        pad_value=source.pad_value if codes is None and isinstance(source, QuantConv2d) else 0.0,
        real_zero_border=_real_zero_border(name, source, codes, pads),
    )
    if codes is None or codes.offset == 0 or layer.real_zero_border:
        return layer
    # Every tap, those of the border included (code 0 is d), adds d * weight: a constant per output channel.
    sums = weight.double().flatten(1).sum(1)
    return layer.followed_by(torch.ones(()), layer.offset_term * sums, "")


def _real_zero_border(name: str, source: QuantLayer, codes: ActivationCodes | None, pads: Sequence[int]) -> bool:
    if codes is None or not isinstance(source, QuantConv2d) or not any(pads) or source.pad_value == codes.offset:
        return False
    if source.pad_value == 0:
        return True
    raise ExportError(
        f"layer {name!r}: it pads with {source.pad_value:g}, which is neither 0 nor the value of code 0 ({codes.offset:g})"
    )


def float_layer(
    name: str, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Layer:
    """A layer that conversion skipped, from the arguments of conv2d or linear (`padding` may be "same" or "valid")."""
    channels = weight.shape[0]
    stride, dilation = _pair(stride), _pair(dilation)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        top, left = (total // 2 for total in totals)
        pads = (left, totals[1] - left, top, totals[0] - top)
    else:
        vertical, horizontal = (0, 0) if padding == "valid" else _pair(padding)
        pads = (horizontal, horizontal, vertical, vertical)
    return Layer(
        name=name,
        type="conv" if weight.dim() == 4 else "linear",
        weight=weight.float().clone(),
        weight_bits=None,
        codes=None,
        activation="none",
        multiplier=torch.ones(channels, dtype=torch.float64),
        bias=torch.zeros(channels, dtype=torch.float64) if bias is None else bias.double(),
        stride=stride,
        pads=pads,
        dilation=dilation,
        groups=groups,
    )


def _pair(value: Any) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values
