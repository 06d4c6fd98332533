"""Codes in their true bit width: a stream of k-bit two's complement fields, least significant bit first.

Code i takes bits i*k .. i*k + k-1 of the stream, and bit b of the stream is bit b % 8 of byte b // 8. The last byte is
filled with zeros. For 8, 4 and 2 bits this is the layout of ONNX's INT8, INT4 and INT2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [packed_size] from int8 codes of any shape, in row-major order.

    Raises:
        ValueError: a code that `bits` bits do not hold.
    """
    flat = codes.reshape(-1).to(torch.int16)
    if flat.numel() and (flat.min() < -(2 ** (bits - 1)) or flat.max() > 2 ** (bits - 1) - 1):
        raise ValueError(f"codes {flat.min().item()} .. {flat.max().item()} do not fit into {bits} bits")
    stream = (flat[:, None] >> torch.arange(bits, dtype=torch.int16) & 1).reshape(-1)
    stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8)).reshape(-1, 8)
    return (stream << torch.arange(8, dtype=torch.int16)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """int8 codes of `shape` from :func:`pack`'s bytes.

    Raises:
        ValueError: another number of bytes than the shape needs.
    """
    count = int(torch.tensor(shape, dtype=torch.int64).prod())
    if packed.numel() != packed_size(count, bits):
        raise ValueError(f"{packed.numel()} bytes do not hold {count} codes of {bits} bits")
    stream = (packed.to(torch.int16)[:, None] >> torch.arange(8, dtype=torch.int16) & 1).reshape(-1)
    fields = stream[: count * bits].reshape(count, bits)
    unsigned = (fields << torch.arange(bits, dtype=torch.int16)).sum(1)
    signed = torch.where(unsigned >= 2 ** (bits - 1), unsigned - 2**bits, unsigned)
    return signed.to(torch.int8).reshape(shape)
