"""What the trace tells of each layer, and how it follows from the values that were seen."""

from __future__ import annotations

from dataclasses import dataclass

from . import bounds
from .bounds import Value

_GATES = ("sigmoid", "hardsigmoid")
_LONGEST_GATE = 8  # layers; a longer way back from a sigmoid is no squeeze-and-excite


@dataclass
class LayerFlow:
    """What one layer is fed.

    Attributes:
        name: dotted name in the model.
        kind, offset: "raw", "unsigned", "offset" (with the bound, below 0) or "signed".
        activation, producer: the function the input is the direct result of, and the module that computed it ("" if
            there is none or it is not a module).
        sole_reader: nothing else reads that input, and layer and producer both ran exactly once.
        norm: name of the BatchNorm of which the input is the result, directly or through `producer`, where nothing else
            reads its output or its input and it ran exactly once; else "".
        followed_by_bn: name of the BatchNorm that reads the output directly, else None.
        squeeze_excite: the layer computes a gate from a pooled tensor.
        input_shape, output_shape: of the (last) call, with the batch dimension.
        macs: multiply-accumulates per image, over all calls.
        calls: how often the layer ran.
    """

    name: str
    kind: str
    offset: float
    activation: str = ""
    producer: str = ""
    sole_reader: bool = False
    norm: str = ""
    followed_by_bn: str | None = None
    squeeze_excite: bool = False
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    macs: int = 0
    calls: int = 0


def kind_of(value: Value) -> tuple[str, float]:
    """(kind, offset) by the lower bound."""
    if value.raw:
        return "raw", 0.0
    if value.lo >= 0:
        return "unsigned", 0.0
    return ("signed", 0.0) if value.lo == -bounds.INF else ("offset", float(value.lo))


def gate_layers(gate: Value) -> list[str]:
    """Layers between a sigmoid gate and a pooling; empty if `gate` is no gate or its path does not start at a pooling."""
    if gate.lo < 0 or gate.hi > 1 or gate.constant:
        return []
    layers: list[str] = []
    is_gate = from_pooling = False
    todo, visited = [gate], set()
    while todo:
        value = todo.pop()
        if id(value) in visited or value.constant:
            continue
        visited.add(id(value))
        if value.pooled:
            from_pooling = True
            continue
        is_gate |= value.activation in _GATES and not layers
        if value.layer:
            layers.append(value.layer)
        if not value.parents or len(layers) > _LONGEST_GATE:
            return []
        todo.extend(value.parents)
    return layers if is_gate and from_pooling else []
