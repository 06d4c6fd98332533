"""Every backend against vectors recorded from the authors' published code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import profit_kernels as pk
from profit_kernels import dispatch
from profit_kernels.testing import assert_close_banded, clipping_band
from tests import golden, tolerances

SETTINGS = {
    "relu": {"activation": "relu"},
    "signed": {"signed": True},
    "hardswish": {"activation": "hardswish", "offset": -0.375},
    "offset": {"offset": -0.375},
}


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request):
    reason = dispatch.why_not("duq", request.param, "cpu", torch.float32)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with pk.use_backend(request.param, ops=["duq"]):
        yield request.param


@pytest.mark.parametrize("case", golden.cases(*SETTINGS), ids=golden.name)
def test_activation_quantizers(backend, record_band, case):
    case, t = case
    settings = SETTINGS[case["kind"]]
    leaves = [t[name].clone().requires_grad_() for name in ("x", "a", "c")]
    y = pk.duq_fake_quantize(*leaves, bits=case["bits"], **settings)
    report = assert_close_banded(y, t["y"], *(leaf.detach() for leaf in leaves), bits=case["bits"], **settings)
    record_band(f"golden, {backend}", report)
    gx, ga, gc = torch.autograd.grad(y, leaves, t["gy"])
    kept = ~clipping_band(t["x"], t["a"], **settings)
    torch.testing.assert_close(gx[kept], t["gx"][kept], **tolerances.GRAD_ELEMENT)
    torch.testing.assert_close(ga, t["ga"], **tolerances.GOLDEN_GRAD)
    torch.testing.assert_close(gc, t["gc"], **tolerances.GOLDEN_GRAD)


@pytest.mark.parametrize("case", golden.cases("conv", "conv_pad", "linear"), ids=golden.name)
def test_weight_quantizers_inside_layers(backend, case):
    case, t = case
    bits = case["bits"]
    x, w, a, c = (t[name].clone().requires_grad_() for name in ("x", "w", "a", "c"))
    bias = t["bias"].clone().requires_grad_() if "bias" in t else None
    leaves = {"x": x, "w": w, "a": a, "c": c} | ({"bias": bias} if bias is not None else {})
    if case["kind"] == "linear":
        y = F.linear(x, pk.duq_fake_quantize(w, a, c, bits=bits, signed=True), bias)
    elif case.get("groups", 1) == case["in_channels"] > 1:
        y = pk.duq_depthwise_conv2d(
            x, w, None, None, a, c, bias, stride=case.get("stride", 1), padding=case.get("padding", 0),
            act_bits=None, weight_bits=bits, offset=case.get("pad_value", 0.0),
        )  # fmt: skip
    else:
        y = F.conv2d(
            x,
            pk.duq_fake_quantize(w, a, c, bits=bits, signed=True),
            bias,
            case.get("stride", 1),
            case.get("padding", 0),
        )
    torch.testing.assert_close(y, t["y"], **tolerances.GOLDEN_CONV)
    grads = torch.autograd.grad(y, list(leaves.values()), t["gy"])
    for name, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(
            grad, t[f"g{name}"], **tolerances.GOLDEN_GRAD, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("case", golden.cases("aiwq"), ids=golden.name)
def test_aiwq(case):
    case, t = case
    kl = pk.aiwq_kl(t["y_new"], t["y_old"])
    torch.testing.assert_close(kl.double(), t["kl"], **tolerances.GOLDEN_KL)
    geometry = {key: case[key] for key in ("stride", "padding", "groups", "pad_value") if key in case}
    kl = pk.aiwq_conv2d(t["x"], t["y_new"], t["w_old"], **geometry)
    torch.testing.assert_close(kl.double().mean().view(1), t["aiwq"], **tolerances.GOLDEN_KL)
