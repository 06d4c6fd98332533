"""Cases of the block operator, and the same computed by torch's own functions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles import ACTIVATIONS, textbook_duq


@dataclass(frozen=True)
class Case:
    """One layer: shapes, geometry, quantizers and the state of its BatchNorm."""

    name: str
    channels: int = 6
    out: int = 8
    kernel: int = 1
    groups: int = 1
    stride: int = 1
    padding: int | tuple[int, ...] = 0
    size: tuple[int, int, int] = (4, 7, 5)  # N, H, W
    activation: str = "relu6"
    offset: float = 0.0
    signed: bool = False
    act_bits: int | None = 4
    weight_bits: int | None = 4
    training: bool = True
    affine: bool = True
    tracked: bool = True
    bias: bool = False


_BASE = Case("pointwise")
CASES = [
    _BASE,
    replace(_BASE, name="hardswish", activation="hardswish", offset=-0.375, act_bits=3),
    replace(_BASE, name="signed", activation="none", signed=True, bias=True),
    replace(_BASE, name="relu full precision weight", activation="relu", weight_bits=None),
    replace(_BASE, name="activation alone", activation="hardswish", act_bits=None, bias=True),
    replace(_BASE, name="eval", training=False),
    replace(_BASE, name="eight channels", channels=8, activation="hardswish", offset=-0.375, bias=True),
    replace(_BASE, name="eight channels signed", channels=8, activation="none", signed=True, weight_bits=3),
    replace(_BASE, name="not affine", affine=False, act_bits=8),
    replace(_BASE, name="not tracked", tracked=False),
    replace(_BASE, name="strided", stride=2, channels=19, size=(3, 9, 8)),
    replace(_BASE, name="dense", kernel=3, padding=1, activation="hardswish", offset=-0.375),
    replace(_BASE, name="grouped", kernel=3, padding=1, groups=2),
    replace(_BASE, name="depthwise", kernel=3, padding=1, out=6, groups=6, stride=2),
    replace(
        _BASE, name="depthwise same", kernel=5, padding=(1, 2, 1, 2), out=6, groups=6, activation="hardswish", offset=-0.375
    ),
    replace(_BASE, name="depthwise eval", kernel=3, padding=1, out=6, groups=6, training=False, bias=True),
]


@dataclass
class Sample:
    """Leaves, in the order of block_conv2d's arguments, and the running statistics."""

    x: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    weight: Tensor
    a: Tensor
    c: Tensor
    a_w: Tensor
    c_w: Tensor
    bias: Tensor | None

    def leaves(self) -> list[Tensor]:
        """Everything that has a gradient."""
        return [t for t in (self.x, self.gamma, self.beta, self.weight, self.a, self.c, self.a_w, self.c_w, self.bias)
                if t is not None]  # fmt: skip


def sample(case: Case, rng: torch.Generator, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Sample:
    """Fresh data; x has a mean and a deviation of its own in every channel."""
    n, h, w = case.size
    c = case.channels

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return (torch.rand(*shape, generator=rng, dtype=torch.float64) * (high - low) + low).to(dtype)

    spread, centre = uniform(1, c, 1, 1, low=0.3, high=3.0), uniform(1, c, 1, 1, low=-2, high=2)
    x = torch.randn(n, c, h, w, generator=rng, dtype=torch.float64).to(dtype) * spread + centre
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(case.out, c // case.groups, case.kernel, case.kernel, generator=rng, dtype=torch.float64).to(dtype)
    made = Sample(
        x=x,
        gamma=uniform(c, low=-1.5, high=1.5) if case.affine else None,
        beta=uniform(c, low=-0.5, high=1.5) if case.affine else None,
        mean=uniform(c, low=-1, high=1) if case.tracked else None,
        var=uniform(c, low=0.5, high=2) if case.tracked else None,
        weight=weight,
        a=uniform(1, low=0.2, high=1.5),
        c=uniform(1, low=0.2, high=1.5),
        a_w=uniform(1, low=0.5, high=1.5),
        c_w=uniform(1, low=0.5, high=1.5),
        bias=uniform(case.out) if case.bias else None,
    )
    for leaf in made.leaves():
        leaf.requires_grad_()
    return made


def arguments(case: Case) -> dict:
    """Keyword arguments of block_conv2d."""
    return {
        "training": case.training, "act_bits": case.act_bits, "weight_bits": case.weight_bits, "signed": case.signed,
        "offset": case.offset, "activation": case.activation, "stride": case.stride, "padding": case.padding,
        "groups": case.groups, "momentum": 0.3,
    }  # fmt: skip


def textbook(case: Case, s: Sample) -> Tensor:
    """The same by torch's batch_norm and conv2d and the textbook quantizer; updates the running statistics."""
    v = F.batch_norm(s.x, s.mean, s.var, s.gamma, s.beta, case.training, 0.3, 1e-5)
    if case.act_bits is None:
        h = ACTIVATIONS[case.activation](v)
    else:
        h = textbook_duq(v, s.a, s.c, case.act_bits, case.signed, case.offset, case.activation)
    weight = s.weight
    if case.weight_bits is not None:
        weight = textbook_duq(weight, s.a_w, s.c_w, case.weight_bits, True, 0.0, "none")
    pad = case.padding if isinstance(case.padding, tuple) else (case.padding,) * 4
    return F.conv2d(F.pad(h, pad, value=case.offset), weight, s.bias, case.stride, groups=case.groups)
