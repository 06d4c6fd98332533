"""Variants for the tests of benchmarks/harness/children.py, in a module of their own that a child imports quickly."""

from __future__ import annotations

import time

import torch

from benchmarks.harness.children import Prepared, Unavailable, WrongResult
from benchmarks.harness.timing import Call


def prepare(job: str) -> Prepared:
    """A variant by its name."""
    if job == "absent":
        raise Unavailable("it needs a unicorn")
    if job == "wrong":
        raise WrongResult("wrong result: 7 instead of 8")
    if job == "dies":
        raise SystemExit(3)
    if job == "slow":
        time.sleep(60)
    x = torch.ones(10, requires_grad=True)
    return Prepared(Call(lambda _: sum(range(1000))), "cpu", lambda: x.exp(), facts={"backends": "none", "distance": 0.0})
