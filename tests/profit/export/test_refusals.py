"""What cannot be exported is refused in one line, by name."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import profit
from profit.errors import ExportError
from profit.export.trace import trace_network
from tests.profit.conversion_nets import Between, Mobile, Whole

from .nets import Edges, images, quantized, randomised


def between(rng, function, **modules):
    x = images(rng, 4)
    return quantized(randomised(Between(function, **modules), rng), x), x


OPERATORS = {
    "an unknown operator": (lambda net, y: torch.cumsum(y, 1), "the model: cumsum.default is not among the operators"),
    "over the batch": (lambda net, y: y - y.mean(0), "mean.dim cannot be exported over the images of the batch"),
    "a comparison": (lambda net, y: torch.where(y > 0, y, 0.5 * y), "gt.Scalar"),
    "images as channels": (lambda net, y: y.reshape(1, -1, 12, 12).relu().reshape(y.shape), "must stay dimension 0"),
    "images first and channels": (lambda net, y: y.reshape(-1, 1, 12, 12).relu().reshape(y.shape), "must stay dimension 0"),
    "data decides": (lambda net, y: y if y.sum() > 0 else -y, "torch.export cannot follow the model with a free number"),
    "uneven pooling": (lambda net, y: F.adaptive_avg_pool2d(y, 5), "its windows overlap"),
    "reflection": (lambda net, y: F.pad(y, (1, 1, 1, 1), mode="reflect"), "reflect"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name, rng):
    function, message = OPERATORS[name]
    model, x = between(rng, function)
    with pytest.raises(ExportError, match=message) as caught:
        trace_network(model, x)
    assert "\n" not in str(caught.value)


def test_the_module_is_named(rng):
    class Odd(nn.Module):
        def forward(self, y):
            return torch.cumsum(y, 1)

    model, x = between(rng, lambda net, y: net.odd(y), odd=Odd())
    with pytest.raises(ExportError, match="module 'odd': cumsum"):
        trace_network(model, x)


def test_models_that_are_not_quantized(case, rng):
    _, x = case
    with pytest.raises(ExportError, match="the model is not quantized: it has no quantized layer; convert it with quantize_"):
        trace_network(Mobile(), x)
    model = Edges()
    profit.quantize_(model, profit.DuQConfig(weight_bits=None, act_bits=None), example_inputs=(x[:1],))
    with pytest.raises(ExportError, match="the model is not quantized yet: every layer's weight is in full precision"):
        trace_network(model, x)
    profit.set_bits(model, weight_bits=4, act_bits=4)
    with pytest.raises(ExportError, match="the input of layer 'dw' has no range yet: run calibrate_"):
        trace_network(model, x)


@pytest.mark.parametrize(
    ("quantizer", "kind"), [("lsq", "LSQWeight"), ("pact", "PACTWeight"), ("qil", "QILWeight"), ("lsq+", "LSQPlusWeight")]
)
def test_the_baselines(quantizer, kind, rng):
    x = images(rng, 4)
    model = quantized(randomised(Edges(), rng), x, quantizer=quantizer)
    with pytest.raises(ExportError, match=f"layer '(stem|dw)': its quantizer is {kind}.*; only DuQ can be exported"):
        trace_network(model, x)


def test_layers(rng, case):
    x = images(rng, 4)
    model = quantized(randomised(Edges(), rng), x)
    model.wide.pad_value = -0.1
    with pytest.raises(ExportError, match="layer 'wide': it pads with -0.1, which is neither 0 nor the value of code 0"):
        trace_network(model, x)
    net = Between(lambda net, y: y)
    net.a = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    model = quantized(randomised(net, rng), x)
    with pytest.raises(ExportError, match="layer 'a': padding_mode='reflect' cannot be exported"):
        trace_network(model, x)
    model = quantized(randomised(Edges(), rng), x)
    with torch.no_grad():
        model.dw.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ExportError, match="layer 'dw': its quantized weight is not finite"):
        trace_network(model, x)
    with pytest.raises(ExportError, match="is torch.bfloat16: export a float32 model"):
        trace_network(quantized(randomised(Edges(), rng), x).bfloat16(), x)


def test_outputs_and_inputs(rng, case):
    x = images(rng, 4)
    model = quantized(randomised(Whole(lambda net, x: (net.b(net.a(x)), net.a(x))), rng), x)
    with pytest.raises(ExportError, match="the model returns 2 values"):
        trace_network(model, x)
    model, x = case
    for wrong in (None, x[0], "image", (x, x)):
        with pytest.raises(TypeError, match=r"example_inputs must be images \[N, C, H, W\]"):
            trace_network(model, wrong)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(package, case, tmp_path, monkeypatch):
    model, x = case
    monkeypatch.setitem(sys.modules, package, None)
    message = f"the package {package} is not installed: pip install 'profit-kernels.export.'"
    if package == "onnx":
        with pytest.raises(ExportError, match=message):
            profit.export_onnx(model, tmp_path / "net.onnx", x)
    profit.export_packed(model, tmp_path / "net.safetensors", x)
    result = profit.verify(tmp_path / "net.safetensors", model, [x])
    assert any(package in note and "profit-kernels[export]" in note for note in result.notes) and not result.failures()


@pytest.mark.parametrize("place, value", [("pw.weight", math.nan), ("head.bias", math.inf), ("bn1.running_mean", math.nan),
                                          ("bn1.running_var", math.nan), ("bn1.running_var", -1.0),
                                          ("dw.input_quantizer.a", math.nan)])  # fmt: skip
@pytest.mark.parametrize("write", [profit.export_torch, profit.export_packed, profit.export_onnx])
def test_numbers_that_are_not_finite(case, tmp_path, write, place, value):
    model, x = copy.deepcopy(case[0]), case[1]
    model.state_dict()[place].view(-1)[0] = value
    with pytest.raises(ExportError, match="layer '.*not finite") as caught:
        write(model, tmp_path / "net", x)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    if write is profit.export_torch:
        layer, _, leaf = place.rpartition(".")
        assert f"layer {layer!r}: its {leaf}" in str(caught.value)


@pytest.mark.parametrize("name", ["export_packed", "export_onnx", "export_torch"])
def test_arguments_in_another_order(case, tmp_path, name):
    (model, x), write, path = case, getattr(profit, name), tmp_path / "net"
    for arguments, message in (
        ((model, x, path), "path must be a str or Path, got a Tensor"), ((path, model, x), "model must be a torch.nn.Module"),
        ((model, None, x), "path must be a str or Path, got None"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f"^{message}.*usage: {name}.model, path, example_inputs.") as caught:
            write(*arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="example_inputs must be images"):
        write(model, path, str(path))
    with pytest.raises(TypeError, match="^exported must be a str or Path.*usage: verify"):
        profit.verify(model, path, [x])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", ["21", True, 21.0, None])
def test_opset_that_is_no_number(case, tmp_path, opset):
    with pytest.raises(TypeError, match="opset must be a whole number, 13 to 25; got"):
        profit.export_onnx(case[0], tmp_path / "net.onnx", case[1], opset=opset)


def test_a_folder_is_no_packed_file(tmp_path):
    with pytest.raises(ExportError, match="is a folder"):
        profit.read_packed(tmp_path)
    with pytest.raises(TypeError, match="path must be a str or Path, got 3"):
        profit.read_packed(3)
    with pytest.raises(TypeError, match="model must be"):
        profit.load_packed_(tmp_path, Mobile())
