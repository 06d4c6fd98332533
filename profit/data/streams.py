"""What a folder of tar files may say of itself before webdataset opens anything in it.

webdataset starts a command for `pipe:`, `curl` for an address and tools of clouds for others; the names may come from the
`_info.json` in the folder, which is anybody's. So every name must be that of a regular file in the folder, and the folder is
handed on as an absolute path, which no name behind it can turn into an address.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from profit.allowed import shard_is_inside
from profit.errors import DataError

INFO = ("_info.json", "info.json")  # the order in which timm looks for them


def check_info(folder: Path) -> None:
    """Look through the description of the splits, if there is one.

    Raises:
        DataError: `folder` is none; a description that is no regular file, no JSON or holds other types than timm takes; a
            shard outside of the folder.
    """
    if not folder.is_dir():
        raise DataError(f"data.path {folder} is not a folder: wds/NAME reads tar files in a local folder")
    for path in (folder / name for name in INFO):
        if not path.exists():
            continue
        if not path.is_file():
            raise DataError(f"{path} is no regular file")
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None
        except (ValueError, RecursionError):  # of UTF-8 and of JSON
            raise DataError(f"{path} is damaged: it is not JSON") from None
        splits = info.get("splits", {}) if isinstance(info, dict) else None
        if not isinstance(splits, dict):
            raise DataError(f"{path} must hold a mapping of splits")
        for name, split in splits.items():
            _check_split(path, name, split)
        return  # timm reads no second one


def check_shards(folder: Path, shards: Iterable[str], split: str) -> None:
    """Raise DataError where a shard lies outside of `folder`, is missing or is no regular file."""
    shards = list(shards)
    _check_names(f"data.path {folder}, split {split!r}", shards)
    if not shards:
        raise DataError(f"{folder} has no shard of split {split!r}")
    lost = [name for name in shards if not (folder / name).exists()]
    if lost:
        raise DataError(f"{folder} lacks {len(lost)} of the {len(shards)} shards of split {split!r}, the first is {lost[0]}")
    special = next((name for name in shards if not (folder / name).is_file()), None)
    if special is not None:
        raise DataError(f"{folder / special} is no regular file")


def _check_split(path: Path, name: str, split: Any) -> None:
    where = f"{path}, split {name!r}"
    if not isinstance(split, dict):
        raise DataError(f"{where}: a mapping must describe it")
    shards, lengths = split.get("filenames"), split.get("shard_lengths")
    if not isinstance(shards, list) or not all(isinstance(shard, str) for shard in shards):
        raise DataError(f"{where}: filenames must be a list of texts")
    if not isinstance(lengths, list) or not all(map(_is_count, lengths)) or not _is_count(split.get("num_samples")):
        raise DataError(f"{where}: num_samples and the list shard_lengths must be whole numbers from 0")
    if not isinstance(split.get("name"), str) or not isinstance(split.get("alt_label", ""), str):
        raise DataError(f"{where}: name and alt_label must be texts")
    _check_names(where, shards)


def _check_names(where: str, shards: Iterable[str]) -> None:
    outside = next((shard for shard in shards if not shard_is_inside(shard)), None)
    if outside is not None:
        raise DataError(f"{where}: the shard {outside!r} is no plain name of a file in the data folder")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
