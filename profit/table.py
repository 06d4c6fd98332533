"""The table that shows what conversion chose for every layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from .nn import QuantConv2d, QuantLayer


@dataclass(frozen=True)
class LayerRow:
    """One quantized layer. `type` is "conv", "depthwise" or "linear"; `stride` a pair only where the two differ;
    `parameters` counts weight and bias; `macs` are per image at the traced input size (0 if the layer was never traced)."""

    name: str
    type: str
    kernel: tuple[int, int]
    stride: int | tuple[int, int]
    groups: int
    kind: str
    offset: float
    pad_value: float
    activation: str
    weight_bits: int | None
    act_bits: int | None
    ranked: bool
    parameters: int
    macs: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)


class LayerTable(list[LayerRow]):
    """Rows in the order in which the layers run; `str()` is an aligned text table."""

    def counts(self) -> dict[str, int]:
        """How many layers there are: "layers", by kind "raw", "unsigned", "offset", "signed", then "offset_kxk" (offset
        with a kernel above 1), "negative_padded", "ranked" and "fused" (activation inside the quantizer)."""
        kinds = {kind: sum(row.kind == kind for row in self) for kind in ("raw", "unsigned", "offset", "signed")}
        return {
            "layers": len(self),
            **kinds,
            "offset_kxk": sum(row.kind == "offset" and max(row.kernel) > 1 for row in self),
            "negative_padded": sum(row.pad_value < 0 for row in self),
            "ranked": sum(row.ranked for row in self),
            "fused": sum(row.activation != "none" for row in self),
        }

    def __str__(self) -> str:
        head = ("layer", "type", "kernel", "stride", "groups", "input", "offset", "padding", "activation", "W", "A", "ranked",
                "parameters", "MACs")  # fmt: skip
        cells = [head, *(_cells(row) for row in self)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
        numeric = {3, 4, 6, 7, 9, 10, 12, 13}
        lines = [
            "  ".join(
                c.rjust(w) if i in numeric else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in cells
        ]
        return "\n".join(line.rstrip() for line in lines)


def _cells(row: LayerRow) -> tuple[str, ...]:
    stride = row.stride if isinstance(row.stride, int) else "x".join(map(str, row.stride))
    return (
        row.name, row.type, "x".join(map(str, row.kernel)), str(stride), str(row.groups), row.kind,
        f"{row.offset:g}" if row.offset else "", f"{row.pad_value:g}", row.activation, _bits(row.weight_bits),
        _bits(row.act_bits), "yes" if row.ranked else "", f"{row.parameters:,}", f"{row.macs:,}",
    )  # fmt: skip


def _bits(bits: int | None) -> str:
    return "fp" if bits is None else str(bits)


def make_row(name: str, layer: QuantLayer) -> LayerRow:
    """The row of one layer, as it stands now."""
    conv = isinstance(layer, QuantConv2d)
    q = layer.input_quantizer
    stride = layer.stride if conv else (1, 1)
    return LayerRow(
        name=name,
        type=("depthwise" if layer.is_depthwise else "conv") if conv else "linear",
        kernel=tuple(layer.kernel_size) if conv else (1, 1),
        stride=stride[0] if stride[0] == stride[1] else tuple(stride),
        groups=layer.groups if conv else 1,
        kind=q.kind,
        offset=q.offset,
        pad_value=layer.pad_value if conv else 0.0,
        activation=q.activation,
        weight_bits=layer.weight_quantizer.bits,
        act_bits=q.bits,
        ranked=layer.ranked,
        parameters=sum(p.numel() for p in (layer.weight, layer.bias) if p is not None),
        macs=layer.macs,
    )


def make_table(layers: Iterable[tuple[str, nn.Module]]) -> LayerTable:
    """The table of (name, layer) pairs."""
    return LayerTable(make_row(name, layer) for name, layer in layers)
