"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import os
import random

import numpy as np
import pytest
import torch

from tests.missing import line
from tests.seeds import BASE_SEED, seed_of

# Without a GPU the Triton kernels run under Triton's interpreter; it must be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# The operators, conversion and export need torch alone; training does not.
HAS_TIMM = importlib.util.find_spec("timm") is not None
collect_ignore = [] if HAS_TIMM else [
    "profit/security", "profit/train", "profit/test_cli.py", "profit/test_data.py", "profit/test_hostile_images.py",
    "profit/test_models.py", "profit/test_streams.py", "profit/test_frame.py", "profit/export/test_command.py",
    "profit/test_report.py", "profit/test_report_figures.py", "test_examples.py", "benchmarks/test_zoo.py",
    "benchmarks/test_export.py", "benchmarks/test_fuzz.py",
]  # fmt: skip


def pytest_report_header() -> list[str]:
    from profit_kernels import native  # after the choice of Triton's interpreter

    kernels = native.features() or native.why_missing()
    lines = [f"processor: torch with {torch.backends.cpu.get_cpu_capability()}; C++ kernels: {kernels}"]
    lines += [f"PROFIT_TEST_SEED={BASE_SEED} (fresh random data; set it to repeat a run)"]
    return lines if HAS_TIMM else [*lines, f"timm is not installed: left out are {', '.join(collect_ignore)}"]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator of its own for each test and parameter."""
    return torch.Generator().manual_seed(seed_of(request.node.nodeid))


def seed_global_generators(name: str) -> None:
    seed = seed_of(name)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - it is for code that draws from it
    random.seed(seed)


# Modules draw their first weights from the global generators, whose state otherwise depends on which tests ran before.
@pytest.fixture(scope="module", autouse=True)
def seeded_module(request: pytest.FixtureRequest) -> None:
    seed_global_generators(request.node.nodeid)


@pytest.fixture(autouse=True)
def seeded_test(request: pytest.FixtureRequest) -> None:
    seed_global_generators(request.node.nodeid)


@pytest.fixture
def poisoned_empty():
    """torch.empty filled with NaN (or the largest integer), so that an element nobody wrote is seen."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def record_band(request: pytest.FixtureRequest):
    """Adds a BandReport to the totals that the run prints at its end: cases, codes, and how many were in the band."""

    def record(label: str, report):
        request.node.user_properties.append(
            ("band", (label, report.total, report.inside, report.differing_inside, report.differing_outside))
        )
        return report

    return record


def pytest_terminal_summary(terminalreporter) -> None:
    # Again at the end, where a log that keeps only its tail still has it.
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.line(f"These failures again: PROFIT_TEST_SEED={BASE_SEED}")
    totals: dict[str, list[int]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for label, *counts in (value for key, value in report.user_properties if key == "band"):
                row = totals.setdefault(label, [0] * 5)
                for i, count in enumerate((1, *counts)):
                    row[i] += count
    skipped = terminalreporter.getreports("skipped")
    reasons = [report.longrepr[2] for report in skipped if isinstance(report.longrepr, tuple)]
    if absent := line(reasons):
        terminalreporter.line(absent)
    if totals:
        terminalreporter.section("codes against the reference")
    for label, (cases, total, inside, differing_inside, outside) in sorted(totals.items()):
        share = inside / total if total else 0.0
        terminalreporter.line(
            f"{label}: {cases} cases, {total} codes, {outside} differ outside the band, "
            f"{inside} ({share:.3%}) inside it of which {differing_inside} differ"
        )
