"""AIWQMonitor over many iterations: accumulation, copies, resuming, shared layers, and no waiting for the device."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from profit.aiwq import AIWQMonitor
from tests import tolerances
from tests.profit.recorder import Recorder, change, dw_layer, sgd
from tests.profit.tiny_net import batch, tiny_net, train_step


def test_accumulated_forwards_are_one_sample(rng):
    net = tiny_net(rng)
    optimizer, decay = sgd(net), 0.5
    monitor = AIWQMonitor(net, decay=decay)
    recorder = Recorder(net.dw)
    train_step(net, optimizer, *batch(rng))
    monitor.step()
    old, kls = recorder.weight, []
    for _ in range(3):
        x, target = batch(rng)
        F.cross_entropy(net(x), target).backward()
        kls.append(np.minimum(recorder.kl(old), 1).mean())
    optimizer.step()
    monitor.step()
    assert monitor.samples()["dw"] == 1
    np.testing.assert_allclose(monitor.running_means()["dw"], (1 - decay) * np.mean(kls), **tolerances.KL_CONV)


def test_an_iteration_without_forward_breaks_the_chain(rng):
    net = tiny_net(rng)
    monitor = AIWQMonitor(net)
    for forward, samples in ((True, 0), (True, 1), (False, 1), (True, 1), (True, 2)):
        if forward:
            net(batch(rng)[0])
        monitor.step()
        # never a comparison with weights older than the iteration right before
        assert monitor.samples()["dw"] == samples


def test_evaluation_and_no_grad_leave_no_trace(rng):
    nets = [tiny_net(rng)]
    nets.append(copy.deepcopy(nets[0]))
    monitors, optimizers = [AIWQMonitor(net) for net in nets], [sgd(net) for net in nets]
    for _ in range(3):
        x, target = batch(rng)
        for i, (net, monitor, optimizer) in enumerate(zip(nets, monitors, optimizers, strict=True)):
            if i:
                net.eval()
                net(batch(rng)[0])
                net.train()
                with torch.no_grad():
                    net.dw(torch.randn(2, 8, 4, 4, generator=rng))
            train_step(net, optimizer, x, target)
            monitor.step()
    assert monitors[0].running_means() == monitors[1].running_means()


def test_copies_of_the_model_do_not_report(rng):
    net = tiny_net(rng)
    monitor = AIWQMonitor(net)
    twin = copy.deepcopy(net)
    pickled = pickle.dumps(net)
    for model in (twin, net):
        model(batch(rng)[0])
        monitor.step()
    assert not any(monitor.samples().values())  # net itself ran in one iteration only
    assert b"AIWQMonitor" not in pickled and b"_no_probe" in pickled
    with AIWQMonitor(twin) as own:
        for _ in range(2):
            twin(batch(rng)[0])
            own.step()
    assert set(own.samples().values()) == {1}


def test_resumed_run_is_bit_identical(rng):
    net = tiny_net(rng)
    optimizer, monitor = sgd(net), AIWQMonitor(net, every=2, decay=0.9)
    data = [batch(rng) for _ in range(9)]
    for i, (x, target) in enumerate(data):
        if i == 4:  # right between a captured and a compared iteration
            saved = [copy.deepcopy(part.state_dict()) for part in (net, optimizer, monitor)]
            assert all(isinstance(value, (int, torch.Tensor)) for value in saved[2].values())
            resumed = copy.deepcopy(net)
        train_step(net, optimizer, x, target)
        monitor.step()
    parts = (resumed, sgd(resumed), AIWQMonitor(resumed, every=2, decay=0.9))
    for part, state in zip(parts, saved, strict=True):
        part.load_state_dict(state)
    for x, target in data[4:]:
        train_step(parts[0], parts[1], x, target)
        parts[2].step()
    for ours, theirs in ((monitor.state_dict(), parts[2].state_dict()), (net.state_dict(), resumed.state_dict())):
        assert list(ours) == list(theirs)
        for name, value in ours.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[name])), name


def test_state_of_something_else_is_refused(rng):
    net = tiny_net(rng)
    state = AIWQMonitor(net).state_dict()
    with pytest.raises(ValueError, match="mode, every, decay"):
        AIWQMonitor(net, "original").load_state_dict(state)
    with pytest.raises(ValueError, match="other layers.*dw"):
        AIWQMonitor(nn.Sequential(net.stem, net.pw)).load_state_dict(state)


@pytest.mark.parametrize(("change", "message"), [
    (None, "a mapping is needed, got None"), ({}, "'mode' is missing"), ({"mode": 9}, "mode must be.* within 0..1"),
    ({"mode": "corrected"}, "mode must be"), ({"every": 1.5}, "every must be"), ({"decay": "a"}, "decay must be"),
    ({"iteration": None}, "iteration must be"), ({"layer.dw": torch.zeros(3)}, r"'layer.dw' must be .*\[4\], got .*\[3\]"),
    ({"layer.dw": None}, "'layer.dw' must be"), ({"previous.dw": torch.zeros(1)}, "'previous.dw' must be"),
    ({"previous.dw": torch.zeros(8, 1, 3, 3, dtype=torch.int64)}, "'previous.dw' must be a tensor of floats.*int64"),
    ({"previous.x": torch.zeros(1)}, "other layers; differing: x"), ({"previous.dw": "absent"}, "differing: dw"),
])  # fmt: skip
def test_damaged_state_is_refused(rng, change, message):
    net = tiny_net(rng)
    monitor = AIWQMonitor(net)
    net(batch(rng)[0])
    monitor.step()
    state = monitor.state_dict()
    assert "previous.dw" in state
    damaged = change if not change else {**state, **change}
    if change == {"previous.dw": "absent"}:
        del damaged["previous.dw"]
    with pytest.raises(ValueError, match=message) as caught:
        monitor.load_state_dict(damaged)
    assert "\n" not in str(caught.value)
    after = monitor.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(after[key])) for key, value in state.items())


class Branching(nn.Module):
    """`shared` runs twice, `rare` only when asked for; `twin` has the weight of `shared` and its own quantizers."""

    def __init__(self, rng):
        super().__init__()
        self.shared = dw_layer(rng)
        self.alias = self.shared
        self.rare = dw_layer(rng)
        self.twin = dw_layer(rng)
        self.twin.weight = self.shared.weight

    def forward(self, x, rare=True):
        x = self.shared(self.alias(x))
        x = self.twin(x)
        return self.rare(x) if rare else x


def test_shared_and_missing_layers(rng):
    net, decay = Branching(rng), 0.5
    monitor = AIWQMonitor(net, decay=decay)
    recorder = Recorder(net.rare)
    mean, weights = 0.0, []
    for t in range(4):
        # Where `rare` does not run, its weight of that iteration is still what the next one compares with.
        weights.append(net.rare.quantized_weight().detach().clone())
        net(torch.randn(2, 8, 9, 9, generator=rng), rare=t in (1, 3))
        monitor.step()
        if t in (1, 3):
            mean = decay * mean + (1 - decay) * np.minimum(recorder.kl(weights[t - 1]), 1).mean()
        change(net.rare, rng)
        change(net.shared, rng, 0.02)
    assert monitor.samples() == {"shared": 3, "rare": 2, "twin": 3}
    np.testing.assert_allclose(monitor.running_means()["rare"], mean, **tolerances.KL_CONV)


def test_scores_correct_the_bias_of_each_layer_by_its_own_samples(rng):
    net = Branching(rng)
    monitor = AIWQMonitor(net, decay=0.999)
    for t in range(6):
        net(torch.randn(2, 8, 9, 9, generator=rng), rare=t < 3)
        monitor.step()
        change(net.shared, rng)
        change(net.rare, rng)
    means, scores, samples = monitor.running_means(), monitor.scores(), monitor.samples()
    assert samples == {"shared": 5, "rare": 2, "twin": 5}
    for name in scores:
        assert scores[name] == pytest.approx(means[name] / (1 - 0.999 ** samples[name]), rel=1e-12)
    assert scores["rare"] > 100 * means["rare"]


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if name in self.WAITING or masked:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["corrected", "original"])
def test_hooks_and_step_do_not_wait_for_the_device(rng, mode):
    net = tiny_net(rng)
    monitor = AIWQMonitor(net, mode)
    with HostReads() as reads:
        for _ in range(3):
            net(batch(rng)[0])
            monitor.step()
    assert reads.found == []
    with HostReads() as reads:
        torch.ones(1).item()
    assert reads.found == ["_local_scalar_dense"]  # the counter itself works


def test_remove_and_context_manager(rng):
    net = tiny_net(rng)
    with AIWQMonitor(net) as monitor:
        for _ in range(2):
            net(batch(rng)[0])
            monitor.step()
    assert not net.dw._forward_hooks
    scores = monitor.scores()
    net(batch(rng)[0])
    monitor.step()
    assert monitor.scores() == scores
