"""`profit doctor`: what was built, what serves which operator, the versions, and why anything is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable

import torch

import profit_kernels
from profit_kernels import dispatch, native

# Distribution -> what it is for, for the versions that are missing.
PACKAGES = {
    "torch": "everything",
    "numpy": "everything",
    "triton": "the Triton kernels, on GPUs",
    "timm": "models and data loaders: pip install 'profit-kernels[train]'",
    "torchvision": "image folders and transforms: pip install 'profit-kernels[train]'",
    "scikit-learn": "the bundled digits: pip install 'profit-kernels[train]'",
    "safetensors": "checkpoints: pip install 'profit-kernels[train]'",
    "onnx": "export: pip install 'profit-kernels[export]'",
    "onnxruntime": "export: pip install 'profit-kernels[export]'",
}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return ["  " + "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]


def _machine() -> list[str]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if gpus:
        gpu = ", ".join(gpus)
    elif torch.version.cuda is None and torch.version.hip is None:
        gpu = "none usable: this torch is built for the CPU only"
    else:
        gpu = "none found"
    return _table(
        [
            ("python", platform.python_version()),
            ("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"),
            ("threads", str(torch.get_num_threads())),
            ("gpu", gpu),
        ]
    )


def _packages() -> list[str]:
    rows = [("profit-kernels", profit_kernels.__version__)]
    for name, purpose in PACKAGES.items():
        version = torch.__version__ if name == "torch" else _version(name)
        rows.append((name, version if version is not None else f"not installed; needed for {purpose}"))
    return _table(rows)


def _native() -> list[str]:
    info, missing = native.build_info(), native.why_missing()
    rows = [("C++ kernels (CPU)", f"loaded, using {native.features()}" if missing is None else missing)]
    if info["built"]:
        rows.append(("built with", f"{info['compiler']}, torch {info['torch']}"))
        rows.append(("loads in", f"torch {info['torch_target']} and later"))
        rows.append(("flags", " ".join(info["flags"])))
    rows.append(("CUDA C++ kernels", dispatch.missing("cuda", "cuda") or "loaded"))
    return _table(rows)


def _backends(device_types: tuple[str, ...]) -> list[str]:
    return _table(
        (device_type, name, dispatch.missing(name, device_type) or "available")
        for device_type in device_types
        for name in dispatch.BACKENDS
    )


def _operators(device_types: tuple[str, ...]) -> list[str]:
    plans = [dispatch.plan(device_type) for device_type in device_types]
    header = ("operator", *(f"on {device_type}" for device_type in device_types))
    return _table([header, *((op, *(plan[op] for plan in plans)) for op in dispatch.OPS)])


def report() -> str:
    """The text that `doctor` prints."""
    device_types = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    sections = {
        "Machine": _machine(),
        "Packages": _packages(),
        "Compiled kernels": _native(),
        "Backends": _backends(device_types),
        "Backend of each operator for float32, with the present choice (PROFIT_BACKEND, set_backend)": _operators(device_types),
    }
    if dispatch.wrong_setting() is not None:
        sections["Settings that training refuses"] = [f"  {dispatch.wrong_setting()}"]
    return "\n\n".join("\n".join([title, *lines]) for title, lines in sections.items())


def doctor() -> None:
    """Print what was built, which backend serves which operator, the versions, and why anything is missing."""
    print(report())
