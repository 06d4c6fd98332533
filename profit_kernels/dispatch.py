"""The only place where a backend is chosen.

`auto` takes, for each operator, the first backend of PREFERENCE that can serve the call. A backend asked for by name either
serves the call or raises BackendError; nothing falls back in silence. The environment variable PROFIT_BACKEND sets the
choice at start: `cpp`, or per operator, `duq=cpp,depthwise=reference`.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from . import native

log = logging.getLogger("profit_kernels")

BACKENDS = ("reference", "cpp", "triton", "cuda")
OPS = ("duq", "duq_weights", "duq_codes", "depthwise", "duq_depthwise", "aiwq", "aiwq_conv", "block")

_HALVES = (torch.float32, torch.bfloat16, torch.float16)

# What each backend has a kernel for: operator -> dtypes. The reference serves every operator, device and float dtype.
_KERNELS: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "cpp": dict.fromkeys(("duq", "duq_weights", "duq_codes"), (*_HALVES, torch.float64))
    | dict.fromkeys(("depthwise", "duq_depthwise", "aiwq", "aiwq_conv", "block"), _HALVES),
    "triton": dict.fromkeys(
        ("duq", "duq_weights", "duq_codes", "depthwise", "duq_depthwise", "aiwq", "aiwq_conv"), _HALVES
    ),
    "cuda": {},
}

# Fastest first, as measured. The Triton interpreter is for tests and is never chosen by `auto`.
PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


def _parse(setting: str) -> dict[str, str]:
    choice = dict.fromkeys(OPS, "auto")
    for part in filter(None, (p.strip() for p in setting.split(","))):
        op, _, name = part.rpartition("=")
        choice.update(_validated(name, (op,) if op else OPS))
    return choice


def _validated(name: str, ops: Iterable[str]) -> dict[str, str]:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"unknown backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    for op in ops:
        if op not in OPS:
            raise ValueError(f"unknown operator {op!r}; known: {', '.join(OPS)}")
    return dict.fromkeys(ops, name)


# The "backend" of every operator where PROFIT_BACKEND names none: it serves nothing, and says why, at the first call.
_UNKNOWN = "PROFIT_BACKEND"


def _from_environment(setting: str) -> tuple[dict[str, str], str | None]:
    """(the choice of PROFIT_BACKEND, what is wrong with it). An import must not fail: `profit doctor` is to tell."""
    try:
        return _parse(setting), None
    except ValueError as error:
        return dict.fromkeys(OPS, _UNKNOWN), f"PROFIT_BACKEND={setting!r}: {error}"


_choice, _wrong = _from_environment(os.environ.get("PROFIT_BACKEND", ""))
_logged: set[tuple[str, str, str]] = set()


def set_backend(name: str, ops: Iterable[str] | None = None) -> None:
    """Use backend `name` (or "auto") from here on, for the operators `ops` (all of them by default).

    Raises ValueError for an unknown backend or operator. Whether the backend can serve a call is known at the call.
    """
    if isinstance(ops, str):
        raise TypeError(f"ops must be a list of operators, got the string {ops!r}: write ops=[{ops!r}]")
    _choice.update(_validated(name, OPS if ops is None else tuple(ops)))


@contextmanager
def use_backend(name: str, ops: Iterable[str] | None = None) -> Iterator[None]:
    """`set_backend` for the length of a with-block."""
    before = dict(_choice)
    set_backend(name, ops)
    try:
        yield
    finally:
        _choice.update(before)


def triton_interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors, under its interpreter (for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing(backend: str, device_type: str) -> str | None:
    """Why this machine cannot run `backend` on such a device; None if it can."""
    if backend == "cpp":
        return "it runs on the CPU only" if device_type != "cpu" else native.why_missing()
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if device_type == "cpu" and not triton_interpreted():
            return "on CPU tensors it runs only under Triton's interpreter (TRITON_INTERPRET=1)"
        return None if device_type in ("cpu", "cuda") else f"it does not run on {device_type}"
    if backend == "cuda":
        return "this version has no CUDA C++ kernels"
    return None


# What torch.compiler.assume_constant_result does, without its import of the whole compiler (a second, and Triton).
missing._dynamo_marked_constant = True


def why_not(
    op: str, backend: str, device_type: str, dtype: torch.dtype, limits: Mapping[str, str | None] | None = None
) -> str | None:
    """Why `backend` cannot serve such a call of `op`; None if it can. `limits` as `choose` takes them."""
    if backend == "reference":
        return None
    absent = missing(backend, device_type)
    if absent is not None:
        return absent
    dtypes = _KERNELS[backend].get(op)
    if dtypes is None:
        return f"it has no kernel for {op}"
    if dtype not in dtypes:
        return f"its {op} kernel takes no {dtype}"
    return limits.get(backend) if limits else None


def wrong_setting(device_type: str | None = None) -> str | None:
    """What is wrong with an environment variable that chooses kernels (PROFIT_BACKEND, PROFIT_CPU_ISA); None if nothing is.

    With a `device_type`, also that a backend asked for by name does not run there at all.
    """
    wrong = (_wrong if _UNKNOWN in _choice.values() else None) or native.wrong_setting()
    if wrong is not None or device_type is None:
        return wrong
    absent = {name: missing(name, device_type) for name in set(_choice.values()) - {"auto", "reference"}}
    found = next((name for name in sorted(absent) if absent[name] is not None), None)
    if found is None:
        return None
    return f"the backend {found!r} asked for (PROFIT_BACKEND, set_backend) is not usable: {absent[found]}"


def choose(op: str, x: Tensor, limits: Mapping[str, str | None] | None = None) -> str:
    """The backend for this call of `op`. Raises BackendError if the one asked for by name cannot serve it.

    `limits`: backend -> why its kernels cannot serve the other arguments of this call (a geometry, a second dtype), or None.
    """
    device_type, dtype, asked = x.device.type, x.dtype, _choice[op]
    if asked == _UNKNOWN:
        raise BackendError(str(_wrong))
    if asked != "auto":
        reason = why_not(op, asked, device_type, dtype, limits)
        if reason is not None:
            able = [b for b in BACKENDS if why_not(op, b, device_type, dtype, limits) is None]
            raise BackendError(
                f"backend {asked!r} cannot serve {op} on {device_type} with {dtype}: {reason}. These can: {', '.join(able)}; "
                f'or set_backend({asked!r}, ops=...) for the operators it has, and "auto" for the rest'
            )
        return asked
    for backend in PREFERENCE.get(device_type, ("reference",)):
        if why_not(op, backend, device_type, dtype, limits) is None:
            if not torch.compiler.is_compiling() and (op, device_type, backend) not in _logged:
                _logged.add((op, device_type, backend))
                log.info("%s on %s: backend %s", op, device_type, backend)
            return backend
        if backend == "cpp" and missing(backend, device_type) is not None and native.wrong_setting() is not None:
            raise BackendError(str(native.wrong_setting()))  # a slip of the pen must not choose the slow backend
    return "reference"


def serving(
    package: str, op: str, x: Tensor, limits: Mapping[str, str | None] | None = None, *, triton: str = "launch"
) -> ModuleType:
    """The module of an operator's package whose functions serve this call: `reference`, `cpp`, or the Triton launcher.

    Each has functions of the same names. Arguments and errors as `choose`; `triton` names the launcher's module, which is
    imported only where it serves.
    """
    backend = choose(op, x, limits)
    return _module(package, triton if backend == "triton" else backend)


@functools.cache
def _module(package: str, name: str) -> ModuleType:
    return importlib.import_module(f"{package}.{name}")


def available_backends(device_type: str | None = None) -> tuple[str, ...]:
    """Names of the backends that can run here, on `device_type` ("cpu", "cuda") or on any device this machine has.

    `missing(backend, device_type)` says why one is not among them.
    """
    here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    devices = here if device_type is None else (device_type,)
    return tuple(b for b in BACKENDS if any(missing(b, d) is None for d in devices))


def plan(device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Operator -> the backend that the present choice gives it on such a device, or the reason why it has none."""
    rows = {}
    for op in OPS:
        asked = _choice[op]
        if asked == _UNKNOWN:
            rows[op] = "none: PROFIT_BACKEND names no backend"
            continue
        candidates = (asked,) if asked != "auto" else PREFERENCE.get(device_type, ("reference",))
        able = [b for b in candidates if why_not(op, b, device_type, dtype) is None]
        rows[op] = able[0] if able else f"none: {asked} asked for, but {why_not(op, asked, device_type, dtype)}"
    return rows
