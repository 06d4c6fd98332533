"""How much memory this process may still take, and a network that would take more, noticed before its memory is touched.

Linux hands out memory that it does not have and kills the process that writes to it: nothing can catch that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What makes a tensor out of nothing.
_FACTORIES = frozenset((torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.tensor))


def available_bytes() -> int | None:
    """Bytes of main memory that this process may still take (system, cgroup, `ulimit -v`); None where nobody says."""
    found = [value for value in (_of_system(), _of_group(), _of_process()) if value is not None]
    return max(min(found), 0) if found else None


def _of_system() -> int | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _of_group() -> int | None:
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if not limit or not used or not limit[0].isdigit():
        return None
    cached = sum(int(line.split()[1]) for line in _lines("/sys/fs/cgroup/memory.stat") if line.startswith("inactive_file "))
    return int(limit[0]) - int(used[0]) + cached


def _of_process() -> int | None:
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return None
    limit, pages = resource.getrlimit(resource.RLIMIT_AS)[0], _lines("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not pages:
        return None
    return limit - int(pages[0].split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


class _Counted(TorchFunctionMode):
    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.total = limit, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _FACTORIES and isinstance(made, Tensor) and made.device.type == "cpu":
            self.total += made.numel() * made.element_size()
            if self.total > self.limit:
                raise MemoryError(f"more than {self.limit / 1e9:.1f} GB of weights")
        return made


@contextmanager
def bounded(copies: int) -> Iterator[None]:
    """Raise MemoryError as soon as `copies` of the tensors made in this block are larger than the memory there is.

    They are counted as they are made, before anything is written into them.
    """
    limit = available_bytes()
    if limit is None:
        yield
        return
    with _Counted(limit // copies):
        yield
