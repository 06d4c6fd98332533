"""What is delivered: the files of the source distribution and of the wheel, and the wheel under other versions of torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from profit_kernels import native
from tests.distributions import FOLDERS, ROOT, build, copy_sources

# The oldest that the library is compiled for, and two later ones.
TORCHES = ("2.11", "2.13", "2.14")
# Operators against the reference and the recorded vectors: what the compiled library does.
OPERATOR_TESTS = (
    "tests/golden", "tests/ops/duq/test_native.py", "tests/ops/duq/test_codes.py", "tests/ops/duq/test_reference.py",
    "tests/ops/conv/test_native.py", "tests/ops/conv/test_native_depthwise.py", "tests/ops/conv/test_native_pointwise.py",
    "tests/ops/norm/test_native.py", "tests/ops/aiwq/test_native.py", "tests/ops/test_arguments.py",
    "tests/ops/test_registration.py",
)  # fmt: skip


def clean(**changes: str) -> dict[str, str]:
    """The environment without what would lead Python to these sources."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")} | changes


def test_the_source_distribution_is_complete(tmp_path):
    sources = copy_sources(tmp_path / "sources")
    expected = {str(p.relative_to(sources)) for folder in FOLDERS for p in (sources / folder).rglob("*") if p.is_file()}
    for litter in ("runs/a/results.json", "profit_kernels/_cpu.abi3.so", "csrc/cpu/duq.o", "profit_kernels/_build_info.json"):
        (sources / litter).parent.mkdir(parents=True, exist_ok=True)
        (sources / litter).write_text("{}")
    with tarfile.open(build(sources, "sdist")) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert not expected - held, sorted(expected - held)[:5]
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "pyproject.toml", "setup.py"} <= held
    assert not [name for name in held if name.startswith(("runs", "build", "dist", "made")) or name.endswith((".so", ".o"))]
    assert "profit_kernels/_build_info.json" not in held


def test_recipes_are_in_the_wheel_and_found_by_name_from_any_folder(tmp_path):
    pytest.importorskip("yaml", reason="reading a recipe takes the extra 'train'")
    wheel = build(copy_sources(tmp_path / "sources"), "bdist_wheel", PROFIT_BUILD_NATIVE="0")
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"profit", "profit_kernels"}
    code = """
import profit, sys
from profit.train import load_recipe, shipped_recipes
print(profit.__file__)
print(*[name for name in shipped_recipes() if load_recipe(name).run.name == name])
"""
    arguments = [sys.executable, "-c", code]
    environment = clean(PYTHONPATH=str(installed))
    done = subprocess.run(arguments, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    where, found = done.stdout.splitlines()
    assert Path(where).is_relative_to(installed)
    assert found.split() == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built once, under the torch that runs these tests."""
    if not native.available():
        pytest.skip(native.why_missing() or "")
    return build(copy_sources(tmp_path_factory.mktemp("wheel") / "sources"), "bdist_wheel")


@pytest.mark.slow
@pytest.mark.parametrize("version", TORCHES)
def test_a_wheel_built_once_passes_its_operator_tests_under(version, wheel, tmp_path):
    """In a fresh environment, against the installed package; a CUDA build of torch takes 5 GB."""
    environment, work = tmp_path / "environment", tmp_path / "work"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"

    def run(*arguments: str) -> subprocess.CompletedProcess:
        changes = {"OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        command = [str(python), *arguments]
        return subprocess.run(command, cwd=work, env=clean(**changes), capture_output=True, text=True, check=False)

    work.mkdir()
    (work / "pytest.ini").write_text("[pytest]\npythonpath = .\naddopts = --import-mode=importlib\nmarkers =\n  slow\n  gpu\n")
    shutil.copytree(ROOT / "tests", work / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    try:
        # numpy: the interpreter of Triton 3.6, which comes with torch 2.11, does not run with 2.4
        got = run("-m", "pip", "install", "--no-cache-dir", "--no-compile", f"torch=={version}.*", "numpy<2.4")
        if got.returncode:
            pytest.skip(f"the package index does not deliver torch {version}: {got.stderr.strip().splitlines()[-1]}")
        got = run("-m", "pip", "install", str(wheel), "pytest", "hypothesis")
        assert got.returncode == 0, got.stderr
        code = "import profit_kernels as p, torch; print(p.__file__, torch.__version__, p.native.why_missing())"
        where, torch_version, missing = run("-c", code).stdout.strip().split(" ", 2)
        assert Path(where).is_relative_to(environment) and torch_version.startswith(f"{version}.") and missing == "None"
        tested = run("-m", "pytest", "-q", "-m", "not slow", *OPERATOR_TESTS)
        print(f"torch {torch_version}: {tested.stdout.strip().splitlines()[-1]}")
        assert tested.returncode == 0, tested.stdout[-5000:]
    finally:
        shutil.rmtree(environment)
