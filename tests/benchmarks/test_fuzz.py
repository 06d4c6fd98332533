"""A few dozen of the damages of `python -m benchmarks fuzz`: no traceback, no hang, no silent difference."""

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

CASES = 60


def _check(work, seed: int) -> None:
    fuzz.preload()
    found = fuzz.campaign(work, CASES, seed, real_every=0)
    bad = found["bad"]
    assert not bad, f"python -m benchmarks fuzz --seed {seed} --only {bad[0]['case']}: {bad[0]}"
    assert sum(found["outcomes"].values()) == CASES and found["outcomes"]["refused in one line"] > 20


def test_known_damages_end_as_they_should(tmp_path) -> None:
    _check(tmp_path, seed=0)  # the first of those in benchmarks/results/fuzz.json


@pytest.mark.slow
def test_fresh_damages_end_as_they_should(tmp_path) -> None:
    _check(tmp_path, seed_of("fuzz") % 10**6)


def test_a_case_is_a_function_of_its_seed() -> None:
    data = bytes(range(256)) * 4
    first, again, other = (fuzz_mutations.damaged_bytes(data, Random(seed)) for seed in ("1/7", "1/7", "1/8"))
    assert first == again and first != other
