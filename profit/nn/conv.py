"""A drop-in Conv2d that quantizes its input and its weight and pads with a value."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from profit_kernels import quantized_conv2d
from profit_kernels.layer import BatchNorm, Convolution, Norm

from ..config import DuQConfig
from ..errors import ConversionError
from .deferred import DeferredBatchNorm
from .layer import QuantLayer, build_quantizers, check_own_parameters, finish
from .quantizer import InputQuantizer, WeightQuantizer

Observer = Callable[["QuantConv2d", Tensor, Norm | None, Tensor], None]

# Subclasses whose forward is that of Conv2d after TensorFlow's dynamic "same" padding. By name: timm is optional.
_SAME_PADDED = ("timm.layers.conv2d_same.Conv2dSame",)


def is_same_padded(conv: nn.Conv2d, name: str = "") -> bool:
    """Whether `conv` pads like TensorFlow's "same"; False for a plain Conv2d.

    Raises:
        ConversionError: a subclass with a forward of its own that is not known here.
    """
    cls = type(conv)
    if f"{cls.__module__}.{cls.__qualname__}" in _SAME_PADDED:
        return True
    if cls.forward is nn.Conv2d.forward and cls._conv_forward is nn.Conv2d._conv_forward:
        return False
    raise ConversionError(
        f"layer {name!r}: {cls.__name__} is a Conv2d with a forward of its own, which conversion would replace; "
        f"leave it out with overrides={{{name!r}: {{'skip': True}}}} or filter_fn"
    )


class QuantConv2d(QuantLayer, nn.Conv2d):
    """Conv2d over a quantized input with a quantized weight: `conv(pad(quantize(act(x)), pad_value), quantize(w)) + b`.

    Takes the arguments of torch.nn.Conv2d and keeps its state_dict keys `weight` and `bias`.

    Args:
        input_quantizer, weight_quantizer: default to signed quantizers with bits None (full precision).
        pad_value: what the border holds, in units of the quantized input; -0.375 is negative padding for h-swish
            (PROFIT, section 4.2).
        same_padding: TensorFlow's "same": asymmetric, computed from the size of each input; `padding` is not used.
        ranked: directly followed by BatchNorm.
    """

    def __init__(
        self, *args: Any, input_quantizer: InputQuantizer | None = None, weight_quantizer: WeightQuantizer | None = None,
        pad_value: float = 0.0, same_padding: bool = False, ranked: bool = False, layer_name: str = "", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self._init_quantization(input_quantizer, weight_quantizer, layer_name, ranked)
        self.pad_value = float(pad_value)
        self.same_padding = same_padding
        self.set_norm(None)
        self._observers: OrderedDict[int, Observer] = OrderedDict()

    def register_observer(self, observer: Observer) -> RemovableHandle:
        """Call `observer(layer, x, norm, y)` at the end of every forward; like a forward hook, but with the `Norm` that
        normalised x (None where the operator applied no BatchNorm)."""
        handle = RemovableHandle(self._observers)
        self._observers[handle.id] = observer
        return handle

    @property
    def norm(self) -> DeferredBatchNorm | None:
        """The BatchNorm in front that this layer applies itself: its input is then that of the BatchNorm."""
        return self._norm[0]

    def set_norm(self, norm: DeferredBatchNorm | None, name: str = "") -> None:
        """Apply `norm`, called `name` in the model, to the input from here on; None: nothing."""
        self._norm = (norm,)  # in a tuple: not a child, or every parameter would have two names
        self.norm_name = name

    @property
    def can_apply_norm(self) -> bool:
        """Whether the operator computes this layer and has something to fuse the BatchNorm with."""
        quantizer = self.input_quantizer
        return quantizer.is_duq and quantizer.kind != "raw" and self.padding_mode == "zeros"

    def after_norm(self, x: Tensor) -> Tensor:
        """What the input x of the layer is for its input quantizer: BatchNorm of it where the layer applies one.

        No gradient, and no statistics changed: for observers of the layer's input.
        """
        return x if self.norm is None else self.norm.preview(x)

    @classmethod
    def from_float(
        cls, conv: nn.Conv2d, config: DuQConfig | None = None, *, kind: str | None = None, offset: float | None = None,
        activation: str = "none", name: str = "", ranked: bool = False,
    ) -> QuantConv2d:  # fmt: skip
        """A quantized layer that shares the parameters of `conv`.

        Args:
            conv: Conv2d or timm's Conv2dSame.
            config: bits, granularity, padding and overrides; None means DuQConfig().
            kind, offset, activation: the input quantizer's; without a kind the input is taken as signed, which holds for
                any data. An override in `config` goes first.

        Raises:
            ConversionError: an unknown subclass, or a weight that is not a plain parameter.
            CalibrationError: weights that are all zero or not finite.
        """
        config = DuQConfig() if config is None else config
        same_padding = is_same_padded(conv, name)
        check_own_parameters(conv, name)
        settings = config.for_layer(name)
        kind, offset = settings.resolve_kind(kind, offset)
        input_quantizer, weight_quantizer = build_quantizers(conv, config, kind, offset, activation)
        layer = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
            conv.bias is not None, conv.padding_mode, device="meta", dtype=conv.weight.dtype,
            input_quantizer=input_quantizer, weight_quantizer=weight_quantizer, same_padding=same_padding, ranked=ranked,
            layer_name=name,
        )  # fmt: skip
        layer._adopt(conv)
        if kind == "offset" and settings.padding == "negative" and layer.pads_with_a_constant:
            layer.pad_value = offset
        finish(layer, config, settings)
        return layer

    @property
    def pads_with_a_constant(self) -> bool:
        """Whether there can be a border and it holds `pad_value` (not a reflection of the data)."""
        if self.same_padding or self.padding == "same":
            border = max(self.kernel_size) > 1
        else:
            border = self.padding != "valid" and any(self.padding)
        return self.padding_mode == "zeros" and border

    def padding4(self, x: Tensor) -> tuple[int, int, int, int]:
        """(left, right, top, bottom) used for an input [..., H, W]; sums to TensorFlow's rule for "same"."""
        if self.same_padding:
            (top, bottom), (left, right) = (
                _same(x.shape[-2 + i], self.kernel_size[i], self.stride[i], self.dilation[i]) for i in range(2)
            )
            return left, right, top, bottom
        left, right, top, bottom = self._reversed_padding_repeated_twice
        return left, right, top, bottom

    @property
    def is_depthwise(self) -> bool:
        """One filter per output channel."""
        return self.groups == self.in_channels > 1

    def forward(self, x: Tensor) -> Tensor:
        if self.input_quantizer.is_duq and self.padding_mode == "zeros" and x.dim() == 4:
            y, norm = self._fused(x)
        else:
            y, norm = self._in_parts(x), None
        for observer in self._observers.values():
            observer(self, x, norm, y)
        return y

    def _fused(self, x: Tensor) -> tuple[Tensor, Norm | None]:
        """[BatchNorm], activation, quantizer and convolution in one operator, which keeps x alone for the backward."""
        self.input_quantizer.check_ready()
        norm = None if self.norm is None else self._batch_norm(x)
        return quantized_conv2d(
            x, norm, self.input_quantizer.value(), self.quantized_weight(), self.bias, self.convolution(x), self.weight_codes()
        )

    def _batch_norm(self, x: Tensor) -> BatchNorm:
        """The BatchNorm in front as this forward computes it; counts the batch."""
        if self.norm.uses_batch and x.numel() == x.shape[1]:
            raise ValueError(
                f"layer {self.layer_name!r}: the BatchNorm in front needs more than one value per channel in training mode, "
                f"got {list(x.shape)}: use larger images or batches"
            )
        return self.norm.value(self.norm.count_batch())

    def convolution(self, x: Tensor) -> Convolution:
        """The geometry for an input [N, C, H, W]."""
        pads = list(self.padding4(x))
        return Convolution(list(self.stride), pads, list(self.dilation), self.groups, self.pad_value)

    def _in_parts(self, x: Tensor) -> Tensor:
        """What no operator computes: another quantizer, another border than a constant, a single image."""
        if self.norm is not None:
            x = self.norm.apply_to(x)
        x = self.input_quantizer(x)
        weight = self.quantized_weight()
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return F.conv2d(x, weight, self.bias, self.stride, 0, self.dilation, self.groups)
        if self.pad_value == 0 and not self.same_padding:
            return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        x = F.pad(x, self.padding4(x), value=self.pad_value)
        return F.conv2d(x, weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def extra_repr(self) -> str:
        same = ", same_padding=True" if self.same_padding else ""
        return f"{super().extra_repr()}{same}, pad_value={self.pad_value:g}, ranked={self.ranked}"


def _same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """(before, after) of TensorFlow's "same": the output has ceil(size / stride) places, the odd one goes after."""
    places = -(-size // stride)
    total = max((places - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2
