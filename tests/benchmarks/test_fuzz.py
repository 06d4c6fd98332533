"""A few dozen of the damages of `python -m benchmarks fuzz`: no traceback, no hang."""

from __future__ import annotations

import os
from random import Random

import pytest

from benchmarks.fuzz import mutations as fuzz_mutations
from benchmarks.fuzz import suite as fuzz
from tests.seeds import seed_of

pytest.importorskip("onnxruntime")
if not hasattr(os, "fork"):
    pytest.skip("the cases are forked", allow_module_level=True)


def test_no_damage_ends_in_a_traceback_or_a_hang(tmp_path, capsys) -> None:
    seed = seed_of("fuzz") % 10**6
    fuzz.preload()
    found = fuzz.campaign(tmp_path, 60, seed, real_every=0)
    bad = [row for row in found["bad"] if row["outcome"] != "SILENT DIFFERENCE"]
    assert not bad, f"python -m benchmarks fuzz --seed {seed} --only {bad[0]['case']}: {bad[0]}"
    assert sum(found["outcomes"].values()) == 60 and found["outcomes"]["refused in one line"] > 20


def test_a_case_is_a_function_of_its_seed() -> None:
    data = bytes(range(256)) * 4
    first, again, other = (fuzz_mutations.damaged_bytes(data, Random(seed)) for seed in ("1/7", "1/7", "1/8"))
    assert first == again and first != other
