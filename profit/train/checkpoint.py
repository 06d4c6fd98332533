"""Checkpoints: one .safetensors file with the tensors and one .json with everything else and the checksums.

The .json is written last and names the digest of the .safetensors, so a checkpoint whose .json exists is complete.
Nothing is pickled in either direction.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from profit.errors import CheckpointError
from profit.train.files import sha256, write_atomic

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
    write_atomic(path.with_name(path.name + ".safetensors"), data)
    head = {"format": FORMAT, "tensors_sha256": sha256(data), "state_sha256": sha256(plain.encode())}
    write_atomic(path.with_name(path.name + ".json"), json.dumps({**head, "state": json.loads(plain)}))


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
    json_path, tensor_path = (base.with_name(base.name + ending) for ending in (".json", ".safetensors"))
    try:
        head = json.loads(json_path.read_text(encoding="utf-8"))
        data = tensor_path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {base}: {Path(str(error.filename)).name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {base}: {error.strerror or error}") from None
    except (ValueError, RecursionError):  # of JSON and of UTF-8
        raise CheckpointError(f"{json_path} is damaged: it is not JSON") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise CheckpointError(f"{json_path} is not a checkpoint of this program (format {FORMAT})")
    if sha256(json.dumps(head.get("state")).encode()) != head.get("state_sha256"):
        raise CheckpointError(f"{json_path} is damaged: its checksum does not match")
    if sha256(data) != head.get("tensors_sha256"):
        raise CheckpointError(f"{tensor_path} is damaged: its checksum does not match")
    try:
        return _decode(head["state"], load(data))
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{tensor_path} is damaged: {error}") from error


def checkpoints(folder: str | Path) -> list[Path]:
    """The resumable checkpoints of a run, oldest first, as paths without ending."""
    return sorted(path.with_suffix("") for path in Path(folder).glob("epoch-*.json"))


def prune(folder: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` resumable checkpoints, and temporary files of a crash."""
    folder = Path(folder)
    for base in checkpoints(folder)[:-keep]:
        base.with_suffix(".json").unlink(missing_ok=True)  # first: a checkpoint without .json does not count
        base.with_suffix(".safetensors").unlink(missing_ok=True)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def rng_state() -> dict[str, Any]:
    """The state of every generator a run may draw from: Python, NumPy, torch, all CUDA devices."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": list(map(_as_list, random.getstate())),
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` took."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


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
