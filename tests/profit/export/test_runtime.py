"""The integer runtime against the model in float64, against the formulas in numpy, and at the border."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import profit
from profit.errors import ExportError
from profit.export.compare import Comparison, compare_runtime, exact_copy, layers_by_run, model_codes
from profit.export.layers import quantized_layer
from profit.export.network import ActivationCodes, Layer
from profit.export.runtime import IntegerRuntime, quantize, run_layer
from profit.export.trace import trace_network
from profit_kernels.testing import BandReport
from tests.oracles import loop_depthwise, textbook_duq
from tests.profit.conversion_nets import Mobile
from tests.profit.tiny_net import conv
from tests.tolerances import EXPORT_CONV64, EXPORT_FLOAT32_LOGITS

from .nets import Edges, images, quantized, randomised


def compared(model, x, record_band, label):
    """The model in float64 and the runtime, every layer on the same codes; outputs of free runs."""
    network = trace_network(model, x)
    runtime, comparison = IntegerRuntime(network), Comparison("test", None)
    output, codes = model_codes(exact_copy(model), x.double())
    runtime(x, compare_runtime(comparison, codes, layers_by_run(network)))
    report = BandReport(*(comparison.total(n) for n in ("codes", "inside", "differing_inside", "differing_outside")))
    record_band(label, report)
    assert not comparison.failures() and report.total > 0
    if not report.differing_inside:
        torch.testing.assert_close(runtime(x), output, **EXPORT_CONV64)
    return network


VARIANTS = {
    "W4A4": {},
    "W3A3": {"weight_bits": 3, "act_bits": 3},
    "W2A2 per channel": {"weight_bits": 2, "act_bits": 2, "weight_granularity": "per_channel"},
    "W8A8": {"weight_bits": 8, "act_bits": 8},
    "mixed": {"overrides": {"dw": {"weight_bits": 8, "act_bits": 5}, "p*": {"weight_bits": 2}, "head": {"act_bits": 8},
                            "wide": {"act_bits": None}, "last": {"weight_bits": None}}},
    "zero padding": {"padding": "zero"},
    "a layer left out": {"overrides": {"wide": {"skip": True}, "head": {"skip": True}}},
    "activations where they were": {"fuse_activations": False},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_codes_equal_the_models(variant, rng, record_band):
    x = images(rng)
    model = quantized(randomised(Edges(), rng), x, **VARIANTS[variant])
    network = compared(model, x, record_band, "integer runtime")
    assert [run for run, _, _ in network.layer_runs()] == [n for n, _ in model.named_modules() if n in network.layers]
    # The model as it is, in float32: the same up to the rounding of its sums, or a code at an edge. At 4 bits none was seen.
    if variant == "W8A8":
        torch.testing.assert_close(IntegerRuntime(network, torch.float32)(x), model(x).detach(), **EXPORT_FLOAT32_LOGITS)


def test_functional_activations_and_control_flow(rng, record_band):
    x = torch.randn(4, 3, 9, 9, generator=rng)
    compared(quantized(randomised(Mobile(), rng), x), x, record_band, "integer runtime")


def test_sums_are_32_bit_integers(case, monkeypatch):
    model, x = case
    seen = []
    original = torch.nn.functional.conv2d

    def watched(operand, weight, *rest):
        seen.append((operand.dtype, weight.dtype, original(operand, weight, *rest).dtype))
        return original(operand, weight, *rest)

    network = trace_network(model, x)
    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    IntegerRuntime(network)(x)
    integers = [kinds for kinds in seen if kinds == (torch.int32,) * 3]
    assert len(seen) == 9 and len(integers) == 8, "all convolutions but the one that reads the image"


# ---- single layers, against oracles that know nothing of the package --------------------------------------------------


@pytest.mark.parametrize("geometry", [
    {"stride": 1, "padding": 1}, {"stride": 2, "padding": 2}, {"stride": 2, "padding": 1, "dilation": 2},
    {"stride": 2, "same_padding": True}, {"padding": 1, "pad_value": 0.0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("channels", [None, 6])
def test_the_border_pixel_by_pixel(geometry, channels, rng):
    """Negative padding: the convolution of the padded floats by its definition, against integers padded with zeros."""
    geometry = {"pad_value": -0.375, **geometry}
    layer = conv(rng, 6, 6, 3, groups=6, kind="offset", activation="hardswish", channels=channels, **geometry)
    with torch.no_grad():
        layer.input_quantizer.c.fill_(0.7)
        layer.weight_quantizer.c.mul_(1.2)
    x = torch.randn(2, 6, 9, 8, generator=rng).double() * 2
    pads = layer.padding4(x)
    quantizers = (layer.input_quantizer, layer.weight_quantizer)
    # What acts, and what the file holds, is the softplus rounded to float32; this test is about the border.
    (a, c), (aw, cw) = (tuple(_inverse(_positive(p)) for p in (q.a, q.c)) for q in quantizers)
    h = textbook_duq(x, a, c, 4, False, -0.375, "hardswish")
    w = textbook_duq(layer.weight.detach().double(), aw, cw, 4, True, 0.0, "none")
    expected = loop_depthwise(h.numpy(), w.detach().numpy(), layer.stride, pads, layer.dilation, layer.pad_value)
    expected += layer.bias.detach().double().view(-1, 1, 1).numpy()
    exported = quantized_layer("layer", layer, layer.stride, pads, layer.dilation)
    exported.check()
    y = run_layer(x, exported).numpy()
    interior = np.zeros(y.shape[2:], bool)
    interior[1:-1, 1:-1] = True
    for where, mask in (("border", ~interior), ("interior", interior)):
        np.testing.assert_allclose(y[:, :, mask], expected[:, :, mask], **EXPORT_CONV64, err_msg=where)
    assert np.abs(loop_depthwise(h.numpy(), w.detach().numpy(), layer.stride, pads, layer.dilation, -1.0)[:, :, ~interior]
                  - expected[:, :, ~interior]).max() > 0.01  # fmt: skip


def _positive(raw):
    return torch.nn.functional.softplus(raw.detach().double()).float().double()


def _inverse(value):
    return value + torch.log(-torch.expm1(-value))


def test_batch_norm_does_not_touch_codes(rng):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    x = images(rng)
    model = quantized(randomised(model, rng), x)
    before = trace_network(model, x).layers["2"]
    with torch.no_grad():
        model[3].weight.mul_(-3.0)
        model[3].running_var.mul_(0.01)
    after = trace_network(model, x).layers["2"]
    assert torch.equal(before.weight, after.weight) and after.batch_norm == "3"
    assert not torch.allclose(before.multiplier, after.multiplier)


def test_a_batch_norm_that_cannot_be_folded_stays(rng, record_band):
    """Its layer has a second reader, or is none."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn, self.first = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.a(self.first(x))
            return self.b(y + self.bn(y)).mean((2, 3))

    x = images(rng)
    network = compared(quantized(randomised(Twice(), rng), x), x, record_band, "integer runtime")
    assert [step.op for step in network.steps].count("affine") == 2


def test_a_shared_layer_runs_twice(rng, record_band):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.b(self.bn(self.b(self.a(x)))).mean((2, 3))

    x = images(rng)
    network = compared(quantized(randomised(Shared(), rng), x), x, record_band, "integer runtime")
    assert [run for run, _, _ in network.layer_runs()] == ["a", "b", "b#2"]


# ---- refusals ---------------------------------------------------------------------------------------------------------


def test_nan_infinity_and_other_sizes(case):
    model, x = case
    runtime = IntegerRuntime(trace_network(model, x))
    bad = x.clone()
    bad[1, 0, 5, 5] = torch.nan
    with pytest.raises(ExportError, match="layer 'dw': its input holds NaN, which has no integer code"):
        runtime(bad)
    with pytest.raises(ValueError, match=r"exported for images \[3, 12, 12\], got \[3, 16, 16\]"):
        runtime(torch.zeros(1, 3, 16, 16))
    assert runtime(x[:0]).shape == (0, 5) and runtime(x[:1]).shape == (1, 5)
    layer = trace_network(model, x).layers["dw"]
    of_zero = round(3 / 8 / layer.codes.interval * 15)  # 1 for most draws of images, which the interval follows
    assert quantize(torch.tensor([torch.inf, -torch.inf]), layer).tolist() == [15, of_zero], "h-swish of -inf is 0, above -3/8"


def test_a_sum_that_32_bits_do_not_hold_is_refused():
    weight = torch.full((1, 70_000), 127, dtype=torch.int8)
    codes = ActivationCodes(8, False, 0.0, 1.0, 1.0)
    ones = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ExportError, match="layer 'huge': its sums can reach 2266950000, more than a 32-bit accumulator"):
        Layer("huge", "linear", weight, 8, codes, "none", ones, ones).check()
    Layer("large", "linear", weight[:, :66_000], 8, codes, "none", ones, ones).check()


def test_dead_and_broken_batch_norms(rng):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    x = images(rng)
    model = quantized(randomised(model, rng), x)
    with torch.no_grad():
        model[2].weight[1] = 0.0
    runtime = IntegerRuntime(trace_network(model, x))
    torch.testing.assert_close(runtime(x)[:, 1], model[2].bias[1].double().expand(len(x), 12, 12).detach(), **EXPORT_CONV64)
    with torch.no_grad():
        model[2].running_var[0] = torch.nan
    with pytest.raises(ExportError, match="layer '1': its folded scale is not finite"):
        trace_network(model, x)


def test_hooks_and_monitors_stay_with_the_model(case):
    model, x = case
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    monitor = profit.AIWQMonitor(model)
    try:
        trace_network(model, x)
    finally:
        monitor.remove()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and not model.training
