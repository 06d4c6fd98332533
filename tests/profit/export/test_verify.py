"""The verifier finds what it is for, and passes what is right."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import profit
from profit.errors import ExportError
from profit.export.compare import Comparison, exact_copy, model_codes
from profit.export.network import ActivationCodes, Layer
from profit.export.onnx_runtime import load_onnx
from profit_kernels import duq_codes, use_backend
from tests.tolerances import EXPORT_CONV64

from .nets import Edges, images, quantized, randomised

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def files(case, tmp_path_factory):
    """(folder with net.safetensors, net.onnx, integer.onnx and net.pt2, model, images)"""
    model, x = case
    folder = tmp_path_factory.mktemp("verify")
    profit.export_packed(model, folder / "net.safetensors", x)
    profit.export_onnx(model, folder / "net.onnx", x)
    profit.export_onnx(model, folder / "integer.onnx", x, integer=True)
    profit.export_torch(model, folder / "net.pt2", x)
    return folder, model, x


@pytest.mark.parametrize("name", ["net.safetensors", "net.onnx", "integer.onnx"])
def test_what_is_right_passes(name, files):
    folder, model, x = files
    labels = torch.arange(len(x)) % 5
    result = profit.verify(folder / name, model.train(), [(x[:20], labels[:20]), (x[20:], labels[20:])])
    assert model.training and not model.eval().training, "the model's mode is put back"
    assert not result.failures() and result.images == len(x)
    proof = result.comparisons[0]
    assert list(proof.layers) == [n for n, _ in model.named_modules() if n in proof.layers] and len(proof.layers) == 9
    assert proof.total("differing_outside") == 0
    assert result.top1["integer runtime / model in float64"] == (len(x), len(x))
    assert result.outputs["integer runtime / model in float64"] < EXPORT_CONV64["atol"] * 10
    assert result.correct["model"] == int((model(x).argmax(1) == labels).sum())
    assert ("QLinearConv" in result.executed) == (name == "integer.onnx")
    json.dumps(result.to_dict())
    text = str(result)
    assert text.endswith("passed") and "wide" in text and "onnxruntime runs: " in text


def test_a_torch_program(files):
    folder, model, x = files
    with pytest.raises(ExportError, match="opening a .pt2 file can run code hidden in it; --trust"):
        profit.verify(folder / "net.pt2", model, [x])
    with use_backend("reference"):
        result = profit.verify(folder / "net.pt2", model, [x[:3], x[:1], x], trust=True)
    assert result.outputs == {"exported program / model": 0.0}
    assert result.top1 == {"exported program / model": (len(x) + 4,) * 2}
    program = torch.export.load(folder / "net.pt2")
    assert all(str(n.target).startswith("aten.") for n in program.graph.nodes if n.op == "call_function")
    (folder / "broken.pt2").write_bytes((folder / "net.pt2").read_bytes()[:1000])
    with pytest.raises(ExportError, match="is not a readable .pt2 file"):
        profit.verify(folder / "broken.pt2", model, [x], trust=True)


def test_another_models_weights_are_seen(files):
    folder, model, x = files
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.wide.weight.neg_()
        other.bn2.bias[0] += 1e-3
    result = profit.verify(folder / "net.safetensors", other, [x])
    assert result.weights[1] >= 10 and "differ from the model's" in result.failures()[0]
    assert any("layer 'project'" in failure and "of a step from a rounding edge" in failure for failure in result.failures())
    for name in ("net.onnx", "integer.onnx"):
        failures = profit.verify(folder / name, other, [x]).failures()
        assert any(f.startswith("onnxruntime / integer runtime: layer 'project'") for f in failures), failures
    assert str(result).splitlines()[-1].startswith("FAILED ")


def test_other_ranges_and_bits_are_seen(files):
    folder, model, x = files
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.wide.input_quantizer.a += 0.3
    result = profit.verify(folder / "net.safetensors", other, [x])
    assert any("layer 'wide'" in failure for failure in result.failures())
    profit.set_bits(other, act_bits=3)
    assert profit.verify(folder / "net.safetensors", other, [x]).failures()
    wider = randomised(Edges(), torch.Generator().manual_seed(0))
    wider.act3 = nn.Hardswish()
    with pytest.raises(ExportError, match="was not exported from this model: its steps are others"):
        profit.verify(folder / "net.safetensors", quantized(nn.Sequential(wider), x), [x])


def test_a_changed_onnx_file_is_seen(files, tmp_path):
    folder, model, x = files
    proto = load_onnx(folder / "net.onnx")
    scale = next(i for i in proto.graph.initializer if i.name == "wide/A")
    scale.CopyFrom(_scaled(scale, 1.05))
    (tmp_path / "bad.onnx").write_bytes(proto.SerializeToString())
    failures = profit.verify(tmp_path / "bad.onnx", model, [x]).failures()
    assert [f for f in failures if "'wide'" in f] and not [f for f in failures if "'expand'" in f]
    del proto.metadata_props[:]
    (tmp_path / "bad.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match="was not written by profit export"):
        profit.verify(tmp_path / "bad.onnx", model, [x])


def _scaled(tensor, factor):
    import onnx

    return onnx.numpy_helper.from_array((onnx.numpy_helper.to_array(tensor) * factor).astype("float32"), tensor.name)


@pytest.mark.parametrize("name", ["net.onnx", "integer.onnx"])
def test_what_follows_the_last_codes_is_seen_in_the_output(name, files, tmp_path):
    folder, model, x = files
    last = [n for n, _ in model.named_modules() if isinstance(_, nn.Linear)][-1]
    for factor in (1.5, float("nan")):
        proto = load_onnx(folder / name)
        for tensor in proto.graph.initializer:
            if tensor.name.startswith(last) and tensor.data_type == 1 and tensor.name.endswith("bias"):
                tensor.CopyFrom(_scaled(tensor, factor))
        (tmp_path / "bad.onnx").write_bytes(proto.SerializeToString())
        assert any("outputs differ on the same codes" in f for f in profit.verify(tmp_path / "bad.onnx", model, [x]).failures())


def _loop(proto):
    proto.graph.node[0].op_type = "Loop"


def _elsewhere(proto):
    proto.graph.initializer[0].external_data.add(key="location", value="/etc/passwd")


DAMAGES = {
    "an endless loop": (_loop, "was not written by profit export: its node .* is a ONNX 'Loop'"),
    "another file": (_elsewhere, "was not written by profit export: its tensor .* lies in another file"),
    "no opset": (lambda proto: proto.ClearField("opset_import"), "is not a readable ONNX file"),
    "huge": (lambda proto: proto.graph.initializer[0].dims.extend([10**6] * 3), "not a readable ONNX file|refuses the model"),
    "no input": (lambda proto: proto.graph.ClearField("input"), "its input and output are not"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_an_onnx_file_of_other_origin_is_one_line(name, files, tmp_path):
    folder, model, x = files
    damage, message = DAMAGES[name]
    proto = load_onnx(folder / "net.onnx")
    damage(proto)
    (tmp_path / "bad.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match=message) as caught:
        profit.verify(tmp_path / "bad.onnx", model, [x])
    assert "\n" not in str(caught.value)


def test_files_and_images_that_cannot_be_used(files, tmp_path):
    folder, model, x = files
    messages = {"net.bin": "only .safetensors", "none.onnx": "there is no ONNX", "none.safetensors": "no packed file"}
    for name, message in messages.items():
        with pytest.raises(ExportError, match=message):
            profit.verify(tmp_path / name, model, [x])
    with pytest.raises(ExportError, match="there are no images"):
        profit.verify(folder / "net.onnx", model, [])
    assert profit.verify(folder / "net.safetensors", model, [x], images=3).images == 3


def test_distances_and_bands_are_counted():
    """A 2-bit unsigned quantizer with A = 3: codes are the rounded values 0 to 3."""
    codes, one = ActivationCodes(2, False, 0.0, 3.0, 3.0), torch.ones(1)
    layer = Layer("x", "linear", torch.zeros(1, 1), None, codes, "none", one, one)
    edge = torch.tensor(1.5, dtype=torch.float32)
    near = torch.nextafter(edge, torch.tensor(2.0)).double()
    values = torch.tensor([0.2, 1.4, near, 2.6, 1.5], dtype=torch.float64)
    one = torch.tensor([0, 2, 2, 0, 2])
    other = torch.tensor([0, 1, 1, 3, 2])
    comparison = Comparison("test", None)
    comparison.add("x", layer, values, one, other)
    row = comparison.layers["x"]
    assert (row.codes, row.inside, row.differing_inside, row.differing_outside) == (5, 2, 1, 2)
    assert row.farthest == 0.5, "three codes apart is no rounding"
    assert comparison.failures() == [row]
    noisy = Comparison("test", 0.11)
    noisy.add("x", layer, values[:3], one[:3], other[:3])
    assert noisy.farthest == pytest.approx(0.1) and not noisy.failures()
    assert Comparison("test", 0.11, {"x": 0.05}, noisy.layers).failures()


def test_codes_are_those_of_the_models_own_quantizers(case):
    model, x = case
    seen = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
        for name, layer in profit.quant_layers(model).items()
    ]
    output, codes = model_codes(model, x)
    for handle in handles:
        handle.remove()
    assert torch.equal(output, model(x))
    layers = profit.quant_layers(model)
    deferred = {name for name, layer in layers.items() if getattr(layer, "norm", None) is not None}
    assert deferred, "BatchNorms that their reader applies are part of this"
    for name, own in codes.items():
        q = layers[name].input_quantizer
        read = layers[name].after_norm(seen[name]) if name in deferred else seen[name]
        expected = duq_codes(read, q.a, bits=q.bits, signed=q.signed, offset=q.offset, activation=q.activation)
        assert torch.equal(own, expected.to(torch.int32))


def test_the_exact_copy_has_the_models_codes_and_intervals(case):
    model, x = case
    exact = exact_copy(model)
    assert all(p.dtype == torch.float64 for p in exact.parameters())
    for name, layer in profit.quant_layers(exact).items():
        original = profit.quant_layers(model)[name]
        torch.testing.assert_close(layer.quantized_weight().float(), original.quantized_weight(), rtol=2e-7, atol=0)
        for one, two in zip(layer.input_quantizer.parameters(), original.input_quantizer.parameters(), strict=True):
            expected = nn.functional.softplus(two.detach().double()).float().double()
            torch.testing.assert_close(nn.functional.softplus(one.detach()), expected, **EXPORT_CONV64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv1_100", "mobilenetv2_100", "mobilenetv3_large_100", "tf_mobilenetv3_small_100"])
@pytest.mark.parametrize("bits", [4, 3])
def test_mobilenets(name, bits, rng, tmp_path):
    timm = pytest.importorskip("timm")
    x = images(rng, 8, 96)
    model = quantized(randomised(timm.create_model(name), rng), x, bits, bits)
    profit.export_packed(model, tmp_path / "net.safetensors", x)
    profit.export_onnx(model, tmp_path / "net.onnx", x, integer=True)
    for file in ("net.safetensors", "net.onnx"):
        result = profit.verify(tmp_path / file, model, [x[:2]])
        assert not result.failures() and result.comparisons[0].total("codes") > 5 * 10**5
    assert torch.equal(profit.load_packed_(timm.create_model(name), tmp_path / "net.safetensors")(x), model(x))
