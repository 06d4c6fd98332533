"""ONNX: exact where it says so, typed as narrowly as the opset allows, integer kernels where promised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import profit
from profit.errors import ExportError
from profit.export.network import Network, Step
from profit.export.onnx_export import build_onnx
from profit.export.onnx_layers import bias_rounding, container, rounded_bias_steps
from profit.export.onnx_operators import TRANSLATIONS
from profit.export.onnx_runtime import executed, load_onnx, run, session, with_given_codes
from profit.export.operators import OPERATORS
from profit.export.runtime import IntegerRuntime
from profit.export.trace import trace_network
from profit_kernels.testing import BandReport
from tests.profit.conversion_nets import Between
from tests.tolerances import EXPORT_FLOAT32, ONNX_OPERATOR

from .against_runtime import compared
from .nets import Edges, images, quantized, randomised

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def traced(case):
    model, x = case
    return trace_network(model, x), x


@pytest.mark.parametrize("opset", [13, 17, 21, 25])
def test_exact(opset, traced, record_band):
    network, x = traced
    proto, float_layers = build_onnx(network, opset=opset)
    assert not float_layers and proto.opset_import[0].version == opset
    comparison = compared(network, x, proto)
    report = BandReport(*(comparison.total(n) for n in ("codes", "inside", "differing_inside", "differing_outside")))
    record_band("onnxruntime", report)
    running = session(proto)
    for images_ in (x, x[:1], x[:3]):
        output = run(running, images_)
        assert output.shape == (len(images_), 5)
    if comparison.total("differing") == 0:
        torch.testing.assert_close(run(running, x).double(), IntegerRuntime(network)(x), **EXPORT_FLOAT32)


def types(proto, ending):
    kinds = {v: k for k, v in onnx.TensorProto.DataType.items()}
    return {kinds[i.data_type] for i in proto.graph.initializer if i.name.endswith(ending)}


def test_types_are_as_narrow_as_the_opset_allows(rng):
    assert [container(bits, 25) for bits in (2, 3, 4, 5, 8)] == [2, 4, 4, 8, 8]
    assert [container(bits, 21) for bits in (2, 3, 4, 5, 8)] == [4, 4, 4, 8, 8]
    assert [container(bits, 20) for bits in (2, 4, 8)] == [8, 8, 8]
    x = images(rng)
    network = trace_network(quantized(randomised(Edges(), rng), x, 2, 2), x)
    sizes = {}
    for opset, kind in ((13, "INT8"), (21, "INT4"), (25, "INT2")):
        proto, _ = build_onnx(network, opset=opset)
        assert types(proto, "/weight/codes") == {kind} and types(proto, "/zero") == {kind, f"U{kind}"}
        compared(network, x, proto)
        sizes[opset] = sum(len(i.raw_data) for i in proto.graph.initializer if i.name.endswith("/weight/codes"))
    assert sizes[13] == sum(layer.weight.numel() for layer in network.layers.values())
    assert sizes[21] == pytest.approx(sizes[13] / 2, abs=20) and sizes[25] == pytest.approx(sizes[13] / 4, abs=20)


VARIANTS = {
    "zero padding": {"padding": "zero"},
    "per channel, 8 bits": {"weight_bits": 8, "act_bits": 8, "weight_granularity": "per_channel"},
    "mixed": {"overrides": {"dw": {"weight_bits": 3, "act_bits": 5}, "wide": {"act_bits": None}, "last": {"weight_bits": None},
                            "gate.*": {"skip": True}}},
    "kinds chosen by hand": {"overrides": {"wide": {"offset": -0.5}, "project": {"kind": "signed"}, "dw": {"kind": "signed"}}},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_models_exact_and_integer(variant, rng):
    x = images(rng)
    network = trace_network(quantized(randomised(Edges(), rng), x, **VARIANTS[variant]), x)
    compared(network, x, build_onnx(network)[0])
    compared(network, x, build_onnx(network, integer=True)[0], bias_rounding(network))


def test_integer_kernels(traced):
    """Every layer is either listed as float, with the reason, or runs as QLinearConv or MatMulIntegerToFloat."""
    network, x = traced
    proto, float_layers = build_onnx(network, integer=True)
    comparison = compared(network, x, proto, bias_rounding(network))
    assert comparison.total("differing") < 5e-2 * comparison.total("codes")
    kinds = executed(proto)
    assert kinds["QLinearConv"] + kinds["MatMulIntegerToFloat"] == len(network.layers) - len(float_layers)
    assert kinds["MatMulIntegerToFloat"] == 1 and kinds["QLinearConv"] >= 1 and kinds["ConvInteger"] == 0
    assert types(proto, "/zero") == {"UINT8"}, "codes are unsigned"
    for name, reader in (("expand", "wide"), ("wide", "project")):
        why = float_layers.pop(name, "")  # by chance: where the random BatchNorm behind it has a large factor
        steps = rounded_bias_steps(network.layers[name], network.layers[reader])
        assert why == (f"its rounded bias could move the next codes by {steps:.2f} steps" if steps > 0.05 else "")
    assert float_layers == {
        "stem": "its input is not quantized",
        "dw": "its sum goes into hardswish",
        "gate.reduce": "its sum goes into relu",
        "gate.expand": "its sum goes into hardsigmoid",
        "pw": "its sum goes into expand and add",
        "project": "its sum goes into add",
        "last": "its sum goes into hardswish",
    }
    assert types(proto, "/weight/codes") == {"INT8"}
    shapes = {}
    IntegerRuntime(network)(x, lambda name, value, own: shapes.setdefault(name, tuple(own.shape)) and own)
    given = with_given_codes(proto, shapes)
    assert executed(given)["QLinearConv"] >= kinds["QLinearConv"], "what is compared is what runs"


def test_relu6_below_the_interval_clips_the_codes(rng, monkeypatch):
    """An interval above 6 leaves codes that ReLU6 never reaches; as clips of codes the two must still agree."""
    monkeypatch.setattr("profit.export.onnx_layers.MAX_BIAS_STEPS", 0.4)  # whatever the random factors
    x = images(rng)
    model = quantized(randomised(Edges(), rng), x)
    model.wide.input_quantizer.set_range(9.0)
    with torch.no_grad():
        model.bn3.weight.fill_(4.0)
        model.bn3.running_var.clamp_(min=0.1)
    network = trace_network(model, x)
    largest = round(6 / 9 * 15)
    seen = {}
    IntegerRuntime(network)(x, lambda name, value, own: seen.setdefault(name, own))
    assert seen["wide"].max() == largest
    proto, float_layers = build_onnx(network, integer=True)
    assert "expand" not in float_layers
    compared(network, x, proto, bias_rounding(network))
    compared(network, x, build_onnx(network)[0])


def test_a_bias_beyond_32_bits_keeps_its_layer_float(rng):
    x = images(rng)
    model = quantized(randomised(Edges(), rng), x)
    with torch.no_grad():
        model.bn3.weight[2] = 1e-12
        model.bn3.bias[2] = 3.0
        model.bn3.weight[3] = 0.0
    network = trace_network(model, x)
    proto, float_layers = build_onnx(network, integer=True)
    assert float_layers["expand"] == "its bias does not fit into 32-bit integers of its scale"
    compared(network, x, proto, bias_rounding(network))
    compared(network, x, build_onnx(network)[0])


def test_nan_becomes_a_code(traced):
    """ONNX has no integer NaN: QuantizeLinear makes some code of it, so the output is a number (docs/export.md)."""
    network, x = traced
    bad = x.clone()
    bad[0, :, 4, 4] = torch.nan
    output = run(session(build_onnx(network)[0]), bad)
    assert output.isfinite().all() and torch.equal(output[1:], run(session(build_onnx(network)[0]), x)[1:])


def test_the_file_of_the_public_function(case, tmp_path):
    model, x = case
    path = tmp_path / "net.onnx"
    summary = profit.export_onnx(model, path, x)
    assert summary.size == path.stat().st_size and summary.opset == 21 and summary.layers == 10
    proto = load_onnx(path)
    assert {node.domain for node in proto.graph.node} == {""}, "standard operators only"
    assert [d.dim_param or d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == ["batch", 3, 12, 12]
    for opset in (12, 26, 0, -1):
        with pytest.raises(ExportError, match=f"ONNX opset {opset} is not supported: choose 13 to 25"):
            profit.export_onnx(model, path, x, opset=opset)
    path.write_bytes(path.read_bytes()[: summary.size // 2])
    with pytest.raises(ExportError, match="is not a readable ONNX file"):
        load_onnx(path)
    with pytest.raises(ExportError, match="there is no ONNX file"):
        load_onnx(tmp_path / "none.onnx")


# ---- the operators between layers: PyTorch's graph -> ours -> ONNX ----------------------------------------------------

FUNCTIONS = {
    "add": lambda y: y + 2 * y,
    "sub": lambda y: (1.5 - y) - y.mean(1, keepdim=True),
    "mul": lambda y: y * y.mean((2, 3), keepdim=True),
    "div": lambda y: y / 3,
    "relu": lambda y: F.relu(y, inplace=True),
    "clip": lambda y: F.relu6(y) + y.clamp(min=-1) + F.hardtanh(y, -0.5, 0.7),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": lambda y: F.gelu(y) + F.gelu(y, approximate="tanh"),
    "tanh": torch.tanh,
    "leaky_relu": lambda y: F.leaky_relu(y, 0.2),
    "softmax": lambda y: y.softmax(1),
    "affine": None,
    "mean": lambda y: y - y.mean(1, keepdim=True) + y.mean((2, 3))[:, :, None, None],
    "avg_pool": lambda y: F.avg_pool2d(y, 3, 2, 1, count_include_pad=False) + F.adaptive_avg_pool2d(y, 6) + F.avg_pool2d(y, 2),
    "max_pool": lambda y: F.max_pool2d(y, 3, 2, 1) + F.adaptive_max_pool2d(y, 1) + y.amax((2, 3), keepdim=True),
    "pad": lambda y: F.pad(y, (1, 0, 2, 3), value=-0.5),
    "reshape": lambda y: y.flatten(2).unflatten(2, (12, 12)),
    "permute": lambda y: y.permute(0, 2, 3, 1).relu().transpose(1, 3),
    "cat": lambda y: torch.cat([y[:, :2], -y[:, 2:]], 1),
    "slice": lambda y: torch.cat((y[:, ::2], y[:, 1:3]), 1),
}


def test_every_operator_has_a_translation_and_a_test():
    assert OPERATORS.keys() == TRANSLATIONS.keys() == FUNCTIONS.keys()


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "affine"])
def test_operators(name, rng):
    x = images(rng, 4)
    net = Between(lambda net, y: FUNCTIONS[name](y))
    model = quantized(randomised(net, rng), x, overrides={"b": {"act_bits": None}})
    network = trace_network(model, x)
    assert name in {step.op for step in network.steps}
    expected = model(x).detach()
    torch.testing.assert_close(IntegerRuntime(network, torch.float32)(x), expected, **ONNX_OPERATOR)
    for opset in (13, 25):
        torch.testing.assert_close(run(session(build_onnx(network, opset=opset)[0]), x), expected, **ONNX_OPERATOR)


def test_affine_and_linear_over_more_dimensions(rng):
    """A BatchNorm that stays, and a linear layer on [N, L, C] behind a permutation."""
    scale, shift = torch.rand(3, generator=rng).double(), torch.rand(3, generator=rng).double()
    step = Step("affine", ("input", "constant.s", "constant.t"), "v0", (-1, 3, 4, 4), {})
    network = Network((-1, 3, 4, 4), "v0", (step,), {}, {"constant.s": scale, "constant.t": shift})
    x = torch.randn(2, 3, 4, 4, generator=rng)
    expected = x * scale.float().view(1, 3, 1, 1) + shift.float().view(1, 3, 1, 1)
    torch.testing.assert_close(run(session(build_onnx(network)[0]), x), expected, **ONNX_OPERATOR)
    torch.testing.assert_close(IntegerRuntime(network, torch.float32)(x), expected, **ONNX_OPERATOR)

    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Linear(144, 5), nn.ReLU(), nn.Linear(5, 3))
    x = images(rng, 4)
    network = trace_network(quantized(randomised(net, rng), x), x)
    for integer in (False, True):
        compared(network, x, build_onnx(network, integer=integer)[0], bias_rounding(network))


def test_graph_without_onnxruntimes_optimizations_is_the_same(traced):
    """The file itself is exact; onnxruntime's rewriting does not come into it."""
    import onnxruntime

    network, x = traced
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = build_onnx(network)[0]
    plain = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    output = plain.run(None, {"input": x.numpy()})[0]
    assert np.mean(np.argmax(output, 1) == run(session(proto), x).argmax(1).numpy()) > 0.9
