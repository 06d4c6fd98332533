"""What the quantized convolution and the quantized linear layer have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import DuQConfig, LayerSettings, check_bits
from ..errors import CalibrationError, ConversionError
from .baselines import BASELINES
from .quantizer import InputQuantizer, WeightQuantizer

if TYPE_CHECKING:
    from .weight_batch import BatchedWeight

# torch.nn.Module keeps hooks in these dictionaries; sharing them keeps a user's hooks, and their handles, alive.
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def quantizer_classes(name: str) -> tuple[type[InputQuantizer], type[WeightQuantizer]]:
    """The input and weight quantizer classes of `DuQConfig.quantizer`."""
    return (InputQuantizer, WeightQuantizer) if name == "duq" else BASELINES[name]


class QuantLayer(nn.Module):
    """Mixin in front of nn.Conv2d / nn.Linear: quantizers, bit widths, freezing and the cache of a frozen weight.

    Attributes:
        input_quantizer, weight_quantizer: the children.
        layer_name: dotted name in the converted model, for messages.
        ranked: directly followed by BatchNorm, so part of the AIWQ ranking.
        frozen: set by :meth:`freeze_weight`.
        own_bits: bit widths set for this very layer ("weight" and/or "act"); the common ones do not move them.
        macs: multiply-accumulates per image in the traced forward (0 where it was not traced).
        order: position in the traced forward.
        fused_from: name of the activation module that moved into the input quantizer ("" if none).
        batch_norm: name of the BatchNorm that directly reads the output ("" if none).
        config: what the model was converted with; None for a layer converted on its own.
    """

    input_quantizer: InputQuantizer
    weight_quantizer: WeightQuantizer
    weight: nn.Parameter

    def _init_quantization(
        self, input_quantizer: InputQuantizer | None, weight_quantizer: WeightQuantizer | None, layer_name: str,
        ranked: bool = False,
    ) -> None:  # fmt: skip
        self.input_quantizer = InputQuantizer() if input_quantizer is None else input_quantizer
        self.weight_quantizer = WeightQuantizer() if weight_quantizer is None else weight_quantizer
        self.ranked = ranked
        self.frozen = False
        self.own_bits: dict[str, int | None] = {}
        self.macs = 0
        self.order = 0
        self.fused_from = ""
        self.batch_norm = ""
        self.config: DuQConfig | None = None
        self._frozen_intervals = False
        self._cached_weight: Tensor | None = None
        self._cached_versions: tuple[int, ...] = ()
        self.batched_weight: BatchedWeight | None = None  # set anew by every forward of the model
        self.rename(layer_name)
        self.register_load_state_dict_post_hook(_refresh_after_load)

    def rename(self, layer_name: str) -> None:
        """Set the name used in messages, here and in both quantizers."""
        self.layer_name = layer_name
        self.input_quantizer.layer_name = self.weight_quantizer.layer_name = layer_name

    def set_weight_bits(self, bits: int | None) -> None:
        """Follow the common weight bit width; the first width that is not None sets the interval from the weight.

        None switches weight quantization off here too; any other value gives way to `own_bits`.
        """
        check_bits(bits, "weight_bits")
        if bits is not None:
            bits = self.own_bits.get("weight", bits)
        previous = self.weight_quantizer.bits
        self.weight_quantizer.bits = bits
        if bits is not None and not self.weight_quantizer.is_initialized:
            try:
                self.weight_quantizer.initialize(self.weight)
            except CalibrationError:
                self.weight_quantizer.bits = previous
                raise
        self.refresh_cache()

    def set_act_bits(self, bits: int | None) -> None:
        """Follow the common activation bit width, with the same rule; a raw input stays as it is."""
        check_bits(bits, "act_bits")
        if bits is not None:
            bits = self.own_bits.get("act", bits)
        self.input_quantizer.bits = None if self.input_quantizer.kind == "raw" else bits

    def quantized_weight(self) -> Tensor:
        """The weight the layer computes with, shaped as `weight`; differentiable unless it comes from the cache."""
        ready = self.ready_weight()
        return self.weight_quantizer(self.weight) if ready is None else ready

    def weight_codes(self) -> tuple[Tensor, int] | None:
        """The raw scale and the bits of the codes that `quantized_weight` holds; None without DuQ or bits."""
        quantizer = self.weight_quantizer
        return (quantizer.c, quantizer.bits) if quantizer.is_duq and quantizer.bits is not None else None

    def ready_weight(self) -> Tensor | None:
        """The quantized weight where it exists already: from the cache, or from the start of the model's forward."""
        cached = self.cached_weight()
        if cached is None and self.batched_weight is not None:
            return self.batched_weight.current()
        return cached

    def needs_quantized_weight(self) -> bool:
        """Whether the model's forward should quantize this weight: DuQ, with bits and an interval, and not cached."""
        quantizer = self.weight_quantizer
        ready = quantizer.is_duq and quantizer.bits is not None and quantizer.is_initialized
        return ready and self.cached_weight() is None

    def cached_weight(self) -> Tensor | None:
        """The quantized weight of a layer frozen with its intervals, else None."""
        # Versions catch in-place edits (an EMA copying into a frozen model); a compiled graph has no access to them.
        if self._cached_weight is not None and not torch.compiler.is_compiling():
            if self._cached_versions != self._versions():
                self.refresh_cache()
        return self._cached_weight

    def freeze_weight(self, intervals: bool = False) -> None:
        """Stop training the weight (and with `intervals` its `a`, `c`: then the quantized weight is computed once)."""
        self.frozen = True
        self._frozen_intervals = intervals
        self.weight.requires_grad_(False)
        self.weight_quantizer.requires_grad_(not intervals)
        self.refresh_cache()

    def unfreeze_weight(self) -> None:
        """Undo :meth:`freeze_weight`."""
        self.frozen = self._frozen_intervals = False
        self.weight.requires_grad_(True)
        self.weight_quantizer.requires_grad_(True)
        self.refresh_cache()

    def refresh_cache(self) -> None:
        """Compute the cached weight again, or drop it where weight and intervals are not both frozen."""
        self._cached_weight = None
        if not self._frozen_intervals or self.weight_quantizer.bits is None or self.weight.is_inference():
            return
        if self.weight.is_meta or not self.weight_quantizer.is_initialized:  # before and after to_empty: no data yet
            return
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            self._cached_weight = self.weight_quantizer(self.weight).detach()
        self._cached_versions = self._versions()

    def _versions(self) -> tuple[int, ...]:
        tensors = (self.weight, *self.weight_quantizer.parameters())
        return tuple(-1 if t.is_inference() else t._version for t in tensors)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLayer:
        super()._apply(fn, recurse)
        self.refresh_cache()
        return self

    def _adopt(self, source: nn.Module) -> None:
        """Take over the parameters (the same objects), hooks and training flag of the layer this one replaces."""
        self.weight, self.bias = source.weight, source.bias
        for hooks in _HOOKS:
            setattr(self, hooks, getattr(source, hooks))
        self.training = source.training


def _refresh_after_load(module: QuantLayer, incompatible_keys: object) -> None:
    module.refresh_cache()


def check_own_parameters(layer: nn.Module, name: str) -> None:
    """Raise ConversionError unless `weight` is an initialised parameter of the layer itself."""
    where = f"layer {name!r} ({type(layer).__name__})"
    weight = layer._parameters.get("weight")
    if weight is None:
        raise ConversionError(
            f"{where}: its weight is computed (weight or spectral norm, parametrization); fold that into the weight first: "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') or remove_weight_norm(layer)"
        )
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ConversionError(f"{where}: a lazy layer without shape; run the model once before converting it")


def build_quantizers(
    layer: nn.Module, config: DuQConfig, kind: str, offset: float, activation: str
) -> tuple[InputQuantizer, WeightQuantizer]:
    """Quantizers for a float layer, on its device; bit widths are set later, by set_weight_bits / set_act_bits."""
    input_class, weight_class = quantizer_classes(config.quantizer)
    place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    channels = layer.weight.shape[0] if config.weight_granularity == "per_channel" else None
    input_quantizer = input_class(kind=kind, offset=offset, activation=activation, **place)
    return input_quantizer, weight_class(channels=channels, **place)


def finish(layer: QuantLayer, config: DuQConfig, settings: LayerSettings) -> None:
    """Record the bit widths set for this layer alone, then set all of them (which initialises the weight interval)."""
    if settings.own_weight_bits:
        layer.own_bits["weight"] = settings.weight_bits
    if settings.own_act_bits:
        layer.own_bits["act"] = settings.act_bits
    layer.set_weight_bits(config.weight_bits)
    layer.set_act_bits(config.act_bits)
