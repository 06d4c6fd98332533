"""`python -m benchmarks`: what it lists and refuses; which module may import which."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks.__main__ import main


def test_an_unknown_suite_lists_the_known_ones(capsys) -> None:
    assert main(["speed"]) == 2
    error = capsys.readouterr().err
    assert "there is no suite 'speed'" in error and all(name in error for name in benchmarks.suites())
    assert main(["--help"]) == 0 and main([]) == 0


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, capfd) -> None:
    (tmp_path / "file").write_text("")
    assert main(["launches", "--toy", "--json", str(tmp_path / "file" / "x.json")]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("error: cannot write ") and err.count("\n") == 1 and not out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--model", "mobilenetv9"], "'mobilenetv9'"),
        (["memory", "--model", "mobilenetv9"], "'mobilenetv9'"),
        (["step", "--variants", "fast"], "'fast' is not one of auto"),
        (["ops", "--device", "cuda"], "torch finds no CUDA GPU"),
        (["ops", "--toy", "--filter", "nothing of that name", "--group", "weights"], "nothing to measure"),
        (["aiwq", "--variants", "fast"], "'fast' is not one of"),
        (["launches", "--variants", "cpp"], "'cpp' is not one of"),
        (["gpu", "--only", "tea", "--device", "cpu"], "no stage 'tea'"),
    ],
)
def test_wrong_arguments_are_one_line(monkeypatch, capsys, arguments, message):
    if torch.cuda.is_available() and "cuda" in arguments:
        pytest.skip("there is a GPU")
    monkeypatch.setenv("PROFIT_BENCHMARK_STARTED", "1")  # in this process
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--batch", "-1"], ["--size", "x"], ["--dtype", "int4"]])
def test_wrong_values_exit_with_2(monkeypatch, capsys, arguments):
    monkeypatch.setenv("PROFIT_BENCHMARK_STARTED", "1")
    with pytest.raises(SystemExit) as stop:
        main(["step", *arguments])
    assert stop.value.code == 2 and "error: argument" in capsys.readouterr().err


# What a suite is


@pytest.mark.parametrize("name", benchmarks.suites())
def test_a_suite_says_what_it_measures_and_loads_nothing_to_say_so(name):
    package = Path(benchmarks.__file__).parent / name / "__init__.py"
    assert ast.get_docstring(ast.parse(package.read_text())) == benchmarks.suites()[name]
    assert "\n" not in benchmarks.suites()[name] and not imported(package)


def test_the_measuring_suites():
    assert {"ops", "step", "memory", "aiwq"} <= set(benchmarks.measuring()) < set(benchmarks.suites())


# Imports


def modules() -> dict[str, Path]:
    """Every module of the benchmarks by its name."""
    root = Path(benchmarks.__file__).parent
    paths = {path: path.relative_to(root.parent).with_suffix("").parts for path in root.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in paths.items()}


def imported(path: Path) -> set[str]:
    """The names that a file imports, also inside functions; of `from a import b` both a and a.b."""
    package = path.relative_to(Path(benchmarks.__file__).parents[1]).parent.parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (start, node.module)))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def edges() -> dict[str, set[str]]:
    """Module of the benchmarks -> those that it imports."""
    known = modules()
    return {name: imported(path) & known.keys() for name, path in known.items()}


def test_no_circle_of_imports():
    found = edges()
    assert found["benchmarks.ops.suite"] >= {"benchmarks.ops.cases", "benchmarks.harness.rows"}, "imports are seen"
    graphlib.TopologicalSorter(found).prepare()  # raises CycleError with the circle


def test_the_harness_imports_no_suite():
    suites = {f"benchmarks.{name}" for name in benchmarks.suites()}
    for name, targets in edges().items():
        if name.startswith("benchmarks.harness"):
            assert not {".".join(target.split(".")[:2]) for target in targets} & suites, name
