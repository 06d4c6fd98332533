"""Triton's interpreter made to round as a device does.

As it comes (3.6 to 3.8) it truncates float32 to bfloat16 instead of rounding, and rounds the product in tl.fma.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch


def round_as_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch tl.fma and the casts between float32 and bfloat16 for the length of a test."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast = builder.cast_impl

    def fma(self, x, y, z):
        # The product of two float32 is exact in float64. The sum is rounded to odd there, so that the second rounding, to
        # float32, is that of the exact sum (Boldo and Melquiond, IEEE Transactions on Computers 57(4), 2008).
        product, addend = (x.data.astype(np.float64) * y.data.astype(np.float64)), z.data.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            total = np.atleast_1d(product + addend)
            part = total - product
            lost = np.atleast_1d((product - (total - part)) + (addend - part))
            even = (total.view(np.int64) & 1) == 0
            inexact = np.isfinite(total) & (lost != 0) & np.isfinite(lost) & even
            odd = np.where(inexact, np.nextafter(total, np.copysign(np.inf, lost)), total)
            return handle(odd.reshape(np.shape(product + addend)).astype(x.data.dtype), z.dtype.scalar)

    def to(self, src, dst_type):
        pair = (src.dtype.scalar, dst_type.scalar)
        if pair == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.array(src.data)).to(torch.bfloat16)
            return handle(rounded.view(torch.int16).numpy().view(np.uint16), dst_type.scalar)
        if pair == (tl.bfloat16, tl.float32):
            return handle((src.data.astype(np.uint32) << 16).view(np.float32), dst_type.scalar)
        return cast(self, src, dst_type)

    monkeypatch.setattr(builder, "create_fma", fma)
    monkeypatch.setattr(builder, "cast_impl", to)
    for name in ("create_fp_ext", "create_fp_trunc"):
        monkeypatch.setattr(builder, name, to)
