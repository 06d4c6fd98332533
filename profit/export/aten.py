"""From the operators of PyTorch's exported graph to those of :mod:`profit.export.operators`.

Each converter takes the arguments of one ATen operator, with tensors replaced by value names (str) or :class:`Constant`,
and returns (operator, inputs, settings); a plain name means that the operator changes nothing in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Operand = Any  # str, Constant or a number
Converted = str | tuple[str, Sequence[Operand], dict[str, Any]]


class Unsupported(Exception):
    """Why one operator cannot be exported; the caller adds the operator's name and place."""


@dataclass(frozen=True)
class Constant:
    """A parameter, buffer or literal tensor of the model."""

    name: str
    tensor: Tensor


@dataclass(frozen=True)
class Shapes:
    """Shapes of an operator's first input and of its output, -1 for the number of images."""

    input: tuple[int, ...]
    output: tuple[int, ...]


def _pair(value: int | Sequence[int]) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _binary(name: str) -> Callable[..., Converted]:
    def convert(shapes: Shapes, x: Operand, y: Operand, alpha: float = 1, rounding_mode: str | None = None) -> Converted:
        if alpha != 1 or rounding_mode is not None:
            raise Unsupported("with alpha or rounding_mode")
        return name, (x, y), {}

    return convert


def _rsub(shapes: Shapes, x: Operand, y: Operand, alpha: float = 1) -> Converted:
    return _binary("sub")(shapes, y, x, alpha)


def _unary(name: str) -> Callable[..., Converted]:
    return lambda shapes, x: (name, (x,), {})


def _clip(shapes: Shapes, x: Operand, low: float | None = None, high: float | None = None) -> Converted:
    return "clip", (x,), {"low": low, "high": high}


def _hardtanh(shapes: Shapes, x: Operand, low: float = -1.0, high: float = 1.0) -> Converted:
    return "clip", (x,), {"low": low, "high": high}


def _identity(shapes: Shapes, x: Operand, *rest: Any, **settings: Any) -> Converted:
    return x


def _dropout(shapes: Shapes, x: Operand, p: float, train: bool) -> Converted:
    if train:
        raise Unsupported("active in eval mode, so the output is random")
    return x


def _to(shapes: Shapes, x: Operand, *rest: Any, **settings: Any) -> Converted:
    return x  # the caller has checked that the result is float32


def _mean(shapes: Shapes, x: Operand, dims: Sequence[int] | None = None, keepdim: bool = False) -> Converted:
    rank = len(shapes.input)
    dims = sorted(d % rank for d in (range(rank) if not dims else dims))
    if 0 in dims:
        raise Unsupported("over the images of the batch")
    return "mean", (x,), {"dims": dims, "keepdim": keepdim}


def _adaptive_avg_pool(shapes: Shapes, x: Operand, size: Any) -> Converted:
    kernel = _even_windows(shapes)
    if kernel == list(shapes.input[-2:]):
        return "mean", (x,), {"dims": [2, 3], "keepdim": True}
    return "avg_pool", (x,), {"kernel": kernel, "stride": kernel, "padding": [0, 0], "ceil_mode": False,
                              "count_include_pad": True}  # fmt: skip


def _adaptive_max_pool(shapes: Shapes, x: Operand, size: Any) -> Converted:
    kernel = _even_windows(shapes)
    return "max_pool", (x,), {"kernel": kernel, "stride": kernel, "padding": [0, 0], "dilation": [1, 1], "ceil_mode": False}


def _even_windows(shapes: Shapes) -> list[int]:
    sizes = list(zip(shapes.input[-2:], shapes.output[-2:], strict=True))
    if len(shapes.input) != 4 or any(n % m for n, m in sizes):
        raise Unsupported(f"from {shapes.input} to {shapes.output}: its windows overlap")
    return [n // m for n, m in sizes]


def _avg_pool(
    shapes: Shapes, x: Operand, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor: int | None = None,
) -> Converted:  # fmt: skip
    if divisor is not None:
        raise Unsupported("with divisor_override")
    return "avg_pool", (x,), {"kernel": _pair(kernel), "stride": _pair(stride or kernel), "padding": _pair(padding),
                              "ceil_mode": ceil_mode, "count_include_pad": count_include_pad}  # fmt: skip


def _max_pool(
    shapes: Shapes, x: Operand, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Converted:
    return "max_pool", (x,), {"kernel": _pair(kernel), "stride": _pair(stride or kernel), "padding": _pair(padding),
                              "dilation": _pair(dilation), "ceil_mode": ceil_mode}  # fmt: skip


def _amax(shapes: Shapes, x: Operand, dims: Sequence[int] = (), keepdim: bool = False) -> Converted:
    if len(shapes.input) != 4 or sorted(d % 4 for d in dims) != [2, 3] or not keepdim:
        raise Unsupported("other than over height and width with keepdim")
    kernel = list(shapes.input[2:])
    return "max_pool", (x,), {"kernel": kernel, "stride": kernel, "padding": [0, 0], "dilation": [1, 1], "ceil_mode": False}


def _reshape(shapes: Shapes, x: Operand, *rest: Any, **settings: Any) -> Converted:
    if shapes.output.count(-1) != 1:
        raise Unsupported(f"from {shapes.input} to {shapes.output}: the number of images must stay one dimension")
    return x if shapes.input == shapes.output else ("reshape", (x,), {"shape": list(shapes.output)})


def _permute(shapes: Shapes, x: Operand, dims: Sequence[int]) -> Converted:
    return "permute", (x,), {"dims": [d % len(shapes.input) for d in dims]}


def _transpose(shapes: Shapes, x: Operand, one: int, other: int) -> Converted:
    dims = list(range(len(shapes.input)))
    dims[one], dims[other] = dims[other], dims[one]
    return "permute", (x,), {"dims": dims}


def _cat(shapes: Shapes, parts: Sequence[Operand], dim: int = 0) -> Converted:
    dim %= len(shapes.output)
    if dim == 0:
        raise Unsupported("along the images of the batch")
    return "cat", tuple(parts), {"dim": dim}


def _slice(shapes: Shapes, x: Operand, dim: int = 0, start: Any = None, stop: Any = None, step: int = 1) -> Converted:
    dim %= len(shapes.input)
    if shapes.input == shapes.output:
        return x
    if dim == 0:
        raise Unsupported("of the images of the batch")
    size = shapes.input[dim]
    start, stop, step = slice(start, stop, step).indices(size)
    return "slice", (x,), {"dim": dim, "start": start, "stop": stop, "step": step}


def _pad(shapes: Shapes, x: Operand, pads: Sequence[int], *rest: Any, **settings: Any) -> Converted:
    """constant_pad_nd(x, pads, value) and pad(x, pads, mode, value)."""
    rest = list(rest)
    mode = settings.get("mode", rest.pop(0) if rest and isinstance(rest[0], str) else "constant")
    value = settings.get("value", rest[0] if rest else None)
    if mode != "constant" or len(pads) > 4 or any(p < 0 for p in pads):
        raise Unsupported(f"of mode {mode!r} with {list(pads)}")
    return "pad", (x,), {"pads": list(pads), "value": float(value or 0.0)}


def _gelu(shapes: Shapes, x: Operand, approximate: str = "none") -> Converted:
    return "gelu", (x,), {"approximate": approximate}


def _leaky_relu(shapes: Shapes, x: Operand, slope: float = 0.01) -> Converted:
    return "leaky_relu", (x,), {"slope": slope}


def _softmax(shapes: Shapes, x: Operand, dim: int, *rest: Any) -> Converted:
    return "softmax", (x,), {"dim": dim % len(shapes.input)}


CONVERTERS: dict[str, Callable[..., Converted]] = {
    **{f"{name}.{kind}": _binary(name) for name in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")},
    **{f"{name}.default": _unary(name) for name in ("relu", "hardswish", "hardsigmoid", "sigmoid", "silu", "tanh")},
    "rsub.Scalar": _rsub,
    "rsub.Tensor": _rsub,
    "neg.default": lambda shapes, x: ("mul", (x, -1.0), {}),
    "relu6.default": lambda shapes, x: ("clip", (x,), {"low": 0.0, "high": 6.0}),
    "hardtanh.default": _hardtanh,
    "clamp.default": _clip,
    "clamp_min.default": lambda shapes, x, low: ("clip", (x,), {"low": low, "high": None}),
    "clamp_max.default": lambda shapes, x, high: ("clip", (x,), {"low": None, "high": high}),
    "gelu.default": _gelu,
    "leaky_relu.default": _leaky_relu,
    "softmax.int": _softmax,
    "_softmax.default": _softmax,
    "mean.default": _mean,
    "mean.dim": _mean,
    "amax.default": _amax,
    "adaptive_avg_pool2d.default": _adaptive_avg_pool,
    "adaptive_max_pool2d.default": _adaptive_max_pool,
    "avg_pool2d.default": _avg_pool,
    "max_pool2d.default": _max_pool,
    "max_pool2d_with_indices.default": _max_pool,
    "pad.default": _pad,
    "constant_pad_nd.default": _pad,
    "cat.default": _cat,
    "slice.Tensor": _slice,
    "permute.default": _permute,
    "transpose.int": _transpose,
    **dict.fromkeys(
        ("view.default", "reshape.default", "flatten.using_ints", "unflatten.int", "squeeze.default", "squeeze.dim",
         "squeeze.dims", "unsqueeze.default", "_unsafe_view.default"), _reshape,
    ),  # fmt: skip
    **dict.fromkeys(
        ("contiguous.default", "clone.default", "alias.default", "detach.default", "detach_.default",
         "lift_fresh_copy.default"), _identity,
    ),  # fmt: skip
    **dict.fromkeys(("to.dtype", "to.device", "to.dtype_layout", "_to_copy.default", "type_as.default"), _to),
    "dropout.default": _dropout,
    "feature_dropout.default": _dropout,
    "native_dropout.default": _dropout,
}
