"""Other libraries, where they are installed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.harness import options, peers
from benchmarks.harness.children import Unavailable, WrongResult
from benchmarks.ops import cases
from benchmarks.step import jobs


def test_a_peer_that_is_not_installed_is_a_line(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    job = jobs.Job("brevitas", options.TOY_MODEL, 2, 32, "cpu", "fp32", 1)
    with pytest.raises(Unavailable, match=r"not installed: pip install 'profit-kernels\[peers\]'"):
        jobs.build(job, jobs.example(job)[0])
    assert not {"brevitas", "torchao"} & set(cases.duq((2, 8, 4, 4), "signed", torch.float32, "cpu").variants)


@pytest.mark.parametrize("peer", peers.PEERS)
def test_a_peer_quantizes_to_16_levels_and_trains(peer, rng):
    pytest.importorskip(peer)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Flatten(), nn.Linear(128, 4)
    )
    before = net[2].weight.clone()
    peers.network(peer, net)
    assert type(net[0]) is nn.Conv2d, "the first layer stays"
    assert not {nn.Conv2d, nn.Linear} & {type(net[2]), type(net[4])}
    x = torch.randn(4, 3, 8, 8, generator=rng).to(memory_format=torch.channels_last)
    assert "gradients finite" in peers.check(peer, net, lambda: net(x).square().mean())
    torch.testing.assert_close(dict(net[2].named_parameters(remove_duplicate=False)).get(
        "weight", getattr(getattr(net[2], "layer", None), "weight", None)), before)  # fmt: skip
    quantizer = peers.quantizer(peer, "cpu", True)
    y = torch.randn(1, 512, 1, 1, generator=rng).to(memory_format=torch.channels_last)
    assert 8 < quantizer(y).unique().numel() <= 16


def test_a_peer_must_be_finite():
    layer = nn.Linear(2, 2)
    with pytest.raises(WrongResult, match="not finite"):
        peers.check("torch", layer, lambda: layer(torch.full((1, 2), torch.inf)).sum())
