"""The system's memory allocator, told to keep what a training step frees for the next one.

By default glibc maps every large tensor anew and unmaps it when it is freed, so that the kernel has to clear and map its pages
again, every step. Never mapping and never trimming, a step uses the pages of the one before. The price: the process stays as
large as it ever was. Opt-in: `profit train --tune-allocator`; nothing here runs on import.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

# Name as in GLIBC_TUNABLES -> (parameter of mallopt(3), value); trim_threshold -1 is "never".
SETTINGS = {
    "mmap_max": (-4, 0),
    "trim_threshold": (-1, -1),
    "top_pad": (-2, 1 << 28),
}


def tunables() -> str:
    """The settings as GLIBC_TUNABLES takes them, for a process yet to be started; there "never" is 2^45 bytes."""
    return ":".join(f"glibc.malloc.{name}={1 << 45 if value == -1 else value}" for name, (_, value) in SETTINGS.items())


def chosen(environment: Mapping[str, str]) -> str | None:
    """What the user has set for the allocator (GLIBC_TUNABLES, LD_PRELOAD), as text; None if nothing."""
    found = [f"{name}={environment[name]}" for name in ("GLIBC_TUNABLES", "LD_PRELOAD") if environment.get(name)]
    return ", ".join(found) or None


def tune_allocator(environment: Mapping[str, str], library: object | None = None) -> str:
    """Apply SETTINGS to this process, from now on; returns one line that says what was done, or why nothing was.

    What the user has chosen in `environment` stays as it is. `library`: the C library; by default the one this process runs on.
    """
    if (setting := chosen(environment)) is not None:
        return f"allocator: unchanged, it is set already ({setting})"
    library = _c_library() if library is None else library
    if not (hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt")):
        return "allocator: unchanged, --tune-allocator knows glibc alone and this system has another C library"
    refused = [name for name, (parameter, value) in SETTINGS.items() if not library.mallopt(parameter, value)]
    if refused:
        return f"allocator: glibc refused {', '.join(refused)}; --tune-allocator has no full effect"
    values = ", ".join(f"{name}={value}" for name, (_, value) in SETTINGS.items())
    return f"allocator: freed memory is kept for the next step ({values} by mallopt)"


def _c_library() -> object | None:
    """The C library of this process; None on Windows, which has no such thing for ctypes to open."""
    return None if os.name == "nt" else ctypes.CDLL(None)
