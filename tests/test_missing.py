"""The line that says what tests were skipped for want of."""

from __future__ import annotations

import pytest

from tests.missing import QEMU, line, missing


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        ("this processor has no avx512", "avx512"),
        ("this processor has no byte products (AVX-512 VNNI)", "AVX-512 VNNI"),
        ("torch 2.14.0+cpu finds no CUDA GPU here", "a GPU"),
        ("needs two GPUs", "two GPUs"),
        ("needs 21 GB of free GPU memory", "a GPU with 21 GB free"),
        ("qemu-x86_64 is not installed: apt install qemu-user", QEMU),
        ("could not import 'onnxruntime': No module named 'onnxruntime'", "onnxruntime"),
        ("lightning is not installed (pip install lightning)", "lightning"),
        ("the C++ kernels were not built: no C++ compiler", "a C++ compiler"),
        ("the C++ kernels were not built: the library file is gone", "the C++ kernels"),
        ("this view has one sample per channel", None),
        ("there is a GPU", None),
    ],
)
def test_what_a_reason_asks_for(reason, name):
    assert missing(reason) == name


def test_one_line_counts_them():
    reasons = ["this processor has no avx512"] * 12 + ["needs two GPUs", "there is a GPU"]
    assert line(reasons) == "not run here: 12 tests need avx512, 1 needs two GPUs"
    assert line(["needs two GPUs"]) == "not run here: 1 test needs two GPUs"
    assert line([]) is None and line(["there is a GPU"]) is None


pytest_plugins = ["pytester"]


def test_it_stands_at_the_end_of_a_run(pytester):
    """Skips at the top of a module, by a mark and inside a test."""
    pytester.makeconftest("from tests.conftest import pytest_terminal_summary  # noqa: F401")
    pytester.makepyfile(
        test_module="import pytest\npytest.importorskip('no_such_package')",
        test_cases="""
            import pytest
            @pytest.mark.skipif(True, reason="this processor has no avx2")
            def test_mark(): pass
            def test_inside(): pytest.skip("this processor has no avx2")
            def test_that_runs(): pass
        """,
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.stdout.fnmatch_lines(["not run here: 2 tests need avx2, 1 needs no_such_package"])
