"""Networks and their files: building what a recipe names, saving it with all that is needed to build it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from profit.allowed import FIRST_WEIGHTS
from profit.data import DataBundle
from profit.errors import CheckpointError, ConversionError, DataError, RecipeError
from profit.files import sha256_of_tensors, write_atomic
from profit.models import create_model
from profit.quantize import quantize_
from profit.state import apply_quantization_state_, quantization_state
from profit.train.checkpoint import load_checkpoint
from profit.train.recipe import Recipe
from profit.train.trial import tried

FORMAT, WITHOUT_CHECKSUM = "profit-model-2", "profit-model-1"  # the second is still read
METADATA_KEY = "profit"
LARGEST = 10**6
_COPIES = 4  # of the weights, in training: their gradients, momentum and average too


@dataclass(frozen=True)
class Architecture:
    """What `create_model` needs to build the same network, and what its outputs stand for.

    `class_names` are those of the data it was trained on, in the order of the outputs; () where they are not known. They do
    not count when two architectures are compared.
    """

    name: str
    classes: int
    in_chans: int
    image_size: int
    args: dict[str, Any]
    class_names: tuple[str, ...] = field(default=(), compare=False)

    def build(self, pretrained: bool = False) -> nn.Module:
        """A freshly initialised full-precision network."""
        return create_model(
            self.name, classes=self.classes, in_chans=self.in_chans, pretrained=pretrained, args=self.args
        )

    def example_input(self, device: torch.device | str = "cpu") -> Tensor:
        """Random images `[2, in_chans, image_size, image_size]`, from a generator of their own."""
        shape = (2, self.in_chans, self.image_size, self.image_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


@dataclass(frozen=True)
class Weights:
    """The content of a weight file; architecture and quantization are None for plain weights."""

    state: dict[str, Tensor]
    architecture: Architecture | None
    quantization: dict[str, Any] | None


def architecture_for(recipe: Recipe, data: DataBundle) -> Architecture:
    """The recipe's network for these data.

    Raises:
        DataError: `model.classes` says another number of classes than the data have.
    """
    wanted = recipe.model.classes
    if wanted is not None and wanted != data.classes:
        raise DataError(f"model.classes is {wanted} but the data set {data.name} has {data.classes} classes")
    return Architecture(
        recipe.model.name, data.classes, data.in_chans, data.image_size, dict(recipe.model.args), data.class_names
    )


def build_network(recipe: Recipe, architecture: Architecture, device: torch.device | str) -> nn.Module:
    """The recipe's network, converted and in full precision (bits None), with its initial weights.

    Raises:
        ConversionError: a network without a convolution. CheckpointError: `model.init` does not fit.
    """
    model = tried(architecture, recipe.model.pretrained, device, _COPIES)
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise ConversionError(f"model.name: {architecture.name} has no convolution: there is nothing for PROFIT to rank")
    weights = read_weights(recipe.model.init) if recipe.model.init else None
    plain = weights is not None and weights.quantization is None
    if weights is not None and plain:
        load_weights(model, weights.state, recipe.model.init, recipe.model.init_allow)
    quantize_(model, recipe.quant, example_inputs=(architecture.example_input(device),))
    if weights is not None and not plain:
        if weights.architecture != architecture:
            raise CheckpointError(f"model.init: {recipe.model.init} holds {_difference(weights.architecture, architecture)}")
        load_weights(model, weights.state, recipe.model.init, recipe.model.init_allow)
    ranks = any(phase.kind == "sample" for phase in recipe.schedule.phases)
    if ranks and not any(getattr(module, "ranked", False) for module in model.modules()):
        raise ConversionError(
            f"model.name: {architecture.name} has no convolution directly followed by BatchNorm, so there is nothing for "
            "PROFIT to rank: set schedule.profit=false"
        )
    return model


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: object, allow: Sequence[str] = ()) -> None:
    """Load every tensor or none.

    Args:
        allow: names or shell patterns of tensors that may be missing, unknown or of another shape; the model keeps its own.

    Raises:
        CheckpointError: names, shapes or kinds of numbers differ, or a value is not finite (the first of them are named); or a
            pattern of `allow` that matches nothing that differs.
    """
    ours = model.state_dict()
    both = [key for key in ours if key in state]
    differing = {
        "lacks": [key for key in ours if key not in state],
        "has the unknown": [key for key in state if key not in ours],
        "has another shape for": [key for key in both if ours[key].shape != state[key].shape],
        "holds other than floating-point numbers for": [
            key for key in both if ours[key].is_floating_point() and not _is_float_or_flag(state[key])
        ],
        "holds NaN or infinity in": [key for key in both if state[key].is_floating_point() and not _is_finite(state[key])],
    }
    found = [key for keys in differing.values() for key in keys]
    for pattern in allow:
        if not any(fnmatchcase(key, pattern) for key in found):
            raise CheckpointError(f"{source}: no tensor that differs ({_first(found) or 'none does'}) is called {pattern!r}")
    for what, keys in differing.items():
        refused = [key for key in keys if not any(fnmatchcase(key, pattern) for pattern in allow)]
        if refused:
            raise CheckpointError(f"{source} does not fit this model: it {what} {_first(refused)}")
    model.load_state_dict({**ours, **{key: state[key] for key in both if key not in found}})


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all())


def _is_float_or_flag(tensor: Tensor) -> bool:
    """Quantizers' flags were stored as booleans once."""
    return tensor.is_floating_point() or (tensor.dtype == torch.bool and tensor.dim() == 0)


def _first(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def network_state(model: nn.Module, architecture: Architecture) -> dict[str, Any]:
    """What a checkpoint stores of a network."""
    return {**_description(model, architecture), "model": model.state_dict()}


def _description(model: nn.Module, architecture: Architecture) -> dict[str, Any]:
    """All that is not a tensor. The names of the classes stand beside the architecture, whose keys earlier versions count."""
    values = asdict(architecture)
    names = values.pop("class_names")
    return {"architecture": values, "class_names": list(names), "quantization": quantization_state(model)}


def save_network(path: str | Path, model: nn.Module, architecture: Architecture, note: Mapping[str, Any]) -> None:
    """Write weights to one .safetensors file whose metadata hold architecture, class names, quantization and `note`, and a
    checksum over these and all tensors.

    Raises:
        ProfitError: it cannot be written.
    """
    from safetensors.torch import save

    tensors = {key: value.detach().to("cpu").contiguous().clone() for key, value in model.state_dict().items()}
    text = json.dumps({"format": FORMAT, "sha256": "", **_description(model, architecture), "note": dict(note)})
    text = text.replace(_checksum(""), _checksum(sha256_of_tensors(text, tensors)), 1)
    # under one key, because safetensors writes several in random order and equal runs would give unequal files
    write_atomic(path, save(tensors, {METADATA_KEY: text}), follow=False)


def _checksum(digest: str) -> str:
    """How the checksum stands in the description; it is computed over the text in which it is empty."""
    return f'"sha256": "{digest}"'


def weight_files(path: Path) -> list[Path]:
    """The files that `read_weights` reads; [] if there are none."""
    if path.is_dir():
        path = path / "model.safetensors"
    if path.with_suffix(".json").is_file():
        return [path.with_suffix(".json"), path.with_suffix(".safetensors")]
    return [path] if path.is_file() else []


def read_weights(path: str | Path) -> Weights:
    """Read model.safetensors of a run, a checkpoint of a run, or plain weights.

    Raises:
        CheckpointError: missing, damaged, or no such file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if path.suffix in ("", ".json") or path.with_suffix(".json").is_file():
        checkpoint = load_checkpoint(path)
        if not {"architecture", "quantization", "model"} <= set(checkpoint):
            raise CheckpointError(f"{path} holds no model")
        return Weights(checkpoint["model"], _architecture(checkpoint, path), checkpoint["quantization"])
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is not a .safetensors file; other formats may run code when they are opened. Convert it "
                              "where you trust it: safetensors.torch.save_file(state_dict, ...)")  # fmt: skip
    return _read_file(path)


def _read_file(path: Path) -> Weights:
    """The content of a .safetensors file, after every check."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"there is no weight file {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable .safetensors file: {error}") from None
    if METADATA_KEY not in metadata:
        if any('"format": "profit-' in value for value in metadata.values()):
            raise CheckpointError(f"{path} is damaged: what it tells of its network stands in another place")
        return Weights(state, None, None)
    text = metadata[METADATA_KEY]
    try:
        description = json.loads(text)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is damaged: what it tells of its network is not JSON") from None
    if not isinstance(description, dict) or description.get("format") not in (FORMAT, WITHOUT_CHECKSUM):
        raise CheckpointError(f"{path} tells of its network in another format than {FORMAT}: written by another version?")
    if description["format"] == FORMAT:
        told = description.get("sha256")
        if told != sha256_of_tensors(text.replace(_checksum(str(told)), _checksum(""), 1), state):
            raise CheckpointError(f"{path} is damaged or was changed: its checksum does not match its content")
    if not isinstance(description.get("quantization"), dict):
        raise CheckpointError(f"{path} is damaged: it does not tell how its network is quantized")
    return Weights(state, _architecture(description, path), description["quantization"])


def _architecture(description: Mapping[str, Any], path: Path) -> Architecture:
    """The architecture in a file's description, its types checked: the file may be anybody's."""
    values = description.get("architecture")
    types = {"name": str, "classes": int, "in_chans": int, "image_size": int, "args": dict}
    fits = isinstance(values, dict) and values.keys() == types.keys()
    wrong = [key for key in types if not isinstance(values[key], types[key]) or values[key] is True] if fits else ["its keys"]
    if wrong:
        raise CheckpointError(f"{path} is damaged: the architecture it tells is not readable ({wrong[0]})")
    numbers = [values["classes"], values["in_chans"], values["image_size"]]
    if not all(1 <= number <= LARGEST for number in numbers):
        raise CheckpointError(f"{path}: classes, in_chans and image_size {numbers} must lie in 1..{LARGEST}")
    names = description.get("class_names") or ()  # earlier versions did not keep them
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if names and not (texts and len(names) == values["classes"]):
        raise CheckpointError(f"{path} is damaged: its class names are not {values['classes']} texts")
    return Architecture(**values, class_names=tuple(names))


def load_network(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, Architecture]:
    """The quantized network of a run folder, of its model.safetensors or of one of its checkpoints, in eval mode.

    Raises:
        CheckpointError: no such file, damaged, or plain weights that do not tell their architecture.
    """
    weights = read_weights(path)
    if weights.architecture is None or weights.quantization is None:
        raise CheckpointError(f"{path} holds plain weights and does not tell which network they are for")
    args = {key: value for key, value in weights.architecture.args.items() if key not in FIRST_WEIGHTS}
    try:
        model = tried(replace(weights.architecture, args=args), False, "cpu")
        apply_quantization_state_(model, weights.quantization)
    except (RecipeError, CheckpointError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: the network it is for cannot be built: {error}") from error
    load_weights(model, weights.state, path)
    return model.to(device).eval(), weights.architecture


def _difference(theirs: Architecture | None, ours: Architecture) -> str:
    if theirs is None:
        return "no architecture"
    changed = [item.name for item in fields(ours) if item.compare and getattr(theirs, item.name) != getattr(ours, item.name)]
    return ", ".join(f"{key} {getattr(theirs, key)!r}, not {getattr(ours, key)!r}" for key in changed)
