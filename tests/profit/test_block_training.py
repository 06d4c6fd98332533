"""Training nets whose convolutions apply the BatchNorm in front of them, against the same nets converted with fuse=False."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from profit import (
    AIWQMonitor,
    DuQConfig,
    ProgressiveFreezer,
    calibrate_,
    freeze_all,
    quant_layers,
    quantize_,
    reestimate_bn_,
    set_bits,
)
from profit.nn import DeferredBatchNorm
from profit_kernels import native
from tests import tolerances
from tests.profit.block_nets import (
    CHAIN,
    Chain,
    assert_same_state,
    blocks,
    data,
    exact,
    pair,
    train,
)

needs_library = pytest.mark.skipif(not native.available(), reason=native.why_missing() or "")


@pytest.mark.parametrize("name, found", [("mobilenetv2_050", 36), ("mobilenetv3_small_050", 14)])
def test_timm_nets(name, found, rng):
    """MobileNetV2: the depthwise and the projection convolutions of 17 blocks, and the two behind a bottleneck that nothing
    else reads. MobileNetV3 puts squeeze-and-excite in between."""
    timm = pytest.importorskip("timm")
    x = torch.randn(4, 3, 64, 64, generator=rng, dtype=torch.float64)
    fused, unfused = pair(lambda: timm.create_model(name, num_classes=5), x)
    assert len(blocks(fused)) == found and not blocks(unfused)
    assert all(isinstance(fused.get_submodule(norm), DeferredBatchNorm) for norm in blocks(fused).values())
    depthwise = [n for n, layer in quant_layers(fused).items() if getattr(layer, "is_depthwise", False)]
    assert set(depthwise) <= set(blocks(fused))
    assert not [m for m in fused.modules() if type(m).__name__ in ("BatchNorm2d", "BatchNormAct2d")]
    batches = [x + i for i in range(2)]
    with exact():
        # Untrained, some of these gradients are in the thousands: larger steps are chaos.
        train(fused, batches, 2, lr=1e-5)
        train(unfused, batches, 2, lr=1e-5)
    assert_same_state(fused, unfused, tolerances.FUSED_TRAINING)


@pytest.mark.parametrize("bits", [(4, 4), (None, 4), (None, None), (3, 8)])
@pytest.mark.parametrize("padding", ["zero", "negative"])
@pytest.mark.parametrize("norm", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_training_is_the_same(norm, padding, bits, rng):
    x = data(rng)
    fused, unfused = pair(lambda: Chain(**norm), x, weight_bits=bits[0], act_bits=bits[1], padding=padding)
    assert blocks(fused) == CHAIN
    batches = [data(rng) for _ in range(3)]
    with exact():
        train(fused, batches)
        train(unfused, batches)
        assert_same_state(fused, unfused, tolerances.FUSED_TRAINING)
        torch.testing.assert_close(fused.eval()(x), unfused.eval()(x), **tolerances.FUSED_TRAINING)


@pytest.mark.parametrize("which", ["all", "one"])
def test_batch_norm_in_eval_mode_while_the_net_trains(which, rng):
    fused, unfused = pair(Chain, data(rng))
    batches = [data(rng) for _ in range(3)]
    with exact():
        for net in (fused, unfused):
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d) and (which == "all" or module is net.bn2):
                    module.eval()
            train(net, batches)
    assert_same_state(fused, unfused, tolerances.FUSED_TRAINING)
    assert int(fused.bn2.num_batches_tracked) == 0


@needs_library
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_kernels_train_alike(layout, rng):
    """float32 and the C++ kernels: a few codes may fall on the other side of an edge."""
    x = data(rng, torch.float32).contiguous(memory_format=layout)
    nets = [net.to(memory_format=layout) for net in pair(Chain, x, padding="negative")]
    losses = [F.cross_entropy(train(net, [x] * 4, 4)(x), torch.arange(4)).item() for net in nets]
    assert losses[0] == pytest.approx(losses[1], rel=tolerances.FUSED_LOSS)
    for norm in ("bn1", "bn2", "bn3"):
        ours, theirs = (net.get_submodule(norm).running_var for net in nets)
        torch.testing.assert_close(ours, theirs, rtol=tolerances.FUSED_LOSS, atol=0)


def test_an_optimizer_from_before_and_hooks_after(rng):
    x, model = data(rng), Chain().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    quantize_(model, DuQConfig(None, None), x)
    seen = []
    model.bn1.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    before = model.bn1.weight.detach().clone()
    with exact():
        model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.bn1.weight, before)
    assert seen[0][0] is seen[0][1]  # the input, untouched: what the documentation says


def test_calibration_and_reestimation_are_the_same(rng):
    x = data(rng)
    fused, unfused = pair(Chain, x, act_bits=None)
    for mode in ("corrected", "original"):
        with exact():
            ours, theirs = (calibrate_(net, [x, x + 0.1], mode=mode) for net in (fused, unfused))
        assert ours.keys() == theirs.keys()
        assert all(ours[name] == pytest.approx(value, rel=1e-9) for name, value in theirs.items())
    for net in (fused, unfused):
        set_bits(net, act_bits=4)
        with exact():
            assert reestimate_bn_(net, [x, x * 2, x - 1], 3) == 3
        assert net.training and net.bn1.momentum == 0.1
    assert_same_state(fused, unfused, tolerances.FUSED_TRAINING)


@pytest.mark.parametrize("mode", ["corrected", "original"])
def test_aiwq_is_the_same(mode, rng):
    fused, unfused = pair(Chain, data(rng), padding="negative")
    batches, scores = [data(rng) for _ in range(4)], []
    for net in (fused, unfused):
        with exact(), AIWQMonitor(net, mode) as monitor:
            train(net, batches, 4, monitor.step)
            scores.append(monitor.running_means())
            assert monitor.samples() == dict.fromkeys(("stem", "dw", "pw", "last"), 3)
    assert scores[0].keys() == scores[1].keys() and all(value > 0 for value in scores[1].values())
    for name, value in scores[1].items():
        assert scores[0][name] == pytest.approx(value, rel=1e-6), name
    assert_same_state(fused, unfused, tolerances.FUSED_TRAINING)


@needs_library
def test_aiwq_of_unchanged_weights_is_nothing(rng):
    """The monitor normalises with the arithmetic of the kernel: another rounding would flip codes and count as instability."""
    x = data(rng, torch.float32, n=16).contiguous(memory_format=torch.channels_last)
    fused, _ = pair(Chain, x, padding="negative")
    with AIWQMonitor(fused) as monitor:
        for _ in range(3):
            fused(x).sum().backward()
            monitor.step()
        assert max(monitor.running_means().values()) < tolerances.KL_OF_NOTHING


def weight_gradients(net, x, monkeypatch):
    """How often a weight gradient of a convolution was computed."""
    computed = []
    real = torch.ops.aten.convolution_backward

    def watched(*args):
        computed.append(args[-1][1])
        return real(*args)

    monkeypatch.setattr(torch.ops.aten, "convolution_backward", watched)
    net(x).square().sum().backward()
    monkeypatch.undo()
    return computed


@pytest.mark.parametrize("freeze, computed", [("weights", True), ("weights+intervals", False)])
def test_frozen_layers_compute_no_weight_gradient(freeze, computed, rng, monkeypatch):
    x = data(rng)
    fused, unfused = pair(Chain, x)
    scores = {"stem": 4.0, "dw": 3.0, "pw": 2.0, "last": 1.0}
    for net in (fused, unfused):
        ProgressiveFreezer(net, scores, stages=4, freeze=freeze).apply(3)
    with exact():
        needs = weight_gradients(fused, x, monkeypatch)
        unfused(x).square().sum().backward()
    # Backwards through the blocks: last trains; the intervals of frozen weights have gradients from that of the weight.
    assert [bool(n) for n in needs] == [True, computed, computed]
    for (name, ours), theirs in zip(fused.named_parameters(), unfused.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, **tolerances.FUSED_TRAINING)
    assert fused.dw.weight.grad is None and fused.last.weight.grad is not None
    assert (fused.dw.weight_quantizer.a.grad is not None) is computed


def test_the_cached_weight_follows_every_change(rng):
    x = data(rng)
    fused, unfused = pair(Chain, x)
    with exact():
        for net in (fused, unfused):
            freeze_all(net, intervals=True)

        def same(of=lambda net: None):
            for net in (fused, unfused):
                of(net)
            torch.testing.assert_close(fused(x), unfused(x), **tolerances.FUSED_TRAINING)
            assert fused.dw.cached_weight() is not None
            torch.testing.assert_close(fused.dw.cached_weight(), fused.dw.weight_quantizer(fused.dw.weight))

        same()
        same(lambda net: set_bits(net, weight_bits=3))
        same(lambda net: net.dw.weight_quantizer.a.detach().add_(0.1))
        same(lambda net: net.load_state_dict({k: v * 1.1 if k == "dw.weight" else v for k, v in net.state_dict().items()}))
        same(lambda net: net.eval())
        same(lambda net: net.to(torch.float64))
    # In float32 the kernels may serve the fused net alone.
    fused.to(torch.float32)
    assert fused.dw.cached_weight().dtype == torch.float32
    fused(x.float())
