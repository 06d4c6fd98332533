"""Ranges of the input quantizers from data: a percentile of what each quantizer really sees."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .batches import run_batches
from .checks import check_number, check_whole
from .config import check_choice
from .dataflow import eval_mode
from .distributed import gather, sum_over_ranks, world_size
from .errors import CalibrationError, ConversionError
from .nn import InputQuantizer, QuantConv2d, QuantLayer
from .nn.quantizer import apply_activation
from .quantize import quant_layers

CAPACITY = 1 << 20  # values kept per layer; beyond it a random half is dropped, again and again
_DEFAULT = {"corrected": 99.9, "original": 95.0}


def calibrate_(
    model: nn.Module,
    loader: Iterable[Any],
    batches: int = 8,
    percentile: float | Literal["max"] | None = None,
    mode: Literal["corrected", "original"] = "corrected",
    empty_range: float | None = 1.0,
) -> dict[str, float]:
    """Set A = C of every input quantizer from up to `batches` batches, in place.

    The model runs in eval mode without gradients and with activations in full precision (weights stay as they are);
    BatchNorm statistics, training flags and bit widths are as before afterwards. Ranges set earlier are replaced.

    Args:
        model: converted by `quantize_`.
        loader: batches: tensors, or tuples / lists whose first item is the tensor, or mappings of keyword arguments.
            Moved to the model's device.
        batches: how many batches to use; a shorter loader is used up.
        percentile: of the positive part, in (0, 100], linear between order statistics; or "max". None means 99.9
            (95 in mode "original").
        mode: "corrected" looks at h = act(x) for unsigned inputs, |h| for signed, h - offset for offset inputs. "original"
            does as the authors' code (which ran in train mode): x as it enters, before activation, absolute value and
            shift, at the order statistic of rank floor(n * percentile / 100), and at most 6 for ReLU6.
        empty_range: range of a layer that ran but saw no positive value (a dead ReLU of a small squeeze-and-excite, say).
            Its input is zero in any range, and training moves the range once the layer comes to life. None: an error.

    In several processes (torch.distributed) each shows its own batches, up to `batches` of them, and the ranges are those of
    all values together, the same everywhere: with at most 2^20 values per layer and process exactly those of one process that
    sees all the batches.

    Memory: up to 2^20 values per layer are kept. Where there are more, a uniform random part of them is (with a generator
    seeded here, so the result is the same every time); "max" is always exact.

    Returns:
        Layer name -> range, for every quantized input.

    Warns:
        UserWarning: layers that got `empty_range`, by name.

    Raises:
        CalibrationError: an empty loader; a batch on which the model does not run; NaN or infinity at the input of a
            layer; a layer that did not run; no positive value anywhere, or, without `empty_range`, in one layer. No range
            is changed then.
        ConversionError: nothing is converted. ValueError: an argument out of its range. TypeError: no model, no loader, or
            a batch of another form.
    """
    check_choice(mode, ("corrected", "original"), "mode")
    percentile = _DEFAULT[mode] if percentile is None else percentile
    if percentile != "max":
        check_number(percentile, "percentile, where it is not 'max',", above=0, most=100)
    batches = check_whole(batches, "batches", 1)
    if empty_range is not None:
        check_number(empty_range, "empty_range", above=0)
    layers = quant_layers(model)
    if not layers:
        raise ConversionError("the model has no quantized layer: convert it with quantize_ first")
    layers = {name: layer for name, layer in layers.items() if layer.input_quantizer.kind != "raw"}

    samples = {name: _Sample(keep_all=percentile != "max") for name in layers}
    device = next(model.parameters()).device
    with _observing(model, layers, samples, mode) as reached:
        used = run_batches(model, loader, batches, device, "calibration", lambda: _place(reached))
    _merge_over_ranks(samples, device)
    if not int(sum_over_ranks(torch.tensor([used]))):
        raise CalibrationError("calibration: the loader gave no batch; it needs at least one")
    empty = _empty(samples, empty_range)
    ranges = {name: _range(sample, percentile, mode) for name, sample in samples.items() if name not in empty}
    ranges.update(dict.fromkeys(empty, empty_range))
    if mode == "original":
        relu6 = [name for name, layer in layers.items() if layer.input_quantizer.activation == "relu6"]
        ranges.update({name: min(ranges[name], 6.0) for name in relu6})
    for name, value in ranges.items():
        layers[name].input_quantizer.set_range(value)
    return ranges


@contextmanager
def _observing(model: nn.Module, layers: Mapping[str, QuantLayer], samples: Mapping[str, _Sample], mode: str):
    """Eval mode, activations in full precision, and a hook in front of every layer; all undone afterwards.

    Yields a list of the layers that the present forward has reached, the last one last.
    """
    reached: list[str] = []
    bits = [(layer.input_quantizer, layer.input_quantizer.bits) for layer in layers.values()]
    handles = [
        layer.register_forward_pre_hook(_hook(name, samples[name], mode), with_kwargs=True)
        for name, layer in layers.items()
    ]
    handles += [
        layer.register_forward_pre_hook(lambda module, args, name=name: reached.append(name), prepend=True)
        for name, layer in quant_layers(model).items()
    ]
    handles.append(model.register_forward_pre_hook(lambda module, args: reached.clear(), prepend=True))
    try:
        for quantizer, _ in bits:
            quantizer.bits = None
        with eval_mode(model), torch.no_grad():
            yield reached
    finally:
        for quantizer, previous in bits:
            quantizer.bits = previous
        for handle in handles:
            handle.remove()


def _place(reached: list[str]) -> str:
    return f" (the last layer that it reached is {reached[-1]!r})" if reached else ""


def _hook(name: str, sample: _Sample, mode: str):
    def hook(layer: QuantLayer, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = next(iter((*args, *kwargs.values())))
        seen = _seen(layer.input_quantizer, layer.after_norm(x) if isinstance(layer, QuantConv2d) else x, mode)
        if not bool(torch.isfinite(seen).all()):
            raise CalibrationError(f"calibration: the input of layer {name!r} holds NaN or infinity")
        sample.add(seen[seen > 0])

    return hook


def _seen(quantizer: InputQuantizer, x: Tensor, mode: str) -> Tensor:
    """What the range is taken from, in float32 or better."""
    x = x.float() if x.dtype.itemsize < 4 else x
    if mode == "original":
        return x
    h = apply_activation(x, quantizer.activation)
    return h.abs() if quantizer.signed else h - quantizer.offset


class _Sample:
    """Positive values of one layer: all of them up to CAPACITY, then a uniform random part; the largest one exactly."""

    def __init__(self, keep_all: bool) -> None:
        self.chunks: list[Tensor] = []
        self.ran = False
        self.largest = 0.0
        self.size, self.share = 0, 1.0
        self.keep = keep_all
        self.generator = torch.Generator().manual_seed(0)

    def add(self, values: Tensor) -> None:
        self.ran = True
        if values.numel() == 0:
            return
        self.largest = max(self.largest, float(values.max()))
        if not self.keep:
            return
        self._append(values if self.share == 1.0 else self._part(values, round(values.numel() * self.share)))
        while self.size > CAPACITY:
            values = torch.cat(self.chunks)
            self.chunks, self.size, self.share = [], 0, self.share / 2
            self._append(self._part(values, values.numel() // 2))

    def _append(self, values: Tensor) -> None:
        self.chunks.append(values)
        self.size += values.numel()

    def _part(self, values: Tensor, number: int) -> Tensor:
        """`number` of the values, drawn with replacement: uniform, and no index as large as the data."""
        return values[torch.randint(values.numel(), (number,), generator=self.generator).to(values.device)]


def _merge_over_ranks(samples: Mapping[str, _Sample], device: torch.device) -> None:
    """Give every process the values of all; where some dropped a part of theirs, all are thinned alike first."""
    if world_size() == 1:
        return
    own = torch.tensor([[s.ran, s.largest, s.share] for s in samples.values()], dtype=torch.float64)
    ran, largest, share = gather(own.flatten()).view(-1, *own.shape).unbind(-1)
    for index, sample in enumerate(samples.values()):
        sample.ran, sample.largest = bool(ran[:, index].any()), float(largest[:, index].max())
        values = torch.cat(sample.chunks) if sample.chunks else torch.empty(0, device=device)
        least = float(share[:, index].min())
        if len(values) and least < sample.share:
            values = sample._part(values, round(len(values) * least / sample.share))
        sample.chunks = [gather(values)]


def _empty(samples: Mapping[str, _Sample], empty_range: float | None) -> list[str]:
    """Names of the layers without a positive value, after the refusals."""
    missed = [name for name, sample in samples.items() if not sample.ran]
    if missed:
        raise CalibrationError(
            f"calibration: layer {missed[0]!r} did not run; give such layers no input bits (overrides)"
        )
    empty = [name for name, sample in samples.items() if sample.largest == 0]
    if empty and (empty_range is None or len(empty) == len(samples)):
        raise CalibrationError(
            f"calibration: the input of layer {empty[0]!r} has no positive value to take a range from; use more or other data"
            + ("" if len(empty) == len(samples) else ", or give such layers a range with empty_range")
        )
    if empty:
        warnings.warn(
            f"calibration: no positive value at the input of {', '.join(empty)}; the range there is set to {empty_range}",
            UserWarning,
            stacklevel=3,
        )
    return empty


def _range(sample: _Sample, percentile: float | str, mode: str) -> float:
    if percentile == "max":
        return sample.largest
    ordered = torch.cat(sample.chunks).double().sort().values
    if mode == "original":
        return float(ordered[min(int(len(ordered) * float(percentile) / 100), len(ordered) - 1)])
    place = (len(ordered) - 1) * float(percentile) / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))
