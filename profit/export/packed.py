"""The packed file: a network in its true bit widths, in one .safetensors file that needs neither the model's code nor pickle.

Tensors (in full in docs/export.md):

    layer.<name>.codes        uint8     weight codes, packed (profit.export.bits); .weight, float32, where not quantized
    layer.<name>.multiplier   float64   [C_out] folded scale
    layer.<name>.bias         float64   [C_out] folded bias
    constant.<name>           float64   constants of the steps between the layers
    state                     uint8     the rest of the model's state_dict, to load the file into a model again
    description               uint8     zlib-compressed JSON: steps, layer settings, what conversion decided, index of `state`

The metadata hold, as JSON under the key "profit": format, version, and a SHA-256 over every tensor.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_module, check_path
from ..errors import ExportError
from ..files import raw_bytes, sha256_of_tensors, write_atomic
from ..quantize import quant_layers
from ..state import apply_quantization_state_, quantization_state
from .bits import pack, unpack
from .layers import positive
from .network import ActivationCodes, Layer, Network, Step
from .operators import OPERATORS
from .trace import check_call, trace_network

FORMAT, VERSION = "profit-packed", 1
METADATA_KEY = "profit"
_LONGEST_DESCRIPTION = 2**26  # a layer takes about half a kilobyte
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.int64, torch.int32, torch.uint8, torch.bool)}
# What makes two converted models compute different things even with the same tensors and bit widths.
_STRUCTURE = ("type", "quantizer", "kind", "offset", "activation", "fused_from", "weight_granularity", "pad_value")


@dataclass(frozen=True)
class PackedSize:
    """Bytes of a packed file by what they are for; `description` includes the file's own header."""

    codes: int
    float_weights: int
    folded: int
    restore: int
    description: int

    @property
    def total(self) -> int:
        return self.codes + self.float_weights + self.folded + self.restore + self.description


def export_packed(model: nn.Module, path: str | Path, example_inputs: Any, *, restorable: bool = True) -> PackedSize:
    """Write a quantized model to one packed .safetensors file.

    Usage::

        profit.export_packed(model, "net.safetensors", images)

    Args:
        model: converted and calibrated; it is not changed.
        path: replaced whole, or not at all.
        example_inputs: images [N, C, H, W] (or a tuple of one such tensor) of the size the network is for; N stays free.
        restorable: also keep what :func:`load_packed_` needs (intervals, biases and BatchNorms in float32, about 16 bytes
            per channel); without it the file serves the integer runtime alone.

    Returns:
        The file's bytes, by purpose.

    Raises:
        ExportError: the model, or one named layer or operator of it, cannot be exported. ProfitError: cannot be written.
        TypeError: an argument of another type.
    """
    check_call(model, path, "export_packed")
    network = trace_network(model, example_inputs)
    return write_packed(path, network, model if restorable else None)


def write_packed(path: str | Path, network: Network, model: nn.Module | None = None) -> PackedSize:
    """Write a traced network; with `model`, the state it was traced from as well."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = dict(network.constants)
    for name, layer in network.layers.items():
        if layer.weight_bits is None:
            tensors[f"layer.{name}.weight"] = layer.weight
        else:
            tensors[f"layer.{name}.codes"] = pack(layer.weight, layer.weight_bits)
        tensors[f"layer.{name}.multiplier"] = layer.multiplier
        tensors[f"layer.{name}.bias"] = layer.bias
    description: dict[str, Any] = {"network": network.to_dict()}
    if model is not None:
        description["quantization"] = quantization_state(model)
        rest = {k: v for k, v in model.state_dict().items() if k not in {f"{name}.weight" for name in network.layers}}
        description["state"] = [[key, str(v.dtype).removeprefix("torch."), list(v.shape)] for key, v in rest.items()]
        tensors["state"] = torch.cat([torch.empty(0, dtype=torch.uint8), *map(raw_bytes, rest.values())])
    text = json.dumps(description, separators=(",", ":")).encode()
    tensors["description"] = torch.frombuffer(bytearray(zlib.compress(text, 9)), dtype=torch.uint8)
    tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
    head = {"format": FORMAT, "version": VERSION, "sha256": sha256_of_tensors(f"{FORMAT} {VERSION}", tensors)}
    data = save(tensors, {METADATA_KEY: json.dumps(head)})
    write_atomic(path, data)
    sizes = {name: value.numel() * value.element_size() for name, value in tensors.items()}

    def total(prefix: str, ending: str | tuple[str, ...] = "") -> int:
        return sum(size for name, size in sizes.items() if name.startswith(prefix) and name.endswith(ending))

    return PackedSize(
        codes=total("layer.", ".codes"),
        float_weights=total("layer.", ".weight"),
        folded=total("layer.", (".multiplier", ".bias")) + total("constant."),
        restore=sizes.get("state", 0),
        description=sizes["description"] + len(data) - sum(sizes.values()),
    )


def read_packed(path: str | Path) -> Network:
    """The network of a packed file, for :class:`~profit.export.runtime.IntegerRuntime`.

    Raises:
        ExportError: no such file, not a packed file, truncated, changed, or of another version. TypeError: no path.
    """
    return _read(path).network


def load_packed_(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a packed file into a model of the same architecture, in place; returns the model, in eval mode.

    A model that is not converted yet is converted as the file says. Outputs are those of the exported model bit for bit;
    the latent weights, which no file of codes can hold, become the centres of their codes.

    Raises:
        ExportError: the file cannot be used (see :func:`read_packed`), lacks what this needs, or is of another model.
        CheckpointError: the model has other layers. A model that was not converted before may be converted by then.
        TypeError: no model, or no path.
    """
    check_module(model)
    content = _read(path)
    network, quantization, state = content.network, content.quantization, content.state
    if quantization is None:
        raise ExportError(f"{path} was exported without what a model needs (restorable=False): export it again with it")
    if not quant_layers(model):
        apply_quantization_state_(model, quantization)
    else:
        _check_structure(path, quantization_state(model)["layers"], quantization["layers"])
    for name, layer in network.layers.items():
        weight = layer.weight
        if layer.weight_bits is not None:
            interval = positive(state[f"{name}.weight_quantizer.a"]).view(-1, *[1] * (weight.dim() - 1))
            weight = weight.double() * interval / (2 ** (layer.weight_bits - 1) - 1)
        state[f"{name}.weight"] = weight.float()
    ours = model.state_dict()
    wrong = [key for key in ours if key not in state or state[key].shape != ours[key].shape]
    wrong += [key for key in state if key not in ours]
    if wrong:
        raise ExportError(f"{path} does not fit this model: {wrong[0]!r} is missing, or has another shape, on one side")
    for name, layer in quant_layers(model).items():
        saved = quantization["layers"][name]
        layer.weight_quantizer.bits, layer.input_quantizer.bits = saved["weight_bits"], saved["act_bits"]
    model.load_state_dict(state)
    return model.eval()


def _check_structure(path: str | Path, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    if ours.keys() != theirs.keys():
        raise ExportError(f"{path} has other quantized layers than the model")
    for name, settings in ours.items():
        for key in _STRUCTURE:
            if settings[key] != theirs[name][key]:
                raise ExportError(f"{path}: layer {name!r} has {key} {theirs[name][key]!r}, the model {settings[key]!r}")


@dataclass(frozen=True)
class _Content:
    """A packed file; the last two are there only if it is restorable."""

    network: Network
    quantization: dict[str, Any] | None
    state: dict[str, Tensor]


def _read(path: str | Path) -> _Content:
    """The content of a file, after every check."""
    from safetensors import SafetensorError, safe_open

    check_path(path, "read_packed(path)")
    path = Path(path)
    if path.is_dir():
        raise ExportError(f"{path} is a folder: name the packed .safetensors file in it")
    if not path.is_file():
        raise ExportError(f"there is no packed file {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path} is not a readable .safetensors file (truncated?): {error}") from None
    try:
        head = json.loads(metadata.get(METADATA_KEY, "null"))
    except (ValueError, RecursionError):
        raise ExportError(f"{path} is damaged: its metadata are not JSON") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ExportError(f"{path} is not a packed network: profit export RUN --format packed writes one")
    if head.get("version") != VERSION:
        raise ExportError(
            f"{path} is version {head.get('version')!r} of the packed format, this program reads version {VERSION}: "
            "export it again"
        )
    if head.get("sha256") != sha256_of_tensors(f"{FORMAT} {VERSION}", tensors):
        raise ExportError(f"{path} is damaged or was changed: its checksum does not match its content")
    try:
        description = json.loads(_inflated(tensors["description"].numpy()))
        network = _network(description["network"], tensors)
        state = _state(description.get("state", []), tensors.get("state", torch.empty(0, dtype=torch.uint8)))
    # Its checksum is right: only a file made to deceive comes here.
    except (
        ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError, zlib.error,
    ) as error:  # fmt: skip
        raise ExportError(f"{path} does not describe a network: {' '.join(str(error).split())}") from None
    return _Content(network, description.get("quantization"), state)


def _inflated(data: Any) -> bytes:
    """The text of a description; a few kilobytes can be made to stand for gigabytes."""
    inflate = zlib.decompressobj()
    text = inflate.decompress(data, _LONGEST_DESCRIPTION)
    if inflate.unconsumed_tail:
        raise ValueError(f"its description is longer than {_LONGEST_DESCRIPTION:,} bytes")
    if not inflate.eof:
        raise ValueError("its description is cut off")
    return text


def _state(index: list[list[Any]], data: Tensor) -> dict[str, Tensor]:
    """The tensors that `state` holds one behind the other."""
    state, at = {}, 0
    for key, kind, shape in index:
        dtype = _DTYPES[kind]
        size = dtype.itemsize * int(torch.tensor(shape, dtype=torch.int64).prod())
        state[key] = data[at : at + size].clone().view(dtype).reshape(shape)
        at += size
    return state


def _network(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Network:
    steps = []
    for step in values["steps"]:
        if step["op"] != "layer" and step["op"] not in OPERATORS:
            raise ValueError(f"unknown operator {step['op']!r}")
        steps.append(Step(step["op"], tuple(step["inputs"]), step["output"], tuple(step["shape"]), dict(step["settings"])))
    layers = {name: _layer(settings, tensors) for name, settings in values["layers"].items()}
    constants = {name: tensors[name] for name in values["constants"]}
    return Network(tuple(values["input_shape"]), values["output"], tuple(steps), layers, constants)


def _layer(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Layer:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    shape, prefix = values.pop("shape"), f"layer.{values['name']}."
    codes = values.pop("codes")
    bits = values["weight_bits"]
    weight = tensors[prefix + "weight"] if bits is None else unpack(tensors[prefix + "codes"], bits, shape)
    return Layer(
        weight=weight,
        codes=None if codes is None else ActivationCodes(**codes),
        multiplier=tensors[prefix + "multiplier"],
        bias=tensors[prefix + "bias"],
        **values,
    )
