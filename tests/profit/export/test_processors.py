"""The ONNX tests on processors that this machine is not, emulated: what onnxruntime's kernels do there is no choice of ours."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[3]
HERE = "tests/profit/export"
INTEGER = ["test_pairs.py", "test_onnx.py::test_other_models_exact_and_integer", "test_onnx.py::test_integer_kernels",
           "test_verify.py::test_what_is_right_passes"]  # fmt: skip
# name -> (qemu's processor, what the header of the run says of it, tests). The options after the first name are those that qemu
# would warn of. It emulates no AVX-512.
PROCESSORS = {
    "AVX2": ("Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid", "torch with AVX2; C++ kernels: avx2, without",
             ["test_pairs.py", "test_onnx.py", "test_verify.py"]),
    "baseline": ("Nehalem", "torch with DEFAULT; C++ kernels: baseline, without", INTEGER),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSORS)
def test_onnx_on(name):
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("qemu-x86_64 is not installed (Debian, Ubuntu: apt install qemu-user)")
    if platform.machine() != "x86_64":
        pytest.skip(f"the Python of this machine is for {platform.machine()}")
    processor, header, tests = PROCESSORS[name]
    chosen = ("PYTEST_", "ATEN_CPU_CAPABILITY", "PROFIT_CPU_ISA")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(chosen)}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", *(f"{HERE}/{test}" for test in tests)]
    done = subprocess.run(
        [emulator, "-cpu", processor, sys.executable, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    summary = done.stdout.splitlines()[-1]
    print(summary)
    assert header in done.stdout and " passed" in summary and "skipped" not in summary
