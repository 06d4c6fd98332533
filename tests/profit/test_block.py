"""Nets whose convolutions apply the BatchNorm in front of them, against the same nets converted with fuse=False."""

from __future__ import annotations

import copy
import json
import pickle
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from profit import (
    AIWQMonitor,
    DuQConfig,
    ProgressiveFreezer,
    apply_quantization_state_,
    calibrate_,
    freeze_all,
    quant_layers,
    quantization_state,
    quantize_,
    reestimate_bn_,
    set_bits,
    unfuse_,
)
from profit.nn import BatchNormAct, DeferredBatchNorm
from profit.train.ema import ModelEma
from profit_kernels import dispatch, native
from tests import tolerances
from tests.profit.conversion_nets import Mobile, Whole

needs_library = pytest.mark.skipif(not native.available(), reason=native.why_missing() or "")


@contextmanager
def exact():
    """The registered operator with the reference in it: in float64 a fused net then equals an unfused one to rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "choose", lambda op, x, *limits: "registered" if op == "block" else "reference")
        yield


class Chain(nn.Module):
    """conv - BN - ReLU6 - depthwise - BN - h-swish - pointwise - BN - pointwise, and a head. Input [N, 3, H, W]."""

    def __init__(self, **norm) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, **norm)
        self.act1 = nn.ReLU6(inplace=True)
        self.dw = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(8, **norm)
        self.act2 = nn.Hardswish()
        self.pw = nn.Conv2d(8, 6, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(6, **norm)
        self.last = nn.Conv2d(6, 12, 1)
        self.bn4 = nn.BatchNorm2d(12, **norm)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.act1(self.bn1(self.stem(x)))
        x = self.act2(self.bn2(self.dw(x)))
        x = self.bn4(self.last(self.bn3(self.pw(x))))
        # Smooth: behind a BatchNorm without bias, codes that repeat put values exactly on its mean, which is the edge of ReLU.
        return self.head(F.softplus(x).mean((2, 3)))


CHAIN = {"dw": "bn1", "pw": "bn2", "last": "bn3"}


def blocks(model):
    """Convolution -> the BatchNorm it applies."""
    return {name: layer.norm_name for name, layer in quant_layers(model).items() if getattr(layer, "norm", None)}


def pair(make, x, config=None, **settings):
    """(fused, unfused): one net converted both ways, with one calibration."""
    torch.manual_seed(0)
    original = make().to(x.dtype)
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            # A channel that is the same everywhere would lie on the activation's kink, where the last bit decides.
            nn.init.uniform_(module.bias, -0.5, 0.5)
    config = {"weight_bits": 4, "act_bits": 4, "padding": "zero", **(config or {}), **settings}
    nets = []
    for fuse in (True, False):
        net = copy.deepcopy(original)
        quantize_(net, DuQConfig(**config, fuse=fuse), x[:2])
        nets.append(net)
    fused, unfused = nets
    if config["act_bits"] is not None:
        calibrate_(unfused, [x])
        fused.load_state_dict(unfused.state_dict())
    return fused.train(), unfused.train()


def data(rng, dtype=torch.float64, n=4):
    return torch.randn(n, 3, 16, 16, generator=rng, dtype=torch.float64).to(dtype)


def train(net, batches, steps=3, hook=lambda: None, lr=0.05):
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    for step in range(steps):
        loss = F.cross_entropy(net(batches[step]), torch.arange(len(batches[step])) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hook()
    return net


def assert_same_state(fused, unfused, tolerance):
    ours, theirs = fused.state_dict(), unfused.state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, **tolerance, msg=lambda m, key=key: f"{key}: {m}")


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


def test_what_is_not_fused(rng):
    x = data(rng, torch.float32)

    def found(run, **modules):
        model = Whole(run, **modules)
        quantize_(model, DuQConfig(None, None, padding="zero"), x)
        return blocks(model)

    norm = nn.BatchNorm2d(4)
    assert found(lambda m, x: m.b(m.bn(m.a(x))), bn=copy.deepcopy(norm)) == {"b": "bn"}
    assert found(lambda m, x: m.b(m.act(m.bn(m.a(x)))), bn=copy.deepcopy(norm), act=nn.ReLU()) == {"b": "bn"}
    # A functional activation stays where it is, and so does the BatchNorm in front of it.
    assert found(lambda m, x: m.b(F.relu(m.bn(m.a(x)))), bn=copy.deepcopy(norm)) == {}
    assert found(lambda m, x: m.b(m.act(m.bn(m.a(x)))), bn=copy.deepcopy(norm), act=nn.SiLU()) == {}

    def two_readers(m, x):
        y = m.bn(m.a(x))
        return m.b(y) + y

    assert found(two_readers, bn=copy.deepcopy(norm)) == {}

    def reads_the_input(m, x):
        y = m.a(x)
        return m.b(m.bn(y)) + y

    assert found(reads_the_input, bn=copy.deepcopy(norm)) == {}
    assert found(lambda m, x: m.b(m.bn(m.b(m.bn(m.a(x))))), bn=copy.deepcopy(norm)) == {}
    assert found(lambda m, x: m.c(m.bn(m.b(m.bn(m.a(x))))), bn=copy.deepcopy(norm), c=nn.Conv2d(4, 2, 1)) == {}
    hooked = copy.deepcopy(norm)
    hooked.register_forward_hook(lambda *_: None)
    assert found(lambda m, x: m.b(m.bn(m.a(x))), bn=hooked) == {}

    class Own(nn.BatchNorm2d):
        pass

    assert found(lambda m, x: m.b(m.bn(m.a(x))), bn=Own(4)) == {}
    reflected = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    assert found(lambda m, x: m.b(m.c(m.bn(m.a(x)))), bn=copy.deepcopy(norm), c=reflected) == {}

    model = Chain()
    quantize_(model, DuQConfig(4, 4, quantizer="lsq"), x)
    assert blocks(model) == {}
    with pytest.raises(TypeError, match="fuse must be True or False"):
        DuQConfig(fuse=1)


def test_keys_copies_and_checkpoints(rng):
    x = data(rng)
    fused, unfused = pair(Chain, x)
    assert list(fused.state_dict()) == list(unfused.state_dict())
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in unfused.named_parameters()]
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in unfused.named_modules()]
    with exact():
        train(fused, [x] * 3)
        fused.eval()
        y = fused(x)
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), ModelEma(fused, 0.9).module):
            assert torch.equal(other(x), y)
            assert other.dw.norm is other.bn1 and other.bn1 is not fused.bn1
            assert other.bn1.restore().weight is other.bn1.weight
        unfused.load_state_dict(fused.state_dict())
        torch.testing.assert_close(unfused.eval()(x), y, **tolerances.FUSED_TRAINING)
        fresh = Chain().double()
        apply_quantization_state_(fresh, json.loads(json.dumps(quantization_state(fused))))
        fresh.load_state_dict(fused.state_dict())
        assert blocks(fresh) == CHAIN and torch.equal(fresh.eval()(x), y)
        state = quantization_state(fused)
        for layer in state["layers"].values():
            del layer["norm"]  # as written before there were blocks
        older = Chain().double()
        apply_quantization_state_(older, state)
        assert blocks(older) == {}
        older.load_state_dict(fused.state_dict())
        torch.testing.assert_close(older.eval()(x), y, **tolerances.FUSED_TRAINING)
    half = copy.deepcopy(fused).to(torch.float32)
    assert half.dw.norm.weight.dtype == half.bn1.running_mean.dtype == torch.float32 and half.dw.norm is half.bn1


def test_unfuse(rng):
    x = data(rng)
    fused, unfused = pair(Chain, x)
    with exact():
        train(fused, [x] * 2, 2)
        fused.eval()
        y, state = fused(x), {k: v.clone() for k, v in fused.state_dict().items()}
        parameters = {id(p) for p in fused.parameters()}
        fused.bn2.momentum = 0.3
        assert unfuse_(fused) == 4 and unfuse_(fused) == 0 and blocks(fused) == {}
        assert type(fused.bn2) is nn.BatchNorm2d and fused.bn2.momentum == 0.3 and not fused.bn2.training
        assert parameters == {id(p) for p in fused.parameters()}
        assert list(state) == list(fused.state_dict())
        assert all(torch.equal(v, state[k]) for k, v in fused.state_dict().items())
        torch.testing.assert_close(fused(x), y, **tolerances.FUSED_TRAINING)
        seen = []
        fused.bn1.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
        fused(x)
    assert not torch.equal(*seen[0])


@pytest.mark.parametrize(
    "act, activation", [(nn.Hardswish, "hardswish"), (nn.ReLU6, "relu6"), (nn.ReLU, "relu"), (nn.SiLU, "")]
)
def test_batch_norm_with_an_activation_inside(act, activation, rng):
    """timm's, where two readers keep the activation out of the quantizers."""
    layers = pytest.importorskip("timm.layers")
    x = data(rng)

    def make():
        def run(m, x):
            y = m.bn(m.a(x))
            return m.b(y) + y

        return Whole(run, bn=layers.BatchNormAct2d(4, act_layer=act))

    fused, unfused = pair(make, x)
    assert isinstance(fused.bn, BatchNormAct) is bool(activation) and getattr(fused.bn, "activation", "") == activation
    for net in (fused, unfused):
        with exact():
            for _ in range(2):
                net(x).square().sum().backward()
    for ours, theirs in zip(fused.parameters(), unfused.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **tolerances.FUSED_TRAINING)
    assert_same_state(fused, unfused, tolerances.FUSED_TRAINING)
    fused.bn.act.register_forward_hook(lambda *_: None)
    assert unfuse_(fused) == bool(activation) and type(fused.bn) is layers.BatchNormAct2d
    hooked = make()
    hooked.bn.act.register_forward_hook(lambda *_: None)
    quantize_(hooked, DuQConfig(None, None), x.float())
    assert type(hooked.bn) is layers.BatchNormAct2d


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


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(training, rng):
    x = data(rng, torch.float32)
    fused, _ = pair(Chain, x)
    eager = copy.deepcopy(fused).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(fused.train(training), fullgraph=True, backend="aot_eager")
    ours, expected = compiled(x), eager(x)
    torch.testing.assert_close(ours, expected)
    if training:
        ours.square().sum().backward()
        expected.square().sum().backward()
        for (name, p), q in zip(fused.named_parameters(), eager.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, **tolerances.CONV)
        assert_same_state(fused, eager, tolerances.CONV)


def test_autocast(rng):
    x = data(rng, torch.float32)
    fused, _ = pair(Chain, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in fused.parameters() if p.grad is not None)
    assert all(p.grad is not None for name, p in fused.named_parameters() if p.requires_grad), "every parameter trains"
    assert fused.bn1.running_mean.dtype == torch.float32


def test_distributed_data_parallel(rng, tmp_path):
    x = data(rng)
    fused, unfused = pair(Chain, x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        with exact():
            train(nn.parallel.DistributedDataParallel(fused), [x] * 3)
            train(unfused, [x] * 3)
    finally:
        torch.distributed.destroy_process_group()
    assert_same_state(fused, unfused, tolerances.FUSED_TRAINING)


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


def kept_bytes(net, x):
    """Bytes that a forward keeps for the backward, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(x)
    return sum(nbytes for nbytes, _ in kept.values())


@needs_library
@pytest.mark.parametrize("name, share", [("mobilenetv2_050", 0.55), ("mobilenetv3_small_050", 1.0)])
def test_kept_bytes(name, share, rng):
    timm = pytest.importorskip("timm")
    x = torch.randn(4, 3, 96, 96, generator=rng).contiguous(memory_format=torch.channels_last)
    net = timm.create_model(name, num_classes=10).to(memory_format=torch.channels_last).train()
    full_precision = kept_bytes(net, x)
    weights = sum(4 * p.numel() for p in net.parameters() if p.dim() > 1)
    quantize_(net, DuQConfig(4, 4, padding="zero"), x)
    calibrate_(net, [x])
    # The quantized weights count, in a net this small for more than the activations save.
    assert kept_bytes(net.train(), x) - weights <= share * full_precision


def test_a_net_of_every_kind(rng):
    x = data(rng)
    fused, unfused = pair(Mobile, x)
    assert blocks(fused) == {"dw": "bn0", "grouped": "bn3"}
    batches = [data(rng) for _ in range(3)]
    with exact():
        train(fused, batches)
        train(unfused, batches)
    assert_same_state(fused, unfused, tolerances.FUSED_TRAINING)
