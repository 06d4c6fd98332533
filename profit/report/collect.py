"""What a run records of its model for results.json: layers, weight histograms against the grid, sizes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from profit.quantize import layer_table, quant_layers
from profit_kernels import duq_codes

FULL_PRECISION = 32
_UNIT_PER_CHANNEL = "w / A of its channel"


def collect_layers(
    model: nn.Module, scores: Mapping[str, float] | None = None, frozen_stage: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """One JSON-able row per quantized layer, in network order.

    Args:
        model: a converted model.
        scores: AIWQ by layer name; layers without a finite score get neither `aiwq` nor `rank`. Rank 1 is the least
            stable; equal scores rank in network order.
        frozen_stage: by layer name, the first freezing stage (1, 2, ...) in which the weights no longer trained.

    `A_x`, `C_x`, `A_w`, `C_w` are softplus of the raw parameters (the median over channels where there is one per
    channel), or None: not quantized yet, or a baseline quantizer whose parameters mean something else.
    """
    scores = {name: float(score) for name, score in (scores or {}).items() if math.isfinite(score)}
    stages = frozen_stage or {}
    modules = quant_layers(model)
    order = sorted((name for name in modules if name in scores), key=lambda name: -scores[name])
    ranks = {name: rank for rank, name in enumerate(order, start=1)}
    rows = []
    for entry in layer_table(model):
        module = modules[entry.name]
        a_x, c_x = _intervals(module.input_quantizer, module.input_quantizer.is_calibrated)
        a_w, c_w = _intervals(module.weight_quantizer, module.weight_quantizer.is_initialized)
        row = entry.to_dict()
        row.update(kernel=list(entry.kernel), A_x=a_x, C_x=c_x, A_w=a_w, C_w=c_w)
        row.update(aiwq=scores.get(entry.name), rank=ranks.get(entry.name), frozen_stage=stages.get(entry.name))
        rows.append(row)
    return rows


@torch.no_grad()
def weight_histograms(model: nn.Module, bins: int = 64) -> dict[str, dict[str, Any]]:
    """Histogram of the latent weights and use of the quantization levels, by layer name.

    `edges` [bins + 1] and `counts` [bins] over the finite weights, from the smallest to the largest; `grid` the output
    values of the levels, ascending, and `code_counts` the number of weights on each (both empty where weights are not
    quantized, or one is NaN or infinite). With one interval per channel there is no common grid: then weights are
    divided by the A of their channel, levels are code / s times the median of C / A, and `unit` says so. Baseline
    quantizers: the distinct values of the quantized weight, or no grid where these are more than 8 bits could make.

    Raises:
        ValueError: `bins` < 1.
    """
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1")
    return {name: entry for name, module in quant_layers(model).items() if (entry := _histogram(module, bins))}


def _histogram(module: nn.Module, bins: int) -> dict[str, Any] | None:
    quantizer = module.weight_quantizer
    weight = module.weight.detach().to("cpu", torch.float64)
    quantized = quantizer.bits is not None and quantizer.is_initialized
    per_channel = quantized and quantizer.is_duq and quantizer.a.numel() > 1
    entry: dict[str, Any] = {}
    if per_channel:
        interval = F.softplus(quantizer.a.detach().to("cpu", torch.float64))
        weight = weight / interval.reshape(-1, *[1] * (weight.dim() - 1))
        entry["unit"] = _UNIT_PER_CHANNEL
    finite = weight[torch.isfinite(weight)]
    if finite.numel() == 0:
        return None
    counts, edges = torch.histogram(finite, bins=bins)
    grid, code_counts = _levels(module) if quantized else ([], [])
    entry.update(edges=_round(edges), counts=[int(count) for count in counts], grid=grid, code_counts=code_counts)
    return entry


def _levels(module: nn.Module) -> tuple[list[float], list[int]]:
    quantizer, weight = module.weight_quantizer, module.weight.detach()
    if not quantizer.is_duq:
        values, counts = torch.unique(module.quantized_weight().detach().to("cpu", torch.float64), return_counts=True)
        return (_round(values), counts.tolist()) if values.numel() <= 256 else ([], [])
    steps = 2 ** (quantizer.bits - 1) - 1
    a = F.softplus(quantizer.a.detach().to("cpu", torch.float64))
    c = F.softplus(quantizer.c.detach().to("cpu", torch.float64))
    top = (c / a).median() if a.numel() > 1 else c[0]
    if not (torch.isfinite(weight).all() and torch.isfinite(a).all() and torch.isfinite(c).all()):
        return [], []  # NaN has no code
    codes = duq_codes(weight, quantizer.a.detach(), bits=quantizer.bits, signed=True)
    counts = torch.bincount(codes.to("cpu", torch.int64).flatten() + steps, minlength=2 * steps + 1)
    return _round(top * torch.arange(-steps, steps + 1) / steps), counts.tolist()


def model_sizes(model: nn.Module, bits: Sequence[int] = (32, 8, 5, 4, 3, 2)) -> list[dict[str, Any]]:
    """Size of the model at each weight bit width: `{"label": "W4", "bits": 4, "bytes": ...}`.

    The rule: the weight of every quantized layer packed at the bit width, layer by layer rounded up to whole bytes (a
    layer with a width of its own keeps it); every other floating-point parameter and buffer, that is biases,
    BatchNorm, the intervals `a` and `c`, and layers left out of the conversion, at 4 bytes. At 32 bits all weights take
    4 bytes and the intervals do not count: the network before quantization. Integer buffers never count.
    """
    modules = quant_layers(model)
    packed = {id(module.weight): module for module in modules.values()}
    interval_ids = {
        id(tensor)
        for module in modules.values()
        for quantizer in (module.input_quantizer, module.weight_quantizer)
        for tensor in (*quantizer.parameters(), *quantizer.buffers())
    }
    # Flags are scalars.
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and t.dim()}
    rest = sum(4 * t.numel() for key, t in tensors.items() if key not in packed and key not in interval_ids)
    intervals = sum(4 * t.numel() for key, t in tensors.items() if key in interval_ids)
    sizes = []
    for width in bits:
        total = rest + (0 if width == FULL_PRECISION else intervals)
        total += sum(_packed_bytes(module, width) for module in packed.values())
        sizes.append({"label": f"W{width}", "bits": width, "bytes": total})
    return sizes


def _packed_bytes(module: nn.Module, width: int) -> int:
    if width != FULL_PRECISION:
        width = module.own_bits.get("weight", width) or FULL_PRECISION
    return (module.weight.numel() * width + 7) // 8


def _intervals(quantizer: nn.Module, ready: bool) -> tuple[float | None, float | None]:
    if not ready or not quantizer.is_duq:
        return None, None
    return _median(quantizer.a), _median(quantizer.c)


def _median(raw: Tensor) -> float | None:
    value = F.softplus(raw.detach().to("cpu", torch.float64)).median().item()
    return value if math.isfinite(value) else None


def _round(values: Tensor) -> list[float]:
    # seven digits are float32; more would only make results.json longer
    return [float(f"{value:.7g}") for value in values.tolist()]
