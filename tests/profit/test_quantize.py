"""Conversion of whole models: the layer table, equality with the original, refusals that leave no trace."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from profit import DuQConfig, calibrate_, layer_table, quant_layers, quantize_, unfuse_
from tests import tolerances
from tests.profit.conversion_nets import Mobile, trained

# (raw, unsigned, offset, signed), offset with k > 1, ranked. The two first rows and the 52 ranked layers of MobileNetV2 are
# published counts; the others follow from the architectures (blocks, squeeze-and-excite, activations).
TIMM = {
    "mobilenetv3_small_050": ((1, 15, 27, 11), 9, 34),
    "mobilenetv2_050": ((1, 35, 0, 17), 0, 52),
    "mobilenetv2_100": ((1, 35, 0, 17), 0, 52),
    "mobilenetv1_100": ((1, 27, 0, 0), 0, 27),
    "mobilenetv3_small_100": ((1, 15, 27, 11), 9, 34),
    "mobilenetv3_large_100": ((1, 22, 26, 15), 10, 46),
    "tf_mobilenetv3_small_100": ((1, 15, 27, 11), 9, 34),
    "tf_mobilenetv3_large_100": ((1, 22, 26, 15), 10, 46),
    "mnasnet_small": ((1, 51, 0, 15), 0, 46),
    "mnasnet_100": ((1, 35, 0, 17), 0, 52),
    "semnasnet_100": ((1, 49, 0, 16), 0, 49),  # MNasNet-A1
}
FULL = DuQConfig(weight_bits=None, act_bits=None, padding="zero")


def assert_same_function(model, original, x, training):
    """Both in train mode (batch statistics) or both in eval mode.

    In float64 as converted: a BatchNorm inside its consumer is evaluated in another order, and a deep random network
    amplifies float32's roundings. In float32 with every BatchNorm given its work back.
    """
    unfused = copy.deepcopy(model)
    unfuse_(unfused)
    for ours, dtype, tolerance in (
        (copy.deepcopy(model), torch.float64, tolerances.FUSED_TRAINING),
        (unfused, torch.float32, tolerances.FUSED_ACTIVATION),
    ):
        results = []
        for net in (ours, copy.deepcopy(original)):
            torch.manual_seed(0)
            with torch.no_grad():
                results.append(net.to(dtype).train(training)(x.to(dtype)))
        torch.testing.assert_close(*results, **tolerance)


@pytest.mark.parametrize("name", TIMM)
def test_timm_models(name, rng):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False)
    x = torch.randn(2, 3, 64, 64, generator=rng)
    trained(model, x)
    original = copy.deepcopy(model)
    table = quantize_(model, FULL, (x[:1],))
    counts = table.counts()
    kinds, offset_kxk, ranked = TIMM[name]
    assert tuple(counts[kind] for kind in ("raw", "unsigned", "offset", "signed")) == kinds
    assert (counts["offset_kxk"], counts["ranked"], counts["negative_padded"]) == (offset_kxk, ranked, 0)
    assert table[0].kind == "raw" and table[-1].type == "linear"
    assert all(row.offset == (-0.375 if row.kind == "offset" else 0) for row in table)
    assert counts["fused"] > 20
    assert_same_function(model, original, x, training=False)
    assert_same_function(model, original, x, training=True)

    negative = copy.deepcopy(original)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = quantize_(negative, DuQConfig(None, None), (x[:1],))
    expected = {row.name for row in rows if row.kind == "offset" and row.kernel[0] > 1}
    assert {row.name for row in rows if row.pad_value == -0.375} == expected and len(expected) == offset_kxk
    assert len([w for w in caught if "pad with" in str(w.message)]) == (1 if offset_kxk else 0)


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5"])
def test_torchvision_models(name, rng):
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.get_model(name, weights=None)
    x = torch.randn(2, 3, 64, 64, generator=rng)
    original = copy.deepcopy(trained(model, x))
    counts = quantize_(model, FULL, x[:1]).counts()
    if name == "mobilenet_v2":
        assert counts["ranked"] == 52 and counts["signed"] == 17 and counts["unsigned"] == 35
    assert_same_function(model, original, x, training=False)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "tf_mobilenetv3_small_100", "mobilenetv2_050"])
def test_every_layer_is_close_to_itself_at_8_bits(name, rng):
    timm = pytest.importorskip("timm")
    x = torch.randn(4, 3, 64, 64, generator=rng)
    model = trained(timm.create_model(name, pretrained=False), x)
    quantize_(model, FULL, x[:1])
    calibrate_(model, [x], batches=1, percentile="max")
    inputs = {}
    layers = quant_layers(model)
    hooks = [m.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0]})) for m in layers.values()]
    with torch.no_grad():
        model(x)
        for handle in hooks:
            handle.remove()
        for layer in layers.values():
            full = layer(inputs[layer])
            layer.set_weight_bits(8)
            layer.set_act_bits(8)
            assert float((layer(inputs[layer]) - full).norm() / full.norm()) < tolerances.EIGHT_BIT_LAYER


@pytest.mark.parametrize("fuse", [True, False])
def test_a_net_of_every_kind(fuse, rng):
    x = torch.randn(4, 3, 16, 16, generator=rng)
    model = trained(Mobile(), x)
    original = copy.deepcopy(model)
    names, parameters = list(model.state_dict()), {id(p) for p in model.parameters()}
    table = quantize_(model, DuQConfig(None, None, padding="zero", fuse_activations=fuse), x[:1])
    assert [row.name for row in table] == list(Mobile.KINDS)  # in the order in which they run
    fused = {"dw": "hardswish", "grouped": "relu6"} if fuse else {}
    assert {row.name: (row.kind, row.activation) for row in table} == {
        name: (kind, fused.get(name, "none")) for name, (kind, _) in Mobile.KINDS.items()
    }
    assert isinstance(model.act0, nn.Identity) is fuse and isinstance(model.act4, nn.ReLU)
    assert set(names) <= set(model.state_dict()) and parameters <= {id(p) for p in model.parameters()}
    assert not model.training
    assert_same_function(model, original, x, training=False)
    assert_same_function(model, original, x, training=True)


def test_original_input_kinds(rng):
    timm = pytest.importorskip("timm")
    model = timm.create_model("mobilenetv3_small_050", pretrained=False)
    table = quantize_(model, DuQConfig(input_kinds="original"), torch.randn(1, 3, 32, 32, generator=rng))
    assert {row.kind for row in table if ".se." in row.name} == {"signed"}
    assert table.counts()["signed"] == 11 + 18 and table.counts()["offset_kxk"] == 9


def test_negative_padding_is_what_it_says(rng):
    x = torch.randn(2, 3, 16, 16, generator=rng)
    model = Mobile().eval()
    original = copy.deepcopy(model)
    quantize_(model, DuQConfig(None, None), x)
    assert {row.name: row.pad_value for row in layer_table(model) if row.pad_value} == {"dw": -0.375}
    h = F.pad(original.act0(original.bn0(original.stem(x))), (1, 1, 1, 1), value=-0.375)
    seen = []
    model.dw.register_forward_hook(lambda module, args, y: seen.append(y))
    model(x)
    expected = F.conv2d(h, original.dw.weight, stride=2, groups=8)
    torch.testing.assert_close(seen[0], expected, **tolerances.CONV)


def test_padding_warning_only_for_trained_models(rng):
    x = torch.randn(2, 3, 8, 8, generator=rng)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(Mobile(), DuQConfig(), x)
        quantize_(trained(Mobile(), x), DuQConfig(padding="zero"), x)
        with pytest.raises(UserWarning, match="1 convolutions.*'dw'.*-0.375.*padding='zero'"):
            quantize_(trained(Mobile(), x), DuQConfig(), x)


def test_trains_and_copies(rng):
    x = torch.randn(4, 3, 16, 16, generator=rng)
    model = trained(Mobile(), x).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # before conversion: the parameters stay the same objects
    quantize_(model, DuQConfig(4, 4, padding="zero"), x)
    calibrate_(model, [x])
    before = model.dw.weight.detach().clone()
    loss = F.cross_entropy(model(x), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    optimizer.step()
    assert not torch.equal(model.dw.weight, before)
    missing = [n for n, p in model.named_parameters() if p.grad is None and p.requires_grad]
    assert missing == []
    model.eval()
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y) and torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    fresh = Mobile()
    quantize_(fresh, DuQConfig(4, 4, padding="zero"), x)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), y)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_break(training, rng):
    x = torch.randn(4, 3, 16, 16, generator=rng)
    model = Mobile()
    quantize_(model, DuQConfig(4, 4), x)
    calibrate_(model, [x])
    model.pw.freeze_weight(intervals=True)
    model.dw.freeze_weight(intervals=True)
    model.train(training)
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours, expected = compiled(x), eager(x)
    assert torch.equal(ours, expected)
    if training:
        ours.square().sum().backward()
        expected.square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, **tolerances.CONV)


@pytest.mark.parametrize("case", ["bfloat16", "autocast", "channels_last", "float64"])
def test_precisions_and_layouts(case, rng):
    x = torch.randn(4, 3, 16, 16, generator=rng)
    model = Mobile().eval()
    quantize_(model, DuQConfig(8, 8), x)
    calibrate_(model, [x])
    y = model(x)
    if case == "bfloat16":
        assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    elif case == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
        half.sum().backward()
        assert half.dtype == torch.bfloat16 and model.dw.input_quantizer.a.grad.dtype == torch.float32
    elif case == "channels_last":
        other = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(other, y, **tolerances.FUSED_ACTIVATION)
    else:
        assert model.double()(x.double()).dtype == torch.float64
