"""The packed file: back into a model and into the runtime bit for bit, its size, and every way in which it can be wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import profit
from profit.errors import ExportError
from profit.export.bits import packed_size
from profit.export.packed import METADATA_KEY, write_packed
from profit.export.trace import trace_network

from .nets import Edges, images, quantized, randomised


@pytest.fixture(scope="module")
def packed(case, tmp_path_factory):
    """(path, model, images)"""
    model, x = case
    path = tmp_path_factory.mktemp("packed") / "net.safetensors"
    profit.export_packed(model, path, x)
    return path, model, x


def test_the_runtime_from_the_file_is_the_runtime_from_the_model(packed):
    path, model, x = packed
    read, traced = profit.read_packed(path), trace_network(model, x)
    assert read.to_dict() == json.loads(json.dumps(traced.to_dict()))
    assert torch.equal(profit.IntegerRuntime(read)(x), profit.IntegerRuntime(traced)(x))


def test_a_model_gets_back_what_it_computes(packed):
    path, model, x = packed
    expected = model(x)
    fresh = profit.load_packed_(randomised(Edges(), torch.Generator().manual_seed(1)), path)
    assert torch.equal(fresh(x), expected)
    assert profit.layer_table(fresh) == profit.layer_table(model)
    for name, layer in profit.quant_layers(fresh).items():
        assert torch.equal(layer.quantized_weight(), profit.quant_layers(model)[name].quantized_weight())
    # into a model that is converted already, with other bit widths and ranges
    other = quantized(randomised(Edges(), torch.Generator().manual_seed(2)), x, 8, 8)
    assert torch.equal(profit.load_packed_(other, path)(x), expected)
    # and training goes on from there
    fresh.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in fresh.parameters() if p.requires_grad)


VARIANTS = {
    "per channel, mixed bits": {"weight_granularity": "per_channel", "overrides": {"p*": {"weight_bits": 2}, "last": {
        "weight_bits": 7}, "wide": {"weight_bits": 5, "act_bits": 3}}},
    "layers left out": {"overrides": {"wide": {"skip": True}, "last": {"weight_bits": None}, "head": {"act_bits": None}}},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_models_return_too(variant, rng, tmp_path):
    x = images(rng)
    model = quantized(randomised(Edges(), rng), x, **VARIANTS[variant])
    profit.export_packed(model, tmp_path / "net.safetensors", x)
    assert torch.equal(profit.load_packed_(Edges(), tmp_path / "net.safetensors")(x), model(x))
    read = profit.read_packed(tmp_path / "net.safetensors")
    assert torch.equal(profit.IntegerRuntime(read)(x), profit.IntegerRuntime(trace_network(model, x))(x))


def test_the_size_is_what_arithmetic_says(case, tmp_path):
    model, x = case
    path = tmp_path / "net.safetensors"
    network = trace_network(model, x)
    channels = sum(layer.weight.shape[0] for layer in network.layers.values())
    codes = [layer.weight.numel() for layer in network.layers.values()]
    sizes = {}
    try:
        for bits in (8, 5, 4, 3, 2):
            profit.set_bits(model, weight_bits=bits)
            size = profit.export_packed(model, path, x, restorable=bits != 3)
            assert size.total == path.stat().st_size
            assert size.codes == sum(packed_size(count, bits) for count in codes)
            assert size.folded == channels * 16 and size.float_weights == 0
            assert (size.restore > 0) == (bits != 3)
            sizes[bits] = size
    finally:
        profit.set_bits(model, weight_bits=4)
    assert sizes[8].codes == pytest.approx(4 * sizes[2].codes, abs=2 * len(codes))
    stored = load_file(path)
    assert stored["layer.dw.codes"].dtype == torch.uint8 and stored["layer.dw.multiplier"].dtype == torch.float64
    assert sum(t.numel() for name, t in stored.items() if name.endswith(".codes")) == sizes[2].codes


# ---- what can be wrong with a file ------------------------------------------------------------------------------------


def rewrite(path, target, change_tensors=None, change_head=None):
    """A well-formed .safetensors file with something else in it."""
    with safe_open(path, "pt") as file:
        head = json.loads(file.metadata()[METADATA_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if change_tensors:
        change_tensors(tensors)
    if change_head:
        change_head(head)
    save_file(tensors, target, {METADATA_KEY: json.dumps(head)})


def flip_a_bit(tensors):
    tensors["layer.dw.codes"][3] ^= 1


def another_shape(tensors):
    tensors["layer.dw.bias"] = tensors["layer.dw.bias"].reshape(2, -1)


def swap(tensors):
    tensors["layer.dw.bias"], tensors["layer.dw.multiplier"] = tensors["layer.dw.multiplier"], tensors["layer.dw.bias"]


DAMAGE = {
    "a bit flipped": ({"change_tensors": flip_a_bit}, "is damaged or was changed: its checksum does not match"),
    "another shape": ({"change_tensors": another_shape}, "its checksum does not match"),
    "swapped": ({"change_tensors": swap}, "its checksum does not match"),
    "a tensor gone": ({"change_tensors": lambda t: t.pop("layer.head.bias")}, "its checksum does not match"),
    "a tensor more": ({"change_tensors": lambda t: t.update(extra=torch.zeros(1))}, "its checksum does not match"),
    "another version": ({"change_head": lambda h: h.update(version=2)},
                        "is version 2 of the packed format, this program reads version 1: export it again"),
    "another format": ({"change_head": lambda h: h.update(format="else")}, "is not a packed network: profit export RUN"),
    "no checksum": ({"change_head": lambda h: h.pop("sha256")}, "its checksum does not match"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_changed_file_is_refused(damage, packed, tmp_path):
    changes, message = DAMAGE[damage]
    rewrite(packed[0], tmp_path / "bad.safetensors", **changes)
    for use in (profit.read_packed, lambda path: profit.load_packed_(Edges(), path)):
        with pytest.raises(ExportError, match=message) as caught:
            use(tmp_path / "bad.safetensors")
        assert "\n" not in str(caught.value)


def test_truncated_foreign_and_missing_files(packed, tmp_path):
    data = packed[0].read_bytes()
    path = tmp_path / "bad.safetensors"
    for end in (0, 5, 200, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(ExportError, match="is not a readable .safetensors file .truncated"):
            profit.read_packed(path)
    path.write_bytes(b"\x80\x04\x95pickle")
    with pytest.raises(ExportError, match="is not a readable .safetensors file"):
        profit.read_packed(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ExportError, match="is not a packed network"):
        profit.read_packed(path)
    with pytest.raises(ExportError, match="there is no packed file"):
        profit.read_packed(tmp_path / "none.safetensors")
    with pytest.raises(ExportError, match="is a folder"):
        profit.read_packed(tmp_path)


def test_a_failed_export_leaves_the_old_file(packed, tmp_path, rng):
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(ExportError):
        profit.export_packed(Edges(), path, packed[2])
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def test_loading_into_the_wrong_model(packed, tmp_path, rng):
    path, model, x = packed
    wider = Edges()
    wider.last = torch.nn.Conv2d(6, 12, 1)
    with pytest.raises(ExportError, match="'last.weight' is missing, or has another shape"):
        profit.load_packed_(wider, path)
    other = quantized(randomised(Edges(), rng), x, overrides={"wide": {"skip": True}})
    with pytest.raises(ExportError, match="has other quantized layers than the model"):
        profit.load_packed_(other, path)
    other = quantized(randomised(Edges(), rng), x, padding="zero")
    with pytest.raises(ExportError, match="layer 'dw' has pad_value -0.375, the model 0.0"):
        profit.load_packed_(other, path)
    write_packed(tmp_path / "lean.safetensors", trace_network(model, x))
    with pytest.raises(ExportError, match="exported without what a model needs .restorable=False."):
        profit.load_packed_(Edges(), tmp_path / "lean.safetensors")
