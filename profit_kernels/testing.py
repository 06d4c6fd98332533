"""Comparing quantized tensors: exact codes, except in a narrow band around the rounding edges.

At a rounding edge (u * s half-way between two integers) the last bit of a division decides between two codes, so two correct
backends may differ there by one step. Everywhere else the codes must be identical. A wide band would hide errors, so the
report says how much of the data it covered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layer import levels
from .ops.duq import reference

BAND_ULPS = 4
VALUE_ULPS = 2


@dataclass(frozen=True)
class BandReport:
    """What a comparison saw, in elements."""

    total: int
    inside: int
    differing_inside: int
    differing_outside: int

    @property
    def fraction_inside(self) -> float:
        return self.inside / self.total if self.total else 0.0

    def __add__(self, other: BandReport) -> BandReport:
        return BandReport(
            self.total + other.total,
            self.inside + other.inside,
            self.differing_inside + other.differing_inside,
            self.differing_outside + other.differing_outside,
        )


def _ulp(v: Tensor) -> Tensor:
    v = v.abs()
    return torch.nextafter(v, torch.full_like(v, torch.inf)) - v


def _scaled(x: Tensor, a: Tensor, offset: float, activation: str) -> Tensor:
    x, a = x.detach().cpu(), a.detach().cpu()
    return reference.scaled(x, reference.interval(a, x), offset, activation)


def rounding_band(
    x: Tensor,
    a: Tensor,
    *,
    bits: int,
    signed: bool = False,
    offset: float = 0.0,
    activation: str = "none",
    ulps: int = BAND_ULPS,
) -> Tensor:
    """True where u * s is within `ulps` ulp of a rounding edge, in the compute dtype. Arguments as duq_fake_quantize."""
    v = _scaled(x, a, offset, activation).clamp(-1.0 if signed else 0.0, 1.0) * levels(bits, signed)
    return (v - (v.floor() + 0.5)).abs() <= ulps * _ulp(v)


def clipping_band(
    x: Tensor, a: Tensor, *, signed: bool = False, offset: float = 0.0, activation: str = "none", ulps: int = BAND_ULPS
) -> Tensor:
    """True where u is within `ulps` ulp of a clipping end, where the gradient's mask flips."""
    u = _scaled(x, a, offset, activation)
    near_low = (u + 1).abs() if signed else u.abs()
    # Near 0 the ulp that counts is that of h - d, formed from numbers of the offset's size, not that of the difference.
    scale = _ulp(torch.maximum(u.abs(), torch.ones_like(u) * abs(offset)))
    return (near_low <= ulps * scale) | ((u - 1).abs() <= ulps * scale)


def assert_close_banded(
    actual: Tensor,
    expected: Tensor,
    x: Tensor,
    a: Tensor,
    c: Tensor,
    *,
    bits: int,
    signed: bool = False,
    offset: float = 0.0,
    activation: str = "none",
    ulps: int = BAND_ULPS,
    max_fraction_inside: float | None = None,
) -> BandReport:
    """Assert that two outputs of DuQ agree: the same code outside the band, at most one step apart inside, NaN for NaN.

    Args:
        actual, expected: outputs of duq_fake_quantize for (x, a, c) from two backends; any device, one dtype and shape.
        x, a, c, bits, signed, offset, activation: as given to duq_fake_quantize.
        ulps: half-width of the band around a rounding edge, in ulp of u * s.
        max_fraction_inside: fail if more of the data than this lies inside the band; None accepts any (edge-placed data).

    Returns: BandReport. Values of one code may differ by 2 ulp (float32 or float64), or by 1 ulp of a half-precision output.
    Raises: AssertionError that counts the differences and shows the first.
    """
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"dtypes differ: {actual.dtype} and {expected.dtype}"
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    band = rounding_band(x, a, bits=bits, signed=signed, offset=offset, activation=activation, ulps=ulps)
    C = reference.interval(c.detach().cpu(), x.detach().cpu())

    wide = C.dtype
    got, want = actual.to(wide), expected.to(wide)
    size = torch.maximum(want.abs(), (want - offset).abs())
    value_error = VALUE_ULPS * _ulp(size)
    if actual.dtype != wide:
        value_error = torch.maximum(value_error, torch.finfo(actual.dtype).eps * size)
    step = C / levels(bits, signed)

    both_nan = got.isnan() & want.isnan()
    one_nan = got.isnan() ^ want.isnan()
    apart = (got - want).abs()
    differs = ~both_nan & (one_nan | (apart > value_error))
    too_far = differs & (one_nan | ~band | (apart > step + value_error))
    report = BandReport(
        total=x.numel(),
        inside=int(band.sum()),
        differing_inside=int((differs & band).sum()),
        differing_outside=int((differs & ~band).sum()),
    )
    if too_far.any():
        first = tuple(too_far.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(too_far.sum())} of {report.total} values differ beyond the contract ({report.differing_outside} of them "
            f"outside the band of {ulps} ulp); first at {first}: x = {x.detach().cpu()[first].item()!r}, "
            f"got {actual[first].item()!r}, expected {expected[first].item()!r}"
        )
    if max_fraction_inside is not None and report.fraction_inside > max_fraction_inside:
        raise AssertionError(
            f"{report.fraction_inside:.2%} of the data lies inside the band, more than the {max_fraction_inside:.2%} allowed: "
            "the comparison would prove little"
        )
    return report


def edge_data(
    n: int, a: Tensor, *, bits: int, signed: bool = False, offset: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """n float32 inputs (activation "none") at the rounding edges, the codes and the ends, each moved by -2 to 2 ulp."""
    s = levels(bits, signed)
    A = torch.nn.functional.softplus(a.detach().double()).item()
    low = -2 * s if signed else 0
    halves = torch.randint(low, 2 * s + 1, (n,), generator=generator).double() / 2
    x = (halves / s * A + offset).float()
    for _ in range(2):
        move = torch.randint(-1, 2, (n,), generator=generator)
        x = torch.where(move == 0, x, torch.nextafter(x, move.sign() * torch.full_like(x, torch.inf)))
    return x
