"""The suite ops: every variant is compared with the reference, and a wrong one gets no figure."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.harness import options, registry
from benchmarks.harness.children import WrongResult
from benchmarks.harness.rows import FAILED, Report
from benchmarks.ops import block_cases, cases
from benchmarks.ops.suite import evaluate, run_case
from benchmarks.ops.variants import Case, Variant
from profit_kernels import dispatch, native

needs_library = pytest.mark.skipif(not native.available(), reason=native.why_missing() or "")


@pytest.fixture
def given():
    """Options of a toy run."""
    made = options.parser("ops", "").parse_args(["--toy", "--device", "cpu"])
    made.turn = 0.0
    before = torch.get_num_threads()
    assert options.resolve(made) is None
    yield made
    torch.set_num_threads(before)


def broken_case(given) -> Case:
    case = cases.duq((2, 8, 5, 5), "hardswish", torch.float32, "cpu")
    right = case.variants["auto"]
    wrong = Variant(lambda: [1.01 * y for y in right.forward()], right.leaves, right.context, right.gate)
    case.variants = {"auto": wrong} | {name: v for name, v in case.variants.items() if name in ("cpp", "reference-eager")}
    return case


def test_a_wrong_result_gets_no_figure(given, capsys, tmp_path):
    report = Report("ops", "cpu", {}, tmp_path / "rows.json")
    run_case(broken_case(given), given, report)
    (wrong,) = [row for row in report.rows if row.variant == "auto"]
    assert wrong.status == FAILED and wrong.median_s is None and "beyond the contract" in wrong.note
    assert all(row.median_s for row in report.rows if row.variant != "auto")
    assert report.finish() == 1
    printed = capsys.readouterr()
    assert "failed: wrong result" in printed.out and "1 of " in printed.err
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][0]["status"] == FAILED


def test_ops_on_triton_under_the_interpreter(monkeypatch, tmp_path, given):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = cases.duq((1, 8, 4, 4), "hardswish", torch.float32, "cpu")
    given.variants = ["triton", "reference-eager"]
    report = Report("ops", "cpu", {})
    run_case(case, given, report)
    assert {row.variant for row in report.rows} == {"triton", "reference-eager", "copy"} and report.failed == 0


@pytest.mark.slow
def test_a_compiled_operator(given):
    case = cases.duq((2, 8, 5, 5), "hardswish", torch.float32, "cpu")
    given.variants = ["reference-eager", "reference-compile", "float-compile"]
    report = Report("ops", "cpu", {})
    run_case(case, given, report)
    assert report.failed == 0 and {row.variant for row in report.rows} == {*given.variants, "copy"}


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_cases_see_a_wrong_gradient(dtype):
    layer = registry.depthwise_layers(32, 4, [options.TOY_MODEL])[0]
    case = block_cases.block(layer, dtype, "cpu")
    assert {"auto", "reference-eager", "reference-compile", "float-eager", block_cases.UNFUSED} <= set(case.variants)
    assert case.name.startswith("block ") and ("cpp" in case.variants) == ("cpp" in registry.backends("block", "cpu", dtype))
    expected = evaluate(case, case.variants["reference-eager"])
    for name in ("auto", block_cases.UNFUSED, "reference-eager"):
        case.variants[name].gate(*evaluate(case, case.variants[name]), *expected)
    outputs, gradients = evaluate(case, case.variants["auto"])
    for i in range(4):  # x, gamma, beta, w
        wrong = [1.1 * g if j == i else g for j, g in enumerate(gradients)]
        with pytest.raises(WrongResult, match="the gradient of"):
            case.variants["auto"].gate(outputs, wrong, *expected)
    assert set(registry.OPS["block"]) <= set(dispatch.OPS)
