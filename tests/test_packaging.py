"""The package as installed: what importing it costs, what was built, what the doctor says."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import profit_kernels
from profit.doctor import doctor
from profit_kernels import dispatch, native
from tests.distributions import copy_sources

ROOT = Path(__file__).resolve().parents[1]
# Optional, slow to load, or bound to a GPU: loaded by what needs them, not by the import.
NOT_AT_IMPORT = (
    "triton", "timm", "torchvision", "sklearn", "matplotlib", "jinja2", "rich", "typer", "tensorboard", "torch._dynamo",
    "torch._inductor",
)  # fmt: skip

_MEASURE = """
import json, sys, time
start = time.perf_counter()
import torch
after_torch = time.perf_counter()
before = set(sys.modules)
import profit, profit_kernels
seconds = time.perf_counter() - after_torch
print(json.dumps({
    "seconds": seconds,
    "modules": sorted(set(sys.modules) - before),
    "gpu": torch.cuda.is_initialized(),
    "library": hasattr(torch.ops.profit_cpu, "duq_forward"),
}))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_import_is_lean():
    result = run(_MEASURE)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    loaded = [name for name in NOT_AT_IMPORT if name in seen["modules"]]
    assert not loaded, f"imported along with the package: {loaded}"
    assert not seen["gpu"], "the import started a GPU context"
    assert not seen["library"], "the import loaded the compiled library"
    assert seen["seconds"] < 3


def test_profit_names_no_kernel_internals():
    """profit -> profit_kernels -> csrc, one way, through public names (the doctor reports on the machinery itself)."""
    forbidden = ("triton", "profit_kernels.ops", "profit_kernels.native", "torch.ops.profit")
    for path in (ROOT / "profit").rglob("*.py"):
        if path.name != "doctor.py":
            text = path.read_text()
            found = [name for name in forbidden if f"import {name}" in text or f"from {name}" in text or f"{name}." in text]
            assert not found, f"{path.relative_to(ROOT)} reaches into {found}"


def test_environment_is_read_in_few_places():
    # cli.py: what a user has set for the allocator; frame.py is the outermost frame of the command line (PROFIT_TRACEBACK)
    allowed = {"dispatch.py", "native.py", "cli.py", "frame.py"}
    for package in ("profit", "profit_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name not in allowed:
                text = path.read_text()
                assert "os.environ" not in text and "getenv" not in text, f"{path.relative_to(ROOT)} reads the environment"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler: the package runs on the reference here")
@pytest.mark.skipif(os.environ.get("PROFIT_BUILD_NATIVE") == "0", reason="left out on request (PROFIT_BUILD_NATIVE=0)")
def test_with_a_compiler_the_kernels_are_built():
    """Otherwise a broken source would only show as skipped tests."""
    assert native.available(), native.why_missing()
    assert native.build_info()["built"]
    assert "-ffp-contract=off" in native.build_info()["flags"]
    assert not any("fast-math" in flag for flag in native.build_info()["flags"])


@pytest.mark.skipif(not native.available(), reason=native.why_missing() or "")
def test_environment_limits_the_instruction_set():
    code = "from profit_kernels import native; native.load(); print(native.isa())"
    assert run(code, PROFIT_CPU_ISA="baseline").stdout.strip() == "baseline"
    refused = run(code, PROFIT_CPU_ISA="mmx")
    assert refused.returncode != 0 and "PROFIT_CPU_ISA='mmx' is not one of" in refused.stderr


# A path of two parts or more, as __FILE__, an RPATH or a command would leave it; relative ones have no slash at the front.
ABSOLUTE = re.compile(rb"(?<![\w.+/-])/[\w.+-]+/[\w.+/-]+")


@pytest.mark.skipif(not native.available(), reason=native.why_missing() or "")
@pytest.mark.parametrize("name", ["_cpu.abi3.so", "_build_info.json"])
def test_what_was_built_names_no_folder_of_the_machine(name):
    content = (Path(profit_kernels.__file__).parent / name).read_bytes()
    assert ABSOLUTE.findall(b"include /usr/lib/x.h csrc/cpu/duq.cpp") == [b"/usr/lib/x.h"]
    assert not ABSOLUTE.findall(content)
    for text in (str(ROOT), sys.prefix, torch.__path__[0], str(Path.home()), socket.gethostname()):
        assert len(text) < 5 or text.encode() not in content, text


def test_setup_explains_a_missing_compiler(tmp_path):
    """Without a compiler the build ends well and leaves the reason behind."""
    copy_sources(tmp_path)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    variables = {**os.environ, "CXX": "no-such-compiler"}
    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("C++ kernels not built: no C++ compiler: 'no-such-compiler'") == 1
    info = json.loads((tmp_path / "profit_kernels" / "_build_info.json").read_text())
    assert not info["built"] and "no-such-compiler" in info["reason"]
    assert not list((tmp_path / "profit_kernels").glob("_cpu*"))


def test_doctor_tells_backends_and_versions(capsys):
    doctor()
    text = capsys.readouterr().out
    for word in (*dispatch.OPS, *dispatch.BACKENDS, profit_kernels.__version__, "this version has no CUDA C++ kernels"):
        assert word in text
    assert (native.why_missing() or f"loaded, using {native.isa()}") in text


def test_doctor_tells_why_the_kernels_are_missing(tmp_path, monkeypatch, capsys):
    (tmp_path / "_build_info.json").write_text('{"built": false, "reason": "no C++ compiler"}')
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    native.why_missing.cache_clear()
    try:
        doctor()
    finally:
        monkeypatch.undo()
        native.why_missing.cache_clear()
    assert "the C++ kernels were not built: no C++ compiler" in capsys.readouterr().out


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == profit_kernels.__version__
    assert project["name"] == "profit-kernels"


@pytest.mark.parametrize("package", ["typer", "yaml"])
def test_without_the_training_packages_there_is_one_line_and_doctor_still_answers(package, tmp_path):
    """A base installation has neither: a module that cannot be imported stands in for one that is not there."""
    hide = f"import sys; sys.modules[{package!r}] = None; from profit.__main__ import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-c", hide, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
        )

    refused = run("train", str(ROOT / "recipes" / "smoke.yaml"))
    assert refused.returncode == 2
    assert refused.stderr == (
        f"error: the package {package} is not installed: "
        "pip install 'profit-kernels[train]' brings all that training needs\n"
    )
    answered = run("doctor")
    assert answered.returncode == 0 and "Backends" in answered.stdout
