"""Weight files made to deceive: their checksum fits whatever they say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor


def signed(text: str, tensors: Mapping[str, Tensor]) -> str:
    """A description with the checksum that it and the tensors need, computed as docs/files.md says; itself if it has none."""
    try:
        description = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(description, dict) or "sha256" not in description:
        return text
    digest = hashlib.sha256(json.dumps(description | {"sha256": ""}).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)} ".encode() + value.numpy().tobytes())
    return json.dumps(description | {"sha256": digest.hexdigest()})
