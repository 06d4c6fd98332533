"""Builds the C++ CPU kernels where that is possible. Everything else about the package is in pyproject.toml.

The kernels are optional: without a compiler, or if compiling fails, the package installs all the same and runs on the
PyTorch reference. The reason is printed once here and kept in profit_kernels/_build_info.json, where `profit doctor` finds
it. PROFIT_BUILD_NATIVE=0 leaves the kernels out on purpose.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext as plain_build_ext
from setuptools.errors import BaseError, CCompilerError

try:
    import torch

    # At import it warns of a missing CUDA runtime, which nothing here needs.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils import cpp_extension

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.NOTSET)
except ImportError:
    torch = None

ROOT = Path(__file__).resolve().parent
NAME = "profit_kernels._cpu"
CSRC = ROOT / "csrc" / "cpu"
SOURCES = sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*.cpp"))
# The oldest torch whose stable ABI the library is compiled for: it then loads in this version and all later ones.
TARGET = (2, 11)
COMPILE_ARGS = [
    f"-DTORCH_TARGET_VERSION=0x{TARGET[0] << 56 | TARGET[1] << 48:016x}",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # The same bits as the reference: no fused multiply-add around the rounding, and never -ffast-math.
    "-ffp-contract=off",
    # Without these two the loops stay scalar on AVX2 and SSE2; both leave NaN and infinities alone.
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fopenmp-simd",
    # gcc warns of its own AVX-512 header.
    "-Wno-maybe-uninitialized",
]
# The same sources make the same bytes, wherever they are built.
LINK_ARGS = ["-Wl,--build-id=none"] if sys.platform == "linux" else []


def without_paths() -> list[str]:
    """Flags by which __FILE__, in torch's headers and here, names no folder of the machine that builds."""
    folders = {str(ROOT): "."} | {folder: "include" for folder in cpp_extension.include_paths()}
    return [f"-ffile-prefix-map={folder}={name}" for folder, name in folders.items()]


def why_not_buildable() -> str | None:
    """The reason why this machine cannot even try; None if it can."""
    if os.environ.get("PROFIT_BUILD_NATIVE", "1") == "0":
        return "left out on request (PROFIT_BUILD_NATIVE=0)"
    if sys.platform not in ("linux", "darwin"):
        return f"the C++ kernels are not built on {sys.platform} yet"
    if torch is None:
        return (
            "torch was not installed when the package was built; "
            "first `pip install torch setuptools wheel ninja`, then install again with --no-build-isolation"
        )
    if torch.torch_version.TorchVersion(torch.__version__) < TARGET:
        return f"torch {torch.__version__} is too old, {TARGET[0]}.{TARGET[1]} or later is needed"
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler!r} is not on the PATH (install g++, or set CXX)"
    return None


def compiler_version() -> str | None:
    if torch is None or shutil.which(cpp_extension.get_cxx_compiler()) is None:
        return None
    answer = subprocess.run([cpp_extension.get_cxx_compiler(), "--version"], capture_output=True, text=True, check=False)
    return answer.stdout.partition("\n")[0].strip() or None


class OptionalBuild(plain_build_ext if torch is None else cpp_extension.BuildExtension):
    """build_ext that records why the extension is missing instead of failing the installation."""

    reason: str | None = None

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.inplace:
            # An editable install builds in a directory thrown away afterwards; a fixed one lets ninja skip what is up to date.
            self.build_temp = str(ROOT / "build" / "temp")

    def run(self) -> None:
        # setuptools clears `inplace` for the time of its own run().
        inplace = bool(self.inplace)
        self.reason = why_not_buildable()
        if self.reason is None:
            super().run()
        else:
            self._give_up(self.reason)
        folder = ROOT / "profit_kernels" if inplace else Path(self.build_lib) / "profit_kernels"
        if self.reason is not None:
            # A library left from an earlier build may not match the sources any more.
            for stale in folder.glob("_cpu.*.so"):
                stale.unlink()
        self._record(folder)

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        # torch reports a failed compilation as RuntimeError, setuptools a failed link as one of its own.
        except (BaseError, CCompilerError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            self._give_up(f"compiling failed ({type(error).__name__}: {error}); the compiler's output is above, with pip -v")

    def _give_up(self, reason: str) -> None:
        self.reason = " ".join(reason.split())
        self.extensions = []
        print(
            f"profit-kernels: C++ kernels not built: {self.reason}. "
            "The package works without them, on the PyTorch reference, more slowly.",
            file=sys.stderr,
        )

    def _record(self, folder: Path) -> None:
        info = {
            "built": self.reason is None,
            "reason": self.reason,
            "compiler": compiler_version(),
            "torch": None if torch is None else str(torch.__version__),
            "torch_target": ".".join(map(str, TARGET)),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "flags": COMPILE_ARGS,
            "sources": SOURCES,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")


def extension() -> Extension:
    headers = [str(p.relative_to(ROOT)) for p in sorted(CSRC.rglob("*.h"))]
    make, flags = (Extension, []) if torch is None else (cpp_extension.CppExtension, without_paths())
    return make(
        NAME, SOURCES, depends=headers, extra_compile_args=[*COMPILE_ARGS, *flags], extra_link_args=LINK_ARGS,
        py_limited_api=True, optional=True,
    )  # fmt: skip


setup(
    # recipes/ is installed as profit/recipes (package-dir in pyproject.toml).
    packages=[*find_packages(include=["profit", "profit.*", "profit_kernels", "profit_kernels.*"]), "profit.recipes"],
    ext_modules=[extension()],
    cmdclass={"build_ext": OptionalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
