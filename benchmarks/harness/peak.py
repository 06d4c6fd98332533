"""Peak memory of one call: resident memory of the process on the CPU, torch's count on a GPU.

Linux keeps the highest resident size of a process and forgets it on request (/proc/self/clear_refs, proc(5)), give or take
some hundred kB: it counts per processor and adds up now and then. Memory that was freed and not yet returned would hide what
a call needs, the more so with an allocator tuned to keep it; malloc_trim returns it first.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def why_no_peak(device: str) -> str | None:
    """Why peak memory cannot be measured here; None if it can."""
    if device.startswith("cuda"):
        return None
    if not sys.platform.startswith("linux"):
        return f"peak memory of a process is read from Linux's /proc, this is {sys.platform}"
    try:
        resident()
        _CLEAR.write_text("5")
    except (OSError, ValueError) as error:
        return f"peak memory needs VmHWM in {_STATUS} and write access to {_CLEAR}: {error}"
    return None


def resident(field: str = "VmRSS") -> int:
    """Bytes resident now, or with "VmHWM" at most since the last reset. Raises ValueError where the kernel does not say."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024  # always in kB, proc(5)
    raise ValueError(f"no {field}")


def peak_bytes(call: Callable[[], object], device: str, parameters: Iterable[Tensor] = ()) -> int:
    """Bytes above those in use before `call()`, at its highest point. Gradients of `parameters` are dropped first, so that they
    count as part of the step that makes them."""
    for parameter in parameters:
        parameter.grad = None
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _trim()
    _CLEAR.write_text("5")
    before = resident()
    call()
    return max(resident("VmHWM") - before, 0)


def _trim() -> None:
    """Return freed memory to the system, where the C library has a call for it (glibc)."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
