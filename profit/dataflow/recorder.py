"""The eyes of the trace: a `TorchFunctionMode` that gives every tensor its bounds, and hooks that tell which
module is running."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ConversionError
from . import bounds
from .bounds import Value
from .flow import LayerFlow, gate_layers, kind_of
from .refusal import leave_out, several

_METADATA = frozenset(
    "size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex element_size get_device "
    "storage_offset data_ptr type untyped_storage is_same_size is_tensor __len__ __hash__ __format__ __repr__".split()
)
_REDUCTIONS = ("mean", "amax", "max", "sum")
_KEEPS_IDENTITY = bounds.SHAPE_OPS  # returned unchanged (`x.contiguous()`): still the same value, not a read of it


@dataclass
class _Frame:
    """A module that is running: the value it was given, and for a layer whether its weight was used."""

    name: str
    module: nn.Module
    given: Value | None
    shape: tuple[int, ...]
    is_layer: bool
    weight_used: bool = False


@dataclass
class _Calls:
    """What was seen of one layer."""

    given: list[Value] = field(default_factory=list)
    flow: LayerFlow | None = None


class Recorder(TorchFunctionMode):
    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], decided: Collection[str], left_out: Collection[str]
    ) -> None:
        super().__init__()
        self.values: Any = WeakTensorKeyDictionary()
        self.layers, self.decided, self.left_out = layers, frozenset(decided), frozenset(left_out)
        self.hidden: dict[str, tuple[str, str]] = {}  # module that uses a weight in an operation of its own -> class, operation
        self.names = {id(m): name for name, m in layers.items()}
        self.weights: dict[int, set[str]] = {}
        for name, module in layers.items():
            self.weights.setdefault(id(module.weight), set()).add(name)
        self.constants = {id(t) for t in _own_tensors(model)}
        self.stack: list[_Frame] = []
        self.runs: Counter[str] = Counter()
        self.seen: dict[str, _Calls] = {}
        self.operations = 0

    # ---- modules -------------------------------------------------------------------------------------------------

    @contextmanager
    def hooked(self, model: nn.Module):
        """Hooks on every module for the time of the trace."""
        handles = []
        try:
            for name, module in model.named_modules():
                if not isinstance(module, torch.jit.ScriptModule):
                    handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
                    handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str):
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.runs[name] += 1
            tensor = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
            given = None if tensor is None else self._value(tensor)
            layer = self.names.get(id(module))
            if layer is not None and given is not None:
                given.readers.add(layer)
                self.seen.setdefault(layer, _Calls()).given.append(given)
            shape = () if tensor is None else tuple(tensor.shape)
            self.stack.append(_Frame(layer or name, module, given, shape, layer is not None))

        return hook

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        frame = self.stack.pop()
        while frame.module is not module:  # left behind by a forward that raised and was caught
            frame = self.stack.pop()
        value = self.values.get(output) if isinstance(output, Tensor) else None
        if frame.is_layer and frame.given is not None:
            if not frame.weight_used or not isinstance(output, Tensor):
                raise ConversionError(f"layer {frame.name!r} ({type(module).__name__}) ran without its weight being seen in a "
                                      "convolution or linear operation; skip it with overrides or filter_fn")  # fmt: skip
            value = Value(op="layer", layer=frame.name, parents=(frame.given,))
            self.values[output] = value
            self._record_call(frame, tuple(output.shape))
        elif value is not None and value.activation and value.source is frame.given and not value.producer:
            value.producer = frame.name

    def _record_call(self, frame: _Frame, output_shape: tuple[int, ...]) -> None:
        calls = self.seen[frame.name]
        if calls.flow is None:
            calls.flow = LayerFlow(frame.name, "", 0.0)
        flow, images = calls.flow, max(frame.shape[0] if len(frame.shape) > 1 else 1, 1)
        flow.calls += 1
        flow.input_shape, flow.output_shape = frame.shape, output_shape
        weight = frame.module._parameters["weight"]
        flow.macs += torch.Size(output_shape).numel() * (weight.numel() // weight.shape[0]) // images

    # ---- operations ----------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in _METADATA:
            return func(*args, **kwargs)
        if func.__name__ == "__get__":  # `x.T` is an operation, `x.shape` is not
            attribute = func(*args, **kwargs)
            if not isinstance(attribute, Tensor):
                return attribute
        self.operations += 1
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        before = [(t, self._value(t), -1 if t.is_inference() else t._version) for t in tensors]
        as_values = tree_map(self._operand, (tuple(args), kwargs))
        output = func(*args, **kwargs)
        self._after(_canonical(func), func, as_values, before, output)
        return output

    def _after(self, name: str, func: Any, operands: Any, before: list[tuple[Tensor, Value, int]], output: Any) -> None:
        self._find_weight(name, before)
        changed = [t for t, _, version in before if version >= 0 and t._version != version]
        if not changed and name in _KEEPS_IDENTITY and any(output is t for t, _, _ in before):
            return
        reader = self.stack[-1].name if self.stack and self.stack[-1].is_layer else self.operations
        for _, value, _ in before:
            value.readers.add(reader)
        parents = tuple(value for _, value, _ in before)
        result = bounds.infer(name, *operands, parents)
        if not parents and name in ("tensor", "as_tensor", "zeros", "ones", "full") and isinstance(output, Tensor):
            result = _constant(output)
        if name == "batch_norm" and parents and self.stack:
            result.norm = self.stack[-1].name
            if parents[0].layer:
                self._note_batch_norm(parents[0].layer)
        self._note_gate(name, parents)
        if name == "setitem":
            result = bounds.infer("cat", [[p for p in operands[0] if isinstance(p, Value)]], {}, parents)
        for tensor in changed:
            self._changed_in_place(tensor, result)
        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        result.pooled = ("pool" in name or name in _REDUCTIONS) and bool(outputs) and _one_per_channel(outputs[0])
        for index, tensor in enumerate(outputs):
            # Parts of a split are values of their own: a read of one is no read of the other.
            self.values[tensor] = result if index == 0 else _copy(result)

    def _value(self, tensor: Tensor) -> Value:
        value = self.values.get(tensor)
        if value is None:
            constant = id(tensor) in self.constants
            learned = constant and isinstance(tensor, nn.Parameter)
            value = self.values[tensor] = Value(constant=constant, learned=learned, opaque=not constant)
        return value

    def _operand(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return self._value(leaf)
        if isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
            return Value.of(float(leaf))
        return leaf

    def _find_weight(self, name: str, before: list[tuple[Tensor, Value, int]]) -> None:
        for tensor, value, _ in before:
            owners = self.weights.get(id(tensor))
            if owners is None:
                if value.learned and name in bounds.WEIGHT_OPS and tensor.dim() > 1:
                    self._note_hidden_weight(name)
                continue
            frame = self.stack[-1] if self.stack else None
            if name in ("conv2d", "linear") and frame is not None and frame.name in owners:
                frame.weight_used = True
            elif name in bounds.MIXING_OPS:
                raise ConversionError(f"layer {sorted(owners)[0]!r}: its weight is used by {name!r} outside of the layer's own "
                                      "forward; skip it with overrides or filter_fn")  # fmt: skip

    def _note_hidden_weight(self, name: str) -> None:
        """A module that convolves or multiplies with a weight without being a Conv2d or Linear: it would stay as it is."""
        if self.stack and not self.left_out.intersection(frame.name for frame in self.stack):
            self.hidden.setdefault(self.stack[-1].name, (type(self.stack[-1].module).__name__, name))

    def _changed_in_place(self, tensor: Tensor, result: Value) -> None:
        """`tensor` holds `result` now; whatever else shares its memory is not known any more."""
        self.values[tensor] = result
        memory = tensor.untyped_storage().data_ptr()
        for other in list(self.values.keys()):
            if other is not tensor and memory and other.untyped_storage().data_ptr() == memory:
                result.readers.add(-2)  # seen through the other view
                self.values[other] = Value(op="changed in place", parents=(result,), raw=self.values[other].raw)

    # ---- findings ------------------------------------------------------------------------------------------------

    def _note_batch_norm(self, layer: str) -> None:
        flow = self.seen[layer].flow
        if flow is not None:
            flow.followed_by_bn = self.stack[-1].name

    def _note_gate(self, name: str, parents: tuple[Value, ...]) -> None:
        """At a product with a sigmoid gate, mark the layers between the gate and the pooling in front of it."""
        if name not in ("mul", "multiply"):
            return
        for gate in parents:
            for layer in gate_layers(gate):
                flow = self.seen[layer].flow
                if flow is not None:
                    flow.squeeze_excite = True

    def finish(self) -> list[LayerFlow]:
        unseen = [name for name in self.layers if name not in self.seen]
        if unseen:
            kinds = [type(self.layers[name]).__name__ for name in unseen]
            raise ConversionError(
                f"{several(unseen, kinds)} {'was' if len(unseen) == 1 else 'were'} not seen in the forward: not run in eval "
                f"mode, or not called as a module; {leave_out(unseen, kinds, self.seen)}"
            )
        if self.hidden:
            names, kinds = list(self.hidden), [kind for kind, _ in self.hidden.values()]
            raise ConversionError(
                f"{several(names, kinds)}: a {self.hidden[names[0]][1]} with a weight outside of Conv2d and Linear, which "
                f"would stay in full precision; {leave_out(names, kinds, self.seen)}"
            )
        return [self._flow(name, calls) for name, calls in self.seen.items()]

    def _flow(self, name: str, calls: _Calls) -> LayerFlow:
        flow, first = calls.flow, calls.given[0]
        assert flow is not None
        kinds = {kind_of(value) for value in calls.given}
        how_to_decide = f"decide it with overrides={{{name!r}: {{'kind': ...}}}}"
        if name not in self.decided:
            if len(kinds) > 1:
                found = " and ".join(sorted(kind for kind, _ in kinds))
                raise ConversionError(f"layer {name!r} is used more than once, with {found} input; {how_to_decide}")
            if any(value.opaque and value.lo == -bounds.INF and not value.raw for value in calls.given):
                raise ConversionError(f"layer {name!r}: its input comes from an operation that cannot be seen (a scripted or "
                                      f"custom autograd function); {how_to_decide}")  # fmt: skip
        flow.kind, flow.offset = kind_of(first)
        flow.activation, flow.producer = first.activation, first.producer
        runs_once = flow.calls == 1 and self.runs[first.producer] == 1
        flow.sole_reader = runs_once and first.readers == {name}
        flow.norm = self._norm_in_front(first) if flow.sole_reader else ""
        return flow

    def _norm_in_front(self, given: Value) -> str:
        """The BatchNorm whose result `given` is, itself or through one activation module; "" if another sees its tensors."""
        result = given.source if given.producer and given.source is not None else given
        # Its input too: a change of it in place between BatchNorm and layer would reach a deferred BatchNorm.
        alone = result.norm and len(result.readers) == 1 and len(result.parents[0].readers) == 1
        return result.norm if alone and self.runs[result.norm] == 1 else ""


def _canonical(func: Any) -> str:
    """One name for the spellings of an operation: `torch.relu_`, `Tensor.__iadd__`, the getter of `Tensor.T`."""
    name = func.__name__
    if name == "__get__":
        return str(func.__self__.__name__)
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) and "aten" not in str(func):
        return f"custom:{func}"
    if name.startswith("__") and name.endswith("__"):
        return name[2:-2]
    return name.split(".")[0].rstrip("_")


def _own_tensors(model: nn.Module) -> Iterable[Tensor]:
    """Parameters, buffers and tensors kept as plain attributes: constants, as far as the bounds go."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (t for t in vars(module).values() if isinstance(t, Tensor))


def _constant(tensor: Tensor) -> Value:
    lo, hi = (float(tensor.min()), float(tensor.max())) if tensor.numel() else (0.0, 0.0)
    return Value(lo, hi, op="constant", constant=True)


def _one_per_channel(tensor: Tensor) -> bool:
    """One value per image and channel, as global pooling leaves it (also where the map was 1 x 1 before)."""
    return sum(size > 1 for size in tensor.shape[1:]) <= 1


def _copy(value: Value) -> Value:
    return Value(value.lo, value.hi, value.op, value.parents, raw=value.raw, opaque=value.opaque, pooled=value.pooled)
