"""Correctness before speed: what a variant must agree with before it gets a figure."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from profit_kernels.layer import levels
from profit_kernels.testing import assert_close_banded

from .children import WrongResult

# Relative L2 distance of convolutions and gradients from the reference's: sums in another order (1e-6 and less), and a code
# in 10^5 at a rounding edge that takes its other value, 1/15 of the range away (2e-4). bfloat16: products of 8 bits.
RELATIVE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# The same for a layer with the BatchNorm in front of it, from the reference in float64 (bfloat16: under the same autocast).
LAYER = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
# A gradient of an interval: a sum of terms of mixed sign, compared by the root of the sum of their squares times this.
INTERVAL = {torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.1}
# Elements compared code by code, on the host; the rest of a large tensor is compared by its L2 distance.
CODES_COMPARED = 1 << 20
# KL per channel between convolutions that sum in another order; in bfloat16 their outputs are rounded to 8 bits.
KL = {torch.float32: {"rtol": 1e-3, "atol": 1e-6}, torch.bfloat16: {"rtol": 0.1, "atol": 1e-4}}


def relative_l2(what: str, actual: Tensor, expected: Tensor, allowed: float) -> None:
    """Raise WrongResult unless |actual - expected| <= allowed * |expected|, with the same shape and dtype."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise WrongResult(
            f"wrong result: {what} is {actual.dtype} {tuple(actual.shape)}, not {expected.dtype} {tuple(expected.shape)}"
        )
    apart = distance_l2(actual, expected)
    if not apart <= allowed:  # a NaN is wrong, too
        raise WrongResult(f"wrong result: {what} is {apart:.2g} from the reference (relative L2), {allowed:g} allowed")


def distance_l2(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|."""
    dtype = torch.promote_types(expected.dtype, torch.float32)
    size = torch.linalg.vector_norm(expected, dtype=dtype).clamp(min=1e-30)
    return float(torch.linalg.vector_norm(actual.to(dtype) - expected.to(dtype)) / size)


def nudged(x: Tensor) -> Tensor:
    """x moved up or down as much as the mean of many values in another order does: by 2^-20 of its deviation in float32; in
    half precision by a last bit, of one value in 64."""
    sign = torch.randint_like(x, 2) * 2 - 1
    if x.dtype.itemsize >= 4:
        return x + 2**-20 * x.std() * sign
    return torch.where(torch.randint_like(x, 64) == 0, torch.nextafter(x, sign * torch.inf), x)


def interval(what: str, actual: Tensor, expected: Tensor, grad: Tensor, own: float = 0.0) -> None:
    """Raise WrongResult unless the gradients of a raw interval agree as sums over `grad` can, and within `own`."""
    norm = float(torch.linalg.vector_norm(grad, dtype=torch.float32))
    slack = INTERVAL[grad.dtype] * (norm + float(expected.abs().max())) + own
    apart = float((actual - expected).abs().max())
    if not apart <= slack:
        raise WrongResult(f"wrong result: {what} differs from the reference by {apart:.2g}, {slack:.2g} allowed")


def codes(actual: Tensor, expected: Tensor, x: Tensor, a: Tensor, c: Tensor, **settings) -> None:
    """Raise WrongResult unless the first CODES_COMPARED outputs of DuQ are the reference's, by the contract of maths.md."""
    first = [t.detach().permute(0, 2, 3, 1).flatten()[:CODES_COMPARED] if t.dim() == 4 and a.numel() == 1 else t.detach()
             for t in (actual, expected, x)]  # fmt: skip
    try:
        assert_close_banded(*first, a.detach(), c.detach(), **settings)
    except AssertionError as error:
        raise WrongResult(f"wrong result: {error}") from None


def one_step(actual: Tensor, expected: Tensor, c: Tensor, bits: int, signed: bool) -> None:
    """Raise WrongResult unless another quantizer of the same range is within 1.5 steps: half for its integer zero point."""
    step = float(torch.nn.functional.softplus(c).max()) / levels(bits, signed)
    apart = float((actual.float() - expected.float()).abs().max())
    if not apart <= 1.5 * step + 0.02 * float(expected.abs().max()):
        raise WrongResult(f"wrong result: {apart / step:.2g} steps from the reference, 1.5 allowed")


def kl(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise WrongResult unless two KLs per channel agree."""
    try:
        torch.testing.assert_close(actual, expected, **KL[dtype])
    except AssertionError as error:
        raise WrongResult(f"wrong result: {' '.join(str(error).split())}") from None


def gradient(
    what: str, actual: Tensor, expected: Tensor, grad: Tensor, of_interval: bool, allowed: float | None = None
) -> None:
    """Raise WrongResult unless a gradient agrees: that of an interval by its sum, any other by relative L2, within `allowed`
    (None: RELATIVE)."""
    if of_interval:
        interval(what, actual, expected, grad)
    else:
        relative_l2(what, actual, expected, RELATIVE[grad.dtype] if allowed is None else allowed)


def gradients(
    names: Sequence[str], actual: Sequence[Tensor], expected: Sequence[Tensor], grad: Tensor, allowed: float | None = None
) -> None:
    """Gradients by name; those of intervals are called `a...` and `c...`."""
    for name, got, want in zip(names, actual, expected, strict=True):
        gradient(f"the gradient of {name}", got, want, grad, name[0] in "ac", allowed)


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """No TF32 while results are compared; what is timed keeps torch's default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
