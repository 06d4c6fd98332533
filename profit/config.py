"""What to quantize, and how: the configuration of a conversion and what it resolves to for one layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, NoReturn

Kind = Literal["raw", "unsigned", "offset", "signed"]

KINDS: tuple[str, ...] = ("raw", "unsigned", "offset", "signed")
ACTIVATIONS: tuple[str, ...] = ("none", "relu", "relu6", "hardswish")
QUANTIZERS: tuple[str, ...] = ("duq", "pact", "qil", "lsq", "lsq+")
MIN_BITS, MAX_BITS = 2, 8

_OVERRIDE_KEYS = ("weight_bits", "act_bits", "kind", "offset", "padding", "skip")


def check_bits(bits: int | None, what: str = "bits") -> int | None:
    """Return `bits` unchanged if it is None (full precision) or an integer from 2 to 8.

    Raises:
        TypeError: not an integer. ValueError: out of range. `what` names the value in the message.
    """
    if bits is None:
        return None
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(
            f"{what} must be an integer from {MIN_BITS} to {MAX_BITS}, or None for full precision; got {bits!r}"
        )
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{what}={bits} is out of range: choose {MIN_BITS} to {MAX_BITS}, or None for full precision")
    return bits


def check_choice(value: object, choices: tuple[str, ...], what: str) -> None:
    """Raise ValueError, naming `what` and the choices, unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{what}={value!r} is not known: choose one of {', '.join(choices)}")


@dataclass(frozen=True)
class LayerSettings:
    """What a :class:`DuQConfig` says about one layer.

    `own_weight_bits` and `own_act_bits` tell that the bit width was set for this very layer, so that neither
    `first_last_bits` nor a later change of the common bit width moves it. `kind` and `offset` are None where the data
    flow decides.
    """

    weight_bits: int | None
    act_bits: int | None
    own_weight_bits: bool
    own_act_bits: bool
    kind: str | None
    offset: float | None
    padding: str
    skip: bool

    def resolve_kind(self, kind: str | None, offset: float | None) -> tuple[str, float]:
        """(kind, offset) of the input: what is set here, else the arguments, else signed, which holds for any data."""
        if self.kind is not None or self.offset is not None:
            return ("offset", float(self.offset)) if self.offset is not None else (str(self.kind), 0.0)
        if kind is None:
            return "signed", 0.0
        return kind, float(offset or 0.0)


class _Fixed(dict[str, Any]):
    """A dict that nobody can change and that has a hash; as a dict it goes to JSON, and pickles by its content."""

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("the overrides of a DuQConfig cannot be changed: make another with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


@dataclass(frozen=True)
class DuQConfig:
    """How a model is quantized.

    Attributes:
        weight_bits, act_bits: 2 to 8, or None to leave that side in full precision.
        weight_granularity: one interval per weight tensor (as published) or per output channel.
        padding: "negative" pads a k x k convolution fed by an offset quantizer with the offset (PROFIT, section 3:
            -3/8 for h-swish, the value of code 0); "zero" keeps the padding of the original model.
        first_last_bits: weight bits of the first (image-fed) and the last layer; None means the common `weight_bits`.
        quantizer: "duq", or one of the baselines "pact", "qil", "lsq", "lsq+".
        input_kinds: "data_flow" derives every kind from the lower bound of what feeds the layer; "original" is the same
            but feeds squeeze-and-excite layers signed, the choice of the method's authors.
        fuse: let a convolution apply the BatchNorm in front of it, where it alone reads it, and compute other BatchNorms
            together with the activation inside them: one tensor kept for the backward instead of up to three. A hook on a
            BatchNorm that a convolution applies sees its input; `profit.unfuse_` takes it all back.
        fuse_activations: move a ReLU, ReLU6 or h-swish module into the quantizer of its only reader.
        overrides: layer name or shell pattern (`"blocks.*.conv_dw"`) -> mapping with any of weight_bits, act_bits, kind,
            offset, padding, skip. Later entries win; a pattern that matches no layer is an error at conversion. Copied,
            and fixed from then on.

    Raises:
        ValueError, TypeError: a value out of its range, or an unknown override key.
    """

    weight_bits: int | None = 4
    act_bits: int | None = 4
    weight_granularity: Literal["per_tensor", "per_channel"] = "per_tensor"
    padding: Literal["negative", "zero"] = "negative"
    first_last_bits: int | None = None
    quantizer: Literal["duq", "pact", "qil", "lsq", "lsq+"] = "duq"
    input_kinds: Literal["data_flow", "original"] = "data_flow"
    fuse: bool = True
    fuse_activations: bool = True
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_bits(self.weight_bits, "weight_bits")
        check_bits(self.act_bits, "act_bits")
        check_bits(self.first_last_bits, "first_last_bits")
        check_choice(self.weight_granularity, ("per_tensor", "per_channel"), "weight_granularity")
        check_choice(self.padding, ("negative", "zero"), "padding")
        check_choice(self.quantizer, QUANTIZERS, "quantizer")
        check_choice(self.input_kinds, ("data_flow", "original"), "input_kinds")
        for name in ("fuse", "fuse_activations"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False; got {getattr(self, name)!r}")
        if not isinstance(self.overrides, Mapping):
            raise TypeError(f"overrides must map layer names to settings; got {type(self.overrides).__name__}")
        for pattern, settings in self.overrides.items():
            _check_override(pattern, settings)
        copied = _Fixed({pattern: _Fixed(settings) for pattern, settings in self.overrides.items()})
        object.__setattr__(self, "overrides", copied)

    def for_layer(self, name: str) -> LayerSettings:
        """Settings of the layer called `name`: the common values with every matching override applied in order."""
        merged: dict[str, Any] = {}
        for pattern, settings in self.overrides.items():
            if pattern == name or fnmatchcase(name, pattern):
                merged.update(settings)
        return LayerSettings(
            weight_bits=merged.get("weight_bits", self.weight_bits),
            act_bits=merged.get("act_bits", self.act_bits),
            own_weight_bits="weight_bits" in merged,
            own_act_bits="act_bits" in merged,
            kind=merged.get("kind"),
            offset=merged.get("offset"),
            padding=merged.get("padding", self.padding),
            skip=merged.get("skip", False),
        )

    def difference(self, other: DuQConfig) -> str:
        """The first value in which `other` differs, as "with padding='zero', not 'negative'" (`other`'s first)."""
        for name in self.__dataclass_fields__:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"with {name}={theirs!r}, not {ours!r}"
        return "alike"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict; :meth:`from_dict` is its inverse."""
        out = asdict(self)
        out["overrides"] = {name: dict(settings) for name, settings in self.overrides.items()}
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DuQConfig:
        """Build from :meth:`to_dict`'s form. Raises ValueError naming a key that does not exist."""
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"unknown quantization setting {unknown[0]!r}: known are {', '.join(cls.__dataclass_fields__)}"
            )
        return cls(**values)


def _check_override(pattern: object, settings: object) -> None:
    where = f"overrides[{pattern!r}]"
    if not isinstance(pattern, str) or not isinstance(settings, Mapping):
        raise TypeError(f"{where}: overrides map a layer name or pattern to a mapping of settings")
    unknown = sorted(set(settings) - set(_OVERRIDE_KEYS))
    if unknown:
        raise ValueError(f"{where}: unknown setting {unknown[0]!r}; known are {', '.join(_OVERRIDE_KEYS)}")
    for key in ("weight_bits", "act_bits"):
        check_bits(settings.get(key), f"{where}: {key}")
    if "kind" in settings:
        check_choice(settings["kind"], KINDS, f"{where}: kind")
    if "padding" in settings:
        check_choice(settings["padding"], ("negative", "zero"), f"{where}: padding")
    if not isinstance(settings.get("skip", False), bool):
        raise TypeError(f"{where}: skip must be True or False; got {settings['skip']!r}")
    offset = settings.get("offset")
    if offset is not None:
        if isinstance(offset, bool) or not isinstance(offset, (int, float)) or not math.isfinite(offset) or offset >= 0:
            raise ValueError(f"{where}: offset={offset!r} must be a finite number below 0")
        if settings.get("kind", "offset") != "offset":
            raise ValueError(f"{where}: an offset goes with kind='offset', not kind={settings['kind']!r}")
    elif settings.get("kind") == "offset":
        raise ValueError(f"{where}: kind='offset' needs the offset as well, for example offset=-0.375")
