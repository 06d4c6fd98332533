"""Vectors recorded from the authors' published code; README.md of this folder describes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

_FILE = Path(__file__).with_name("reference_v1.npz")


def cases(*kinds: str) -> list[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """(settings, tensors by name) of every case of these kinds."""
    with np.load(_FILE) as stored:
        arrays: dict[int, dict[str, torch.Tensor]] = {}
        for key in stored.files:
            number, _, name = key.partition("/")
            if name:
                arrays.setdefault(int(number), {})[name] = torch.from_numpy(stored[key])
        settings = json.loads(stored["cases"].tobytes())
    return [(case, arrays[i]) for i, case in enumerate(settings) if case["kind"] in kinds]


def name(case: tuple[dict[str, Any], Any]) -> str:
    return f"{case[0]['id']}-{case[0]['kind']}-{case[0]['bits']}bit"
