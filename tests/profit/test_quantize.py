"""Conversion of whole models: the layer table, equality with the original, refusals that leave no trace."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import profit
from profit import DuQConfig, calibrate_, layer_table, quant_layers, quantize_, set_bits
from profit.errors import CalibrationError, CheckpointError, ConversionError
from profit.nn import QuantConv2d
from tests import tolerances
from tests.profit.conversion_nets import Between, Mobile, Whole, trained

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
    """Both in train mode (batch statistics) or both in eval mode; they may change their BatchNorm statistics alike."""
    model.train(training), original.train(training)
    torch.manual_seed(0)
    with torch.no_grad():
        ours = model(x)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = original(x)
    torch.testing.assert_close(ours, expected, **tolerances.FUSED_ACTIVATION)


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


def test_every_layer_is_close_to_itself_at_8_bits(rng):
    timm = pytest.importorskip("timm")
    for name in ("mobilenetv3_small_050", "tf_mobilenetv3_small_100"):
        model = timm.create_model(name, pretrained=False)
        x = torch.randn(4, 3, 64, 64, generator=rng)
        trained(model, x)
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


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_set_bits_follows_own_widths(rng):
    x = torch.randn(2, 3, 16, 16, generator=rng)
    overrides = {"gate.*": {"weight_bits": 6}, "pw": {"act_bits": 8}, "stem": {"act_bits": 5}}
    model = Mobile()
    quantize_(model, DuQConfig(None, None, first_last_bits=8, overrides=overrides), x)
    assert {row.weight_bits for row in layer_table(model)} == {None}
    set_bits(model, weight_bits=4)
    weights = {row.name: row.weight_bits for row in layer_table(model)}
    assert weights == {"stem": 8, "dw": 4, "gate.reduce": 6, "gate.expand": 6, "pw": 4, "expand": 4, "grouped": 4, "head": 8}
    assert {row.act_bits for row in layer_table(model)} == {None}
    set_bits(model, act_bits=3)
    acts = {row.name: row.act_bits for row in layer_table(model)}
    assert acts.pop("stem") is None and acts.pop("pw") == 8 and set(acts.values()) == {3}
    set_bits(model, weight_bits=None, act_bits=None)
    assert {row.weight_bits for row in layer_table(model)} == {row.act_bits for row in layer_table(model)} == {None}


def test_edge_layers_start_from_their_own_width(rng):
    model = Mobile()
    quantize_(model, DuQConfig(4, None, first_last_bits=8), torch.randn(1, 3, 8, 8, generator=rng))
    peaks = {name: float(layer.weight.detach().abs().max()) for name, layer in quant_layers(model).items()}
    for name, factor in [("stem", 1.0), ("head", 1.0), ("pw", 0.9)]:
        interval = F.softplus(quant_layers(model)[name].weight_quantizer.a)
        torch.testing.assert_close(interval, torch.tensor([peaks[name] * factor]), **tolerances.SOFTPLUS)


def test_overrides_of_kind_and_padding(rng):
    overrides = {"dw": {"padding": "zero"}, "expand": {"kind": "offset", "offset": -1.5}, "head": {"kind": "raw"}}
    model = Mobile()
    rows = {row.name: row for row in quantize_(model, DuQConfig(overrides=overrides), torch.randn(1, 3, 8, 8, generator=rng))}
    assert rows["dw"].pad_value == 0 and rows["dw"].offset == -0.375
    assert (rows["expand"].kind, rows["expand"].offset, rows["expand"].pad_value) == ("offset", -1.5, 0)
    assert rows["head"].kind == "raw" and rows["head"].act_bits is None and rows["head"].weight_bits == 4


def test_skip_and_filter(rng):
    x = torch.randn(1, 3, 8, 8, generator=rng)
    config = DuQConfig(overrides={"gate.*": {"skip": True}})
    model = Mobile()
    table = quantize_(model, config, x, filter_fn=lambda module, name: not isinstance(module, nn.Linear))
    assert [row.name for row in table] == ["stem", "dw", "pw", "expand", "grouped"]
    assert type(model.head) is nn.Linear and type(model.gate.reduce) is nn.Conv2d


def test_shared_layer_is_one_layer_under_both_names(rng):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), conv, nn.ReLU(), conv)
    x = torch.randn(2, 3, 6, 6, generator=rng)
    expected = model(x)
    assert len(quantize_(model, FULL, x)) == 2
    assert model[2] is model[4] and isinstance(model[2], QuantConv2d)
    torch.testing.assert_close(model(x), expected, **tolerances.FUSED_ACTIVATION)
    decided = Whole(lambda net, x: net.b(net.b(F.relu(net.a(x)))))
    assert quantize_(decided, DuQConfig(overrides={"b": {"kind": "signed"}}), x)[1].kind == "signed"


def test_table_text_and_json(rng):
    model = Mobile()
    table = quantize_(model, DuQConfig(4, 3), torch.randn(1, 3, 16, 16, generator=rng))
    lines = str(table).splitlines()
    assert len(lines) == 9 and lines[0].split()[:2] == ["layer", "type"]
    assert "depthwise" in lines[2] and "-0.375" in lines[2] and "hardswish" in lines[2]
    row = json.loads(json.dumps(table[1].to_dict()))
    assert row["kernel"] == [3, 3] and row["stride"] == 2 and row["groups"] == 8 and row["macs"] == 8 * 8 * 8 * 9
    assert row["parameters"] == 72 and row["weight_bits"] == 4 and row["act_bits"] == 3
    assert layer_table(nn.Sequential()) == []


# ---- refusals --------------------------------------------------------------------------------------------------------


def dead(model):
    nn.init.zeros_(model.b.weight)
    return model


REFUSED = {
    "nothing to convert": (lambda: nn.Sequential(nn.ReLU()), {}, ConversionError, "no convolution or linear layer"),
    "a layer itself": (lambda: nn.Conv2d(3, 4, 1), {}, ConversionError, "nn.Sequential"),
    "Conv1d": (lambda: Between(lambda net, y: y, c=nn.Conv1d(1, 1, 1)), {}, ConversionError, "'c': Conv1d is not supported"),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 1)), {}, ConversionError, "'0': ConvTranspose2d is not"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 1)), {}, ConversionError, "'0' .LazyConv2d.: a lazy layer"),
    "weight norm": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))), {}, ConversionError,
                    "weight is computed"),
    "scripted": (lambda: nn.Sequential(torch.jit.script(nn.Conv2d(3, 4, 1))), {}, ConversionError, "^0 is scripted"),
    "compiled": (lambda: torch.compile(Mobile(), backend="eager"), {}, ConversionError, "is compiled"),
    "unknown name": (Mobile, {"overrides": {"dww": {"skip": True}}}, ConversionError, "no layer is called 'dww'.*'dw'"),
    "unseen": (lambda: Between(lambda net, y: y, c=nn.Linear(2, 2)), {}, ConversionError, "'c' .Linear. was not seen"),
    "dead weights": (lambda: dead(Between(lambda net, y: y)), {}, CalibrationError, "'b' are all zero"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_leave_the_model_unchanged(name, rng):
    build, settings, error, message = REFUSED[name]
    model = build()
    modules, hooks = list(model.modules()), [len(m._forward_pre_hooks) for m in model.modules()]
    state = {k: v for k, v in model.state_dict().items() if type(v) is torch.Tensor}
    with pytest.raises(error, match=message) as caught:
        quantize_(model, DuQConfig(**settings), torch.randn(1, 3, 8, 8, generator=rng))
    assert "\n" not in str(caught.value)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_converting_twice_and_using_nothing(rng):
    x = torch.randn(1, 3, 8, 8, generator=rng)
    model = Mobile()
    quantize_(model, DuQConfig(), x)
    with pytest.raises(ConversionError, match="converted already.*set_bits"):
        quantize_(model, DuQConfig(), x)
    for call in (lambda: set_bits(Mobile(), 4), lambda: calibrate_(Mobile(), [x]), lambda: profit.quantization_state(Mobile())):
        with pytest.raises(ConversionError, match="quantize_ first"):
            call()
    with pytest.raises(TypeError, match="needs example_inputs"):
        quantize_(Mobile(), DuQConfig())


@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_impossible_bits(bits, rng):
    for name in ("weight_bits", "act_bits", "first_last_bits"):
        with pytest.raises(ValueError, match=f"{name}={bits} is out of range: choose 2 to 8"):
            DuQConfig(**{name: bits})
    model = Mobile()
    quantize_(model, DuQConfig(4, 4), torch.randn(1, 3, 8, 8, generator=rng))
    with pytest.raises(ValueError, match="act_bits"):
        set_bits(model, 8, bits)
    assert {row.weight_bits for row in layer_table(model)} == {4}


def test_set_bits_is_all_or_nothing(rng):
    model = Between(lambda net, y: y)
    quantize_(model, DuQConfig(None, None), torch.randn(1, 3, 8, 8, generator=rng))
    nn.init.zeros_(model.b.weight)
    with pytest.raises(CalibrationError, match="'b'"):
        set_bits(model, 4)
    assert {row.weight_bits for row in layer_table(model)} == {None}


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": "reflect"}, {"quantizer": "dorefa"}, {"input_kinds": "auto"}, {"weight_granularity": "row"},
        {"overrides": {"a": {"bits": 4}}}, {"overrides": {"a": {"kind": "offset"}}}, {"overrides": {"a": {"offset": 0.5}}},
        {"overrides": {"a": {"kind": "signed", "offset": -0.5}}}, {"overrides": {"a": {"weight_bits": 1}}},
    ],
)  # fmt: skip
def test_impossible_settings(settings):
    with pytest.raises(ValueError) as caught:
        DuQConfig(**settings)
    assert "\n" not in str(caught.value)


def test_config_as_json():
    config = DuQConfig(3, None, overrides={"a*": {"kind": "offset", "offset": -0.2}})
    assert DuQConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown quantization setting 'bits'"):
        DuQConfig.from_dict({"bits": 4})


# ---- structure as JSON -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", ["duq", "lsq"])
def test_rebuilding_without_a_trace(quantizer, rng):
    x = torch.randn(4, 3, 16, 16, generator=rng)
    config = DuQConfig(4, 3, weight_granularity="per_channel", quantizer=quantizer, overrides={"pw": {"weight_bits": 8}})
    model = Mobile().eval()
    table = quantize_(model, config, x)
    calibrate_(model, [x])
    state = json.loads(json.dumps(profit.quantization_state(model)))
    fresh = Mobile().eval()
    rebuilt = profit.apply_quantization_state_(fresh, state)
    fresh.load_state_dict(model.state_dict())
    assert str(rebuilt) == str(table) and torch.equal(fresh(x), model(x))
    set_bits(fresh, 2)
    assert {row.name for row in layer_table(fresh) if row.weight_bits == 8} == {"pw"}
    assert profit.quantization_state(fresh)["layers"]["dw"]["fused_from"] == "act0"


def test_rebuilding_a_part_of_a_model(rng):
    x = torch.randn(4, 3, 16, 16, generator=rng)
    model = nn.Sequential(nn.Identity(), Mobile()).eval()
    quantize_(model[1], DuQConfig(4, 4), x)
    calibrate_(model, [x])
    fresh = nn.Sequential(nn.Identity(), Mobile()).eval()
    profit.apply_quantization_state_(fresh, profit.quantization_state(model))
    fresh.load_state_dict(model.state_dict())
    assert isinstance(fresh[1].act0, nn.Identity) and torch.equal(fresh(x), model(x))


def test_damaged_structure(rng):
    model = Mobile()
    quantize_(model, DuQConfig(4, 4), torch.randn(1, 3, 8, 8, generator=rng))
    state = profit.quantization_state(model)
    wrong = [
        ({**state, "format": 7}, "format"),
        ({**state, "layers": {"nowhere": state["layers"]["dw"]}}, "no module 'nowhere'"),
        ({**state, "layers": {"head": state["layers"]["dw"]}}, "'head' is a Linear"),
        ({**state, "layers": {"dw": {**state["layers"]["dw"], "kind": "odd"}}}, "'dw' is damaged"),
        ({**state, "layers": {"dw": {**state["layers"]["dw"], "weight_bits": 11}}}, "'dw' is damaged"),
        ({**state, "layers": {"dw": {**state["layers"]["dw"], "fused_from": "gone"}}}, "no module 'gone'"),
        ({**state, "layers": {"dw": {k: v for k, v in state["layers"]["dw"].items() if k != "kind"}}}, "'dw' is damaged"),
    ]
    for damaged, message in wrong:
        fresh = Mobile()
        with pytest.raises(CheckpointError, match=message):
            profit.apply_quantization_state_(fresh, damaged)
        assert not quant_layers(fresh)
    with pytest.raises(CheckpointError, match="converted already"):
        profit.apply_quantization_state_(model, state)
