"""The registered operators with the reference in them, as a backend with a kernel would be called."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from profit_kernels import dispatch


@contextmanager
def registered(kinds: Sequence[str] = ("block", "duq_depthwise", "depthwise")) -> Iterator[None]:
    """In a with-block `kinds` of call are served so; everything else by the reference's parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "choose", lambda op, x, *limits: "registered" if op in kinds else "reference")
        patch.setattr(dispatch, "serving", lambda package, *rest, **more: importlib.import_module(f"{package}.reference"))
        yield
