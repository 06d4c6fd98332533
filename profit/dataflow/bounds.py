"""Lower and upper bounds of tensors, operation by operation: what the kind of a layer's input is derived from.

Interval arithmetic over known operations; anything else has no bound, which is always true (such an input is quantized
signed). Activations written out in parts, `x * relu6(x + 3) / 6` or `x * sigmoid(x)`, are recognised, since interval
arithmetic alone would lose that both factors come from the same x.

Sums follow the arithmetic: an operand without bound leaves none (residual sums of linear bottlenecks are signed), two
bounded operands add their bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

INF = math.inf
SILU_MIN, GELU_MIN, GELU_TANH_MIN, MISH_MIN = -0.2784645428, -0.1699712075, -0.1700407506, -0.3088434131
HARDSWISH_MIN = -0.375


@dataclass(eq=False)
class Value:
    """What is known of one tensor: `lo <= every element <= hi`, and where it comes from.

    `activation(source)` is this value where both are set. `raw`: the model's input, up to shape, scale and
    normalisation. `opaque`: computed where nothing can be seen (scripted function, custom autograd function).
    `learned`: a constant that is or comes from a parameter. `layer` is set on the direct output of a traced layer, `norm`
    (the module's name) on that of a BatchNorm; `producer` names the module that computed the activation.
    `readers` holds a layer name for a read by that layer and an integer for any other operation.
    """

    lo: float = -INF
    hi: float = INF
    op: str = ""
    parents: tuple[Value, ...] = ()
    activation: str = ""
    source: Value | None = None
    raw: bool = False
    opaque: bool = False
    constant: bool = False
    learned: bool = False
    pooled: bool = False
    layer: str = ""
    norm: str = ""
    producer: str = ""
    readers: set[str | int] = field(default_factory=set)

    @classmethod
    def of(cls, number: float) -> Value:
        return cls(number, number, op="number", constant=True)

    @property
    def is_number(self) -> bool:
        return self.constant and self.lo == self.hi


Operands = Sequence[Any]
Rule = Callable[[str, Operands, dict[str, Any]], Value]


def _is(x: object, number: float) -> bool:
    return isinstance(x, Value) and x.is_number and abs(x.lo - number) <= 1e-6 * abs(number)


def _number(args: Operands, kwargs: dict[str, Any], at: int, name: str, default: float) -> float:
    """A scalar argument given by position or by name; `default` if it is missing or not a number."""
    x = kwargs.get(name, args[at] if len(args) > at else None)
    if x is None:
        return default
    if isinstance(x, Value):
        return x.lo if x.is_number else default
    return float(x)


def _mul(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


def _hull(values: Sequence[Value]) -> Value:
    return Value(min(v.lo for v in values), max(v.hi for v in values))


# The range of each function over all reals; "*6" marks six times an activation, on the way to `x * relu6(x + 3) / 6`.
_RANGES: dict[str, tuple[float, float]] = {
    "relu": (0, INF), "relu6": (0, 6), "hardswish": (HARDSWISH_MIN, INF), "hardsigmoid": (0, 1), "sigmoid": (0, 1),
    "silu": (SILU_MIN, INF), "mish": (MISH_MIN, INF), "tanh": (-1, 1), "softplus": (0, INF), "softmax": (0, 1),
    "softmin": (0, 1), "tanh_softplus": (0, 1), "softsign": (-1, 1), "logsigmoid": (-INF, 0), "log_softmax": (-INF, 0),
    "selu": (-1.7580993409, INF), "hardsigmoid*6": (0, 6), "hardswish*6": (6 * HARDSWISH_MIN, INF),
}  # fmt: skip
_NOT_NEGATIVE = ("exp", "abs", "absolute", "square", "sqrt", "rsqrt", "norm", "var", "std", "cosh")


def activation(name: str, source: Value) -> Value:
    """The value `name(source)`."""
    lo, hi = _RANGES[name]
    return Value(lo, hi, activation=name, source=source)


def _activation_rule(name: str, args: Operands, kwargs: dict[str, Any]) -> Value:
    x: Value = args[0]
    if name == "relu6" and x.op == "add3" and x.source is not None:
        return activation("hardsigmoid*6", x.source)
    if name == "tanh" and x.activation == "softplus" and x.source is not None:
        return activation("tanh_softplus", x.source)
    return activation(name, x)


_GATED = {"sigmoid": "silu", "hardsigmoid": "hardswish", "hardsigmoid*6": "hardswish*6", "tanh_softplus": "mish"}


def _gelu(name: str, args: Operands, kwargs: dict[str, Any]) -> Value:
    approximate = kwargs.get("approximate", args[1] if len(args) > 1 else "none")
    return Value(GELU_TANH_MIN if approximate == "tanh" else GELU_MIN, INF, activation="gelu", source=args[0])


def _elu(name: str, args: Operands, kwargs: dict[str, Any]) -> Value:
    return Value(-abs(_number(args, kwargs, 1, "alpha", 1.0)), INF)


def _clamp(name: str, args: Operands, kwargs: dict[str, Any]) -> Value:
    x: Value = args[0]
    low, high, defaults = ("min_val", "max_val", (-1.0, 1.0)) if name == "hardtanh" else ("min", "max", (-INF, INF))
    at_high = 1 if name == "clamp_max" else 2
    lo = _number(args, kwargs, 1, low, defaults[0]) if name != "clamp_max" else -INF
    hi = _number(args, kwargs, at_high, high, defaults[1]) if name != "clamp_min" else INF
    if (lo, hi) == (0, 6):
        return _activation_rule("relu6", args, {})
    if (lo, hi) == (0, INF):
        return _activation_rule("relu", args, {})
    return Value(min(max(x.lo, lo), hi), max(min(x.hi, hi), lo))


def _add(name: str, args: Operands, kwargs: dict[str, Any]) -> Value:
    x, y = args[0], args[1]
    alpha = _number(args, kwargs, 2, "alpha", 1.0) * (-1 if name in ("sub", "subtract") else 1)
    if name == "rsub":
        x, y, alpha = y, x, -1.0
    ends = sorted((_mul(y.lo, alpha), _mul(y.hi, alpha)))
    out = Value(x.lo + ends[0], x.hi + ends[1])
    for term, other in ((x, y), (y, x)):
        if alpha == 1 and _is(other, 3) and not term.constant:
            out.op, out.source = "add3", term
    return out


def _product(name: str, args: Operands, kwargs: dict[str, Any]) -> Value:
    x, y = args[0], args[1]
    if name in ("div", "true_divide", "divide") and kwargs.get("rounding_mode") is None:
        if not y.is_number or y.lo == 0:
            return Value(0 if x.lo >= 0 and y.lo > 0 else -INF)
        y = Value.of(1 / y.lo)
    elif name not in ("mul", "multiply"):
        return Value()
    for factor, other in ((x, y), (y, x)):
        if other.activation in _GATED and other.source is factor:
            return activation(_GATED[other.activation], factor)
        if factor.activation.endswith("*6") and factor.source is not None and _is(other, 1 / 6):
            return activation(factor.activation[:-2], factor.source)
    corners = [_mul(a, b) for a in (x.lo, x.hi) for b in (y.lo, y.hi)]
    return Value(0 if x is y else min(corners), max(corners))


def _reverse_div(name: str, args: Operands, kwargs: dict[str, Any]) -> Value:
    return Value(0) if args[0].lo >= 0 and args[1].lo >= 0 else Value()


def _neg(name: str, args: Operands, kwargs: dict[str, Any]) -> Value:
    return Value(-args[0].hi, -args[0].lo)


def _pow(name: str, args: Operands, kwargs: dict[str, Any]) -> Value:
    exponent = _number(args, kwargs, 1, "exponent", 1.0)
    return Value(0) if args[0].lo >= 0 or exponent % 2 == 0 else Value()


def _extremum(name: str, args: Operands, kwargs: dict[str, Any]) -> Value:
    x = args[0]
    y = kwargs.get("other", args[1] if len(args) > 1 else None)
    if not isinstance(y, Value) or (y.op == "number" and name in ("max", "min")):  # a reduction over a dimension
        return Value(x.lo, x.hi)
    pick = max if name in ("max", "maximum", "fmax") else min
    if pick is max and (_is_zero(y) or _is_zero(x)):
        return activation("relu", x if _is_zero(y) else y)
    return Value(pick(x.lo, y.lo), pick(x.hi, y.hi))


def _is_zero(x: Value) -> bool:
    return x.is_number and x.lo == 0


def _sum(name: str, args: Operands, kwargs: dict[str, Any]) -> Value:
    return Value(0 if args[0].lo >= 0 else -INF, 0 if args[0].hi <= 0 else INF)


def _same(name: str, args: Operands, kwargs: dict[str, Any]) -> Value:
    return Value(args[0].lo, args[0].hi)


def _with_zeros(name: str, args: Operands, kwargs: dict[str, Any]) -> Value:
    return Value(min(args[0].lo, 0), max(args[0].hi, 0))


def _pad(name: str, args: Operands, kwargs: dict[str, Any]) -> Value:
    if kwargs.get("mode", args[2] if len(args) > 2 else "constant") != "constant":
        return _same(name, args, kwargs)
    border = _number(args, kwargs, 3, "value", 0.0)
    return Value(min(args[0].lo, border), max(args[0].hi, border))


def _interpolate(name: str, args: Operands, kwargs: dict[str, Any]) -> Value:
    mode = kwargs.get("mode", args[3] if len(args) > 3 else "nearest")
    return Value() if mode == "bicubic" else _same(name, args, kwargs)  # bicubic overshoots


def _join(name: str, args: Operands, kwargs: dict[str, Any]) -> Value:
    parts = args[0] if args else kwargs.get("tensors", ())
    return _hull([p for p in parts if isinstance(p, Value)]) if isinstance(parts, Sequence) and parts else Value()


def _where(name: str, args: Operands, kwargs: dict[str, Any]) -> Value:
    values = [v for v in args[1:3] if isinstance(v, Value)]
    return _hull(values) if len(values) == 2 else Value()


def _fill(name: str, args: Operands, kwargs: dict[str, Any]) -> Value:
    value = _number(args, kwargs, 2, "value", INF)
    return _hull([args[0], Value.of(value)]) if value < INF else Value()


SHAPE_OPS = frozenset(
    "view view_as reshape reshape_as flatten unflatten permute transpose t T mT movedim moveaxis swapaxes swapdims squeeze "
    "unsqueeze expand expand_as broadcast_to repeat repeat_interleave tile contiguous clone detach data to type type_as "
    "float half bfloat16 double cpu cuda getitem narrow select index_select take gather chunk split split_with_sizes "
    "tensor_split hsplit vsplit unbind unfold roll flip rot90 channel_shuffle pixel_shuffle pixel_unshuffle "
    "native_channel_shuffle alias view_as_real".split()
)
_POOLING = (
    "mean amax amin median adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d "
    "adaptive_max_pool2d adaptive_max_pool3d max_pool1d max_pool2d max_pool3d max_pool1d_with_indices "
    "max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d_with_indices"
).split()
_DROPOUT = (
    "dropout dropout1d dropout2d dropout3d feature_dropout avg_pool1d avg_pool2d avg_pool3d tril triu masked_select"
).split()
# Learned or mixing operations: their output is not the input image any more.
MIXING_OPS = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear bilinear matmul mm bmm addmm baddbmm "
    "einsum tensordot scaled_dot_product_attention multi_head_attention_forward embedding".split()
)
# Those of them whose learned operand makes a layer.
WEIGHT_OPS = MIXING_OPS - {"embedding"}

RULES: dict[str, Rule] = {}


def _register(rule: Rule, names: Sequence[str]) -> None:
    RULES.update(dict.fromkeys(names, rule))


_register(_activation_rule, [n for n in _RANGES if "*" not in n and n != "tanh_softplus"])
_register(lambda name, args, kwargs: Value(0), _NOT_NEGATIVE)
_register(_gelu, ["gelu"])
_register(_elu, ["elu", "celu"])
_register(_clamp, ["clamp", "clip", "clamp_min", "clamp_max", "hardtanh"])
_register(_add, ["add", "sub", "subtract", "rsub"])
_register(_product, ["mul", "multiply", "div", "divide", "true_divide"])
_register(_reverse_div, ["rdiv", "rtruediv"])
_register(_neg, ["neg", "negative"])
_register(_pow, ["pow"])
_register(_extremum, ["max", "min", "maximum", "minimum", "fmax", "fmin"])
_register(_sum, ["sum"])
_register(_same, [*SHAPE_OPS, *_POOLING])
_register(_with_zeros, _DROPOUT)
_register(_pad, ["pad"])
_register(_interpolate, ["interpolate", "upsample"])
_register(_join, ["cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"])
_register(_where, ["where"])
_register(_fill, ["masked_fill"])


def infer(name: str, args: Operands, kwargs: dict[str, Any], parents: tuple[Value, ...]) -> Value:
    """The value of operation `name` (canonical, without underscores) on arguments whose tensors and numbers are Values."""
    rule = RULES.get(name)
    out = rule(name, args, kwargs) if rule is not None and args and _fits(name, args) else Value()
    out.op = out.op or name
    out.parents = parents
    known = [p for p in parents if not p.constant]
    if not known:
        out.constant = True
        out.learned = any(p.learned for p in parents)
    elif name not in MIXING_OPS and not out.activation:
        out.raw = all(p.raw for p in known)
        out.opaque = any(p.opaque for p in known) and out.lo == -INF
    return out


def _fits(name: str, args: Operands) -> bool:
    """Whether the operands a rule reads are Values (`x / (1, 2)` would not be)."""
    rule = RULES[name]
    if rule is _join or rule is _where:
        return True
    needed = 2 if rule in (_add, _product, _reverse_div) else 1
    return len(args) >= needed and all(isinstance(arg, Value) for arg in args[:needed])
