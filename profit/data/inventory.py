"""What a data set consists of: the names of its classes, and the number and a digest of its files' names and sizes.

No file is opened: a run records this when it starts, of as many as a million images, to notice later that some were
removed, replaced or sorted into other classes. A file that was edited and kept its size is not noticed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def numbered(classes: int) -> tuple[str, ...]:
    """The names of classes that have none."""
    return tuple(str(number) for number in range(classes))


def class_names_of(dataset: Any) -> tuple[str, ...]:
    """The names that a data set of timm or torchvision tells, in the order of the labels; () if it tells none."""
    indices = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if indices:
        return tuple(str(name) for name in sorted(indices, key=indices.__getitem__))
    names = getattr(dataset, "classes", None) or ()
    return tuple(name if isinstance(name, str) else ", ".join(map(str, name)) for name in names)


def inventory(dataset: Any, root: str | Path | None, images: int) -> dict[str, Any]:
    """`{"images": number, "sha256": digest of the sorted names and sizes}` of one split.

    Args:
        dataset: of timm or torchvision. Its files are the images it lists; the shards of a webdataset; of a torchvision set
            whose images lie in one file, what is in its folder. Of others nothing is known: the digest is None.
        root: the folder that names are relative to.
        images: their number, where they are not files of their own.
    """
    reader = getattr(dataset, "reader", None)
    shards = getattr(getattr(reader, "split_info", None), "filenames", None)
    listed = next((found for holder in (reader, dataset) for key in ("samples", "imgs")
                   if (found := getattr(holder, key, None)) and isinstance(found[0][0], str)), None)  # fmt: skip
    if listed is not None:
        return {"images": len(listed), "sha256": _digest((sample[0] for sample in listed), str(root))}
    if root is None or not Path(root).is_dir():
        return {"images": images, "sha256": None}
    if shards is not None:
        return {"images": images, "sha256": _digest((os.path.join(root, name) for name in shards), str(root))}
    if reader is None:
        folder = getattr(dataset, "raw_folder", None) or os.path.join(root, getattr(dataset, "base_folder", ""))
        return {"images": images, "sha256": _digest(_below(folder), str(root))}
    return {"images": images, "sha256": None}


def _below(folder: str) -> Iterable[str]:
    for place, _, names in os.walk(folder):
        yield from (os.path.join(place, name) for name in names)


def _digest(paths: Iterable[str], root: str) -> str:
    """SHA-256 over one line a file, sorted: name below `root`, size in bytes (-1 where there is no file to ask)."""
    lines = sorted(os.fsencode(path.removeprefix(root).lstrip("/")) + b"\0%d\n" % _size(path) for path in paths)
    return hashlib.sha256(b"".join(lines)).hexdigest()


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
