"""Codes in their true bit width, against Python's integers and ONNX's own packing."""

from __future__ import annotations

import pytest
import torch

from profit.export.bits import pack, packed_size, unpack


def codes(rng, bits, *shape):
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=rng).to(torch.int8)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_a_stream_of_fields_as_python_sees_it(bits, count, rng):
    values = codes(rng, bits, count)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == packed_size(count, bits) == -(-count * bits // 8)
    stream = int.from_bytes(bytes(packed.tolist()), "little")
    assert stream >> (count * bits) == 0, "the last byte is filled with zeros"
    for i, value in enumerate(values.tolist()):
        assert stream >> (i * bits) & (2**bits - 1) == value % 2**bits
    assert torch.equal(unpack(packed, bits, (count,)), values)


def test_shapes_and_memory_order_do_not_matter(rng):
    values = codes(rng, 3, 4, 5, 3, 3)
    assert torch.equal(unpack(pack(values.to(memory_format=torch.channels_last), 3), 3, (4, 5, 3, 3)), values)


@pytest.mark.parametrize(("bits", "kind"), [(4, "INT4"), (2, "INT2"), (8, "INT8")])
def test_the_layout_is_that_of_onnx(bits, kind, rng):
    onnx = pytest.importorskip("onnx")
    values = codes(rng, bits, 3, 7)
    data = pack(values, bits).numpy().tobytes()
    tensor = onnx.helper.make_tensor("w", getattr(onnx.TensorProto, kind), [3, 7], data, raw=True)
    assert onnx.numpy_helper.to_array(tensor).astype(int).tolist() == values.tolist()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="codes -5 .. 3 do not fit into 3 bits"):
        pack(torch.tensor([-5, 3]), 3)
    with pytest.raises(ValueError, match="3 bytes do not hold 9 codes of 2 bits|2 bytes"):
        unpack(torch.zeros(2, dtype=torch.uint8), 2, (9,))
