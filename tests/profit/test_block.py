"""Nets whose convolutions apply the BatchNorm in front of them: which are fused, and what still works on them."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from profit import (
    DuQConfig,
    apply_quantization_state_,
    calibrate_,
    quantization_state,
    quantize_,
    unfuse_,
)
from profit.nn import BatchNormAct
from profit.train.ema import ModelEma
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
from tests.profit.conversion_nets import Mobile, Whole

needs_library = pytest.mark.skipif(not native.available(), reason=native.why_missing() or "")


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
