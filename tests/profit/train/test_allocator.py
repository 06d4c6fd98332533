"""profit train --tune-allocator: what it does on glibc, and what it says where it does nothing."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from profit.train import allocator


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)


def test_freed_memory_is_used_again():
    """Page faults of a tensor that is allocated and freed over and over, in a process of its own."""
    code = """
import resource, torch
from profit.train.allocator import tune_allocator
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(4_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.set_num_threads(1)
line = tune_allocator({})
faults()
print(faults(), line)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    count, _, line = done.stdout.partition(" ")
    if "another C library" in line:
        pytest.skip(line)
    assert "freed memory is kept" in line and int(count) < 20


def test_mallopt_gets_every_setting():
    asked = {}

    def mallopt(parameter: int, value: int) -> int:
        asked[parameter] = value
        return 1

    library = SimpleNamespace(gnu_get_libc_version=None, mallopt=mallopt)
    assert "freed memory is kept" in allocator.tune_allocator({}, library)
    assert asked == {-4: 0, -1: -1, -2: 1 << 28}  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
    assert allocator.tunables().split(":") == [
        "glibc.malloc.mmap_max=0", f"glibc.malloc.trim_threshold={1 << 45}", f"glibc.malloc.top_pad={1 << 28}"
    ]


def test_where_it_does_nothing_it_says_why():
    assert "another C library" in allocator.tune_allocator({}, SimpleNamespace())
    refusing = SimpleNamespace(gnu_get_libc_version=None, mallopt=lambda key, value: 0)
    assert "glibc refused mmap_max" in allocator.tune_allocator({}, refusing)
    chosen = {"LD_PRELOAD": "libjemalloc.so"}
    assert "unchanged, it is set already (LD_PRELOAD=libjemalloc.so)" in allocator.tune_allocator(chosen, refusing)
