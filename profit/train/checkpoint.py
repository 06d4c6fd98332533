"""Checkpoints: one .safetensors file with the tensors and one .json with everything else and the checksums.

A checkpoint is the .json together with the tensors whose digest it names. New tensors are written beside the old ones
(`.NAME.safetensors.new`), then the .json is replaced, which is the moment the new checkpoint counts, then the tensors take
the old ones' place. Whatever moment a process is killed at, the .json finds its tensors under one of the two names; where it
does not, the checkpoint is damaged and said to be. Nothing is pickled in either direction.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from profit.errors import CheckpointError, ProfitError
from profit.files import clear_leftovers, read_text, sha256, sync_folder, write_atomic

FORMAT = "profit-checkpoint-1"
_TENSOR, _ITEMS = "__tensor__", "__items__"


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write nested `state` (mappings, lists, tensors, plain JSON values) to `path`.safetensors and `path`.json.

    Raises:
        ProfitError: the files cannot be written. TypeError: a value that is neither tensor nor JSON.
    """
    from safetensors.torch import save

    path = Path(path)
    tensors: dict[str, Tensor] = {}
    plain = json.dumps(_encode(state, "", tensors))
    data = save(tensors)
    json_path, tensor_path, new_path = _files(path)
    if new_path.exists():  # a process was killed here before
        _settle(path)
    write_atomic(new_path, data, follow=False)
    head = {"format": FORMAT, "tensors_sha256": sha256(data), "state_sha256": sha256(plain.encode())}
    write_atomic(json_path, json.dumps({**head, "state": json.loads(plain)}), follow=False)
    _rename(new_path, tensor_path)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote; tensors on the CPU, tuples come back as lists.

    Args:
        path: with or without the ending .safetensors or .json.

    Raises:
        CheckpointError: missing, of another format, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    base = path.with_suffix("") if path.suffix in (".safetensors", ".json") else path
    json_path, tensor_path, new_path = _files(base)
    for path in (json_path, tensor_path, new_path):
        if path.exists() and not path.is_file():
            raise CheckpointError(f"cannot read the checkpoint {base}: {path.name} is no regular file")
    try:
        text = read_text(json_path)
        head = json.loads(text)
        contents = [path.read_bytes() for path in (tensor_path, new_path) if path.exists()]
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {base}: {Path(str(error.filename)).name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {base}: {error.strerror or error}") from None
    except (ValueError, RecursionError):  # of JSON and of UTF-8
        raise CheckpointError(f"{json_path} is damaged: it is not JSON") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise CheckpointError(f"{json_path} is not a checkpoint of this program (format {FORMAT})")
    # the text too, because some bits change it and not what it means: 1e-05 and 1E-05
    if sha256(json.dumps(head.get("state")).encode()) != head.get("state_sha256") or text != json.dumps(head):
        raise CheckpointError(f"{json_path} is damaged: its checksum does not match")
    if not contents:
        raise CheckpointError(f"there is no checkpoint {base}: {tensor_path.name} is missing")
    data = next((content for content in contents if sha256(content) == head.get("tensors_sha256")), None)
    if data is None:
        raise CheckpointError(f"{tensor_path} is damaged: its checksum does not match")
    try:
        return _decode(head["state"], load(data))
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{tensor_path} is damaged: {error}") from error


def checkpoints(folder: str | Path) -> list[Path]:
    """The resumable checkpoints of a run, oldest first, as paths without ending."""
    return sorted(path.with_suffix("") for path in Path(folder).glob("epoch-*.json"))


def prune(folder: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` resumable checkpoints, and what a killed process left half done.

    Raises:
        ProfitError: a file cannot be removed.
    """
    folder = Path(folder)
    try:
        for base in checkpoints(folder)[:-keep]:
            for path in _files(base):  # the .json first: a checkpoint without it does not count
                path.unlink(missing_ok=True)
        clear_leftovers(folder)
        for new in folder.glob(".*.safetensors.new"):
            _settle(folder / new.name[1:].removesuffix(".safetensors.new"))
        for path in folder.glob("*.safetensors"):
            if not path.with_suffix(".json").exists():
                path.unlink(missing_ok=True)
    except OSError as error:
        raise ProfitError(f"cannot tidy {folder}: {error.strerror or error}") from error


def _files(base: Path) -> tuple[Path, Path, Path]:
    """(.json, tensors, new tensors) of a checkpoint."""
    names = f"{base.name}.json", f"{base.name}.safetensors", f".{base.name}.safetensors.new"
    return tuple(base.with_name(name) for name in names)  # type: ignore[return-value]


def _settle(base: Path) -> None:
    """End a write that broke off: new tensors take their place if the .json means them, and go if it does not."""
    json_path, tensor_path, new_path = _files(base)
    try:
        expected = json.loads(json_path.read_text(encoding="utf-8"))["tensors_sha256"] if json_path.exists() else None
        if expected == sha256(new_path.read_bytes()):
            _rename(new_path, tensor_path)
    except (ValueError, KeyError, TypeError):  # a damaged .json means nothing
        pass
    except OSError as error:
        raise ProfitError(f"cannot read {new_path}: {error.strerror or error}") from error
    new_path.unlink(missing_ok=True)


def _rename(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
        sync_folder(target.parent)
    except OSError as error:
        raise ProfitError(f"cannot write {target}: {error.strerror or error}") from error


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # a clone, because safetensors refuses tensors that share memory or are not contiguous
        tensors[name] = value.detach().to("cpu").contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _encode(item, f"{name}/{key}".lstrip("/"), tensors) for key, item in value.items()}
        # JSON has text keys only; an optimizer numbers its parameters
        return {_ITEMS: [[key, _encode(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_encode(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        if set(value) == {_ITEMS}:
            return {key: _decode(item, tensors) for key, item in value[_ITEMS]}
        return {key: _decode(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    return value
