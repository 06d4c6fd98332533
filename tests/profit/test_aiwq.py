"""AIWQMonitor against hand-written loops, the golden vectors and the table of differences between its two modes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from profit.aiwq import AIWQMonitor
from profit.errors import TrainingError
from profit.nn.baselines import LSQInput, LSQWeight
from profit.nn.conv import QuantConv2d
from tests import golden, tolerances
from tests.profit.recorder import Recorder, change, dw_layer, sgd
from tests.profit.tiny_net import batch, tiny_net, train_step

RANKED = ["stem", "dw", "pw"]


@pytest.mark.parametrize("every", [1, 3])
def test_running_mean_equals_a_hand_written_loop(rng, every):
    net, decay = tiny_net(rng), 0.9
    optimizer = sgd(net)
    recorders = {name: Recorder(getattr(net, name)) for name in RANKED}
    monitor = AIWQMonitor(net, every=every, decay=decay)
    mean, samples, clamped, previous = dict.fromkeys(RANKED, 0.0), 0, 0, None
    for t in range(10):
        train_step(net, optimizer, *batch(rng))
        monitor.step()
        if previous is not None and t % every == 0:
            samples += 1
            for name, recorder in recorders.items():
                kl = recorder.kl(previous[name])
                clamped += int((kl > 1).sum())
                mean[name] = decay * mean[name] + (1 - decay) * np.minimum(kl, 1).mean()
        previous = {name: recorder.weight for name, recorder in recorders.items()}
        for name in RANKED:  # on top of the optimizer's steps, so that codes certainly change
            change(getattr(net, name), rng, 0.05)
    assert monitor.samples() == dict.fromkeys(RANKED, samples)
    assert (monitor.clamped, monitor.skipped, monitor.steps) == (clamped, 0, 10)
    for name, value in monitor.running_means().items():
        assert value > 1e-4
        np.testing.assert_allclose(value, mean[name], **tolerances.KL_CONV)
        np.testing.assert_allclose(monitor.scores()[name], mean[name] / (1 - decay**samples), **tolerances.KL_CONV)


@pytest.mark.parametrize("case", golden.cases("aiwq"), ids=golden.name)
@pytest.mark.parametrize("mode", ["corrected", "original"])
def test_golden_through_the_monitor(case, mode):
    settings, t = case
    geometry = {key: settings[key] for key in ("stride", "padding", "groups", "bias") if key in settings}
    layer = QuantConv2d(
        settings["in_channels"], settings["out_channels"], settings["kernel_size"],
        **geometry, pad_value=settings["pad_value"], ranked=True,
    )  # fmt: skip
    monitor = AIWQMonitor(layer, mode)
    for weight in (t["w_old"], t["w_new"]):
        layer.weight.data.copy_(weight)
        layer(t["x"])
        monitor.step()
    (score,) = monitor.scores().values()
    if mode == "corrected" or settings["pad_value"] == 0:
        np.testing.assert_allclose(score, t["aiwq"].item(), **tolerances.GOLDEN_KL)
    else:  # the published code compares with a zero-padded old output, the golden vectors with the right one
        assert abs(score / t["aiwq"].item() - 1) > 1e-3


def two_steps(layer, monitor, rng, move=None):
    """Forward, step, an optional change of the layer, forward on other data, step."""
    for first in (True, False):
        layer(torch.randn(6, 8, 9, 9, generator=rng))
        monitor.step()
        if first and move is not None:
            move()


def test_identical_weights_are_stable_only_with_the_right_padding(rng):
    layer = dw_layer(rng)
    recorder = Recorder(layer, pad_value=0.0)
    corrected, original = AIWQMonitor(layer), AIWQMonitor(layer, "original")
    for _ in range(2):
        layer(torch.randn(6, 8, 9, 9, generator=rng))
        corrected.step()
        original.step()
    assert corrected.scores() == {"": 0.0}
    spurious = recorder.kl(recorder.weight).mean()
    assert spurious > 1e-4
    np.testing.assert_allclose(original.scores()[""], spurious, **tolerances.KL_CONV)


@pytest.mark.parametrize(
    "changes",
    [
        {"same_padding": True, "stride": 2},
        {"padding": 2, "dilation": 2, "groups": 1},
        {"padding_mode": "reflect", "pad_value": 0.0, "groups": 2},
        {"channels": 8, "groups": 4, "bits": 2},
        {"bias": True, "kind": "signed", "activation": "none", "pad_value": 0.0},
        {"bits": None, "act_bits": None},
    ],
    ids=str,
)
def test_corrected_follows_the_layer(rng, changes):
    layer = dw_layer(rng, **changes)
    recorder = Recorder(layer)
    if layer.padding_mode == "reflect":
        layer._forward_hooks.clear()
        layer.register_forward_hook(lambda m, args, y: record_reflected(recorder, m, args, y))
    monitor = AIWQMonitor(layer)
    old = layer.quantized_weight().detach().clone()
    two_steps(layer, monitor, rng, lambda: change(layer, rng, 0.05))
    expected = np.minimum(recorder.kl(old), 1).mean()
    assert expected > 1e-6
    np.testing.assert_allclose(monitor.scores()[""], expected, **tolerances.KL_CONV)


@torch.no_grad()
def record_reflected(recorder, layer, args, y):
    recorder.y = y.detach()
    recorder.padded = F.pad(layer.input_quantizer(args[0]), layer.padding4(args[0]), mode="reflect").double()


def test_baseline_quantizers_are_ranked_too(rng):
    layer = QuantConv2d(
        8, 8, 3, padding=1, groups=8, bias=False, ranked=True,
        input_quantizer=LSQInput(kind="offset", offset=-0.375, activation="hardswish"), weight_quantizer=LSQWeight(),
    )  # fmt: skip
    layer.set_weight_bits(4)
    layer.set_act_bits(4)
    layer.input_quantizer.set_range(2.0)
    recorder, monitor = Recorder(layer), AIWQMonitor(layer)
    old = layer.quantized_weight().detach().clone()
    two_steps(layer, monitor, rng, lambda: change(layer, rng))
    np.testing.assert_allclose(monitor.scores()[""], np.minimum(recorder.kl(old), 1).mean(), **tolerances.KL_CONV)


def test_above_one_clamps_a_channel_or_drops_the_layer(rng):
    layer = dw_layer(rng, bits=None)

    def explode():
        change(layer, rng, 0.02)
        layer.weight.data[3] *= 40  # KL of about 800 in one channel

    for mode in ("corrected", "original"):
        monitor = AIWQMonitor(layer, mode)
        two_steps(layer, monitor, rng, explode)
        if mode == "corrected":
            assert (monitor.clamped, monitor.skipped, monitor.samples()[""]) == (1, 0, 1)
            assert 1 / 8 <= monitor.scores()[""] < 0.5
        else:
            assert (monitor.clamped, monitor.skipped, monitor.samples()[""]) == (0, 1, 0)
            assert monitor.running_means()[""] == 0.0
            with pytest.raises(TrainingError, match="no sample"):
                monitor.scores()
        monitor.remove()


def test_nan_is_skipped_or_poisons_for_ever(rng):
    layer = dw_layer(rng, bits=None)
    monitors = [AIWQMonitor(layer), AIWQMonitor(layer, "original")]
    for t in range(4):
        x = torch.randn(2, 8, 9, 9, generator=rng)
        if t == 2:
            x[0] = math.nan
        layer(x)
        for monitor in monitors:
            monitor.step()
        change(layer, rng, 0.02)
    corrected, original = monitors
    assert (corrected.samples()[""], corrected.skipped) == (2, 1)
    assert corrected.scores()[""] > 0
    assert math.isnan(original.scores()[""])


def test_one_nan_channel_leaves_the_others(rng):
    layer = dw_layer(rng, bits=None)
    recorder, monitor = Recorder(layer), AIWQMonitor(layer)
    old = layer.weight.detach().clone()

    def spoil():
        change(layer, rng, 0.02)
        layer.weight.data[0] = math.nan

    two_steps(layer, monitor, rng, spoil)
    expected = np.minimum(recorder.kl(old)[1:], 1).mean()
    np.testing.assert_allclose(monitor.scores()[""], expected, **tolerances.KL_CONV)


def test_dead_channels(rng):
    layer = dw_layer(rng, bits=None, kind="unsigned", activation="relu", pad_value=0.0)
    layer.weight.data[:2] = 0.0
    recorder = Recorder(layer)
    monitors = {mode: AIWQMonitor(layer, mode) for mode in ("corrected", "original")}
    old = layer.weight.detach().clone()
    for _ in range(2):
        layer(torch.randn(6, 8, 9, 9, generator=rng))
        for monitor in monitors.values():
            monitor.step()
        layer.weight.data[2:] *= 1.05
    with np.errstate(invalid="ignore"):
        live = recorder.kl(old)[2:]
    np.testing.assert_allclose(monitors["original"].scores()[""], live.mean(), **tolerances.KL_CONV)
    np.testing.assert_allclose(monitors["corrected"].scores()[""], live.sum() / 8, **tolerances.KL_CONV)
    layer.weight.data.zero_()  # no live channel: the published code's mean of nothing
    layer(torch.randn(6, 8, 9, 9, generator=rng))
    for monitor in monitors.values():
        monitor.step()
    assert math.isnan(monitors["original"].scores()[""])
    assert math.isfinite(monitors["corrected"].scores()[""])


def test_wrong_arguments(rng):
    net = tiny_net(rng)
    for arguments in ({"mode": "fast"}, {"every": 0}, {"every": True}, {"decay": 1.0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            AIWQMonitor(net, **arguments)
    with pytest.raises(ValueError, match="BatchNorm"):
        AIWQMonitor(nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(TrainingError, match="two iterations"):
        AIWQMonitor(net).scores()


@pytest.mark.parametrize("case", ["nan", "eval", "no_grad", "every", "loaded"])
def test_why_there_is_no_sample(rng, case):
    net = tiny_net(rng).train(case != "eval")
    monitor = AIWQMonitor(net, every=5 if case == "every" else 1)
    x = batch(rng)[0]
    for _ in range(3):
        with torch.set_grad_enabled(case not in ("no_grad", "loaded")):
            net(x * math.nan if case == "nan" else x)
        monitor.step()
    if case == "loaded":
        state = monitor.state_dict()
        monitor.remove()
        monitor = AIWQMonitor(net)
        monitor.load_state_dict(state)
    ran_not = "step.. was called 3 times, but no ranked layer ran in training mode with gradients"
    message = {"nan": "all 6 samples of a layer were NaN", "eval": ran_not, "no_grad": ran_not,
               "every": "two iterations .6 with every=5.", "loaded": "two iterations with"}[case]  # fmt: skip
    with pytest.raises(TrainingError, match=message) as caught:
        monitor.scores()
    assert "\n" not in str(caught.value)
