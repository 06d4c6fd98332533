"""The public comparison itself: it must see what it is there to see."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import profit_kernels as pk
from profit_kernels.testing import assert_close_banded, edge_data, rounding_band

A, C = torch.tensor([0.3]), torch.tensor([0.7])
STEP = (F.softplus(C) / 15).item()


@pytest.fixture
def data(rng):
    x = torch.rand(5000, generator=rng)
    with pk.use_backend("reference"):
        return x, pk.duq_fake_quantize(x, A, C, bits=4)


def test_equal_tensors_pass_and_are_counted(data):
    x, y = data
    report = assert_close_banded(y, y, x, A, C, bits=4, max_fraction_inside=0.01)
    assert (report.total, report.differing_inside, report.differing_outside) == (5000, 0, 0)


def test_one_step_outside_the_band_fails(data):
    x, y = data
    wrong = y.clone()
    at = int((~rounding_band(x, A, bits=4)).nonzero()[0])
    wrong[at] += STEP
    with pytest.raises(AssertionError, match=r"1 of 5000 values differ .*1 of them outside"):
        assert_close_banded(wrong, y, x, A, C, bits=4)


def test_a_small_error_of_every_value_fails(data):
    x, y = data
    with pytest.raises(AssertionError):
        assert_close_banded(y * (1 + 1e-6), y, x, A, C, bits=4)


def test_inside_the_band_one_step_passes_and_two_fail(rng):
    x = edge_data(1000, A, bits=4, generator=rng)
    with pk.use_backend("reference"):
        y = pk.duq_fake_quantize(x, A, C, bits=4)
    at = int((rounding_band(x, A, bits=4) & (y > STEP) & (y < 10 * STEP)).nonzero()[0])
    other = y.clone()
    other[at] += STEP
    report = assert_close_banded(other, y, x, A, C, bits=4)
    assert report.differing_inside == 1
    assert report.differing_outside == 0
    other[at] += STEP
    with pytest.raises(AssertionError):
        assert_close_banded(other, y, x, A, C, bits=4)
    with pytest.raises(AssertionError, match="would prove little"):
        assert_close_banded(y, y, x, A, C, bits=4, max_fraction_inside=0.01)


def test_nan_must_meet_nan(data):
    x, y = data
    broken = y.clone()
    broken[7] = float("nan")
    assert_close_banded(broken, broken, x, A, C, bits=4)
    with pytest.raises(AssertionError):
        assert_close_banded(broken, y, x, A, C, bits=4)
