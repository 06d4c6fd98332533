"""What several processes of one training run agree on. In a single process everything here returns its argument.

Several processes means an initialised default group of torch.distributed, however it was started. All functions are
collective: every process must call them, in the same order.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from profit.errors import ProfitError


def world_size() -> int:
    """Number of processes; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 without a group."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, on the device it came from; differentiable."""
    return tensor if world_size() == 1 else _Sum.apply(tensor)


def gather(values: Tensor) -> Tensor:
    """The one-dimensional `values` of all processes, one after the other; they may differ in length."""
    if world_size() == 1:
        return values
    place = _device(values.device)
    length = torch.tensor([len(values)], device=place)
    lengths = [torch.zeros_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length)
    longest = int(max(lengths))
    parts = [values.new_zeros(longest, device=place) for _ in lengths]
    dist.all_gather(parts, torch.cat((values.to(place), parts[0][len(values) :])))
    return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)]).to(values.device)


def agree(value: Any) -> Any:
    """The value of process 0 (plain JSON values; tuples come back as lists), everywhere."""
    if world_size() == 1:
        return value
    place = _device(torch.device("cpu"))
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(place)
    length = torch.tensor([len(text)], device=place)
    dist.broadcast(length, 0)
    if rank():
        text = torch.empty(int(length), dtype=torch.uint8, device=place)
    dist.broadcast(text, 0)
    return json.loads(bytes(text.tolist()))


def from_first(call: Callable[[], Any]) -> Any:
    """What `call` returns in process 0 (plain JSON values), everywhere; a ProfitError raised there is raised everywhere."""
    found = failed = None
    if rank() == 0:
        try:
            found = call()
        except ProfitError as error:
            failed = error
    kind, message = agree([type(failed).__name__, str(failed)] if failed is not None else [None, None])
    if kind is not None:
        raise failed or getattr(sys.modules[ProfitError.__module__], kind, ProfitError)(message)
    return agree(found)


def wait_for_all() -> None:
    """Return once every process has come here."""
    sum_over_ranks(torch.zeros(1))


@torch.no_grad()
def average_buffers_(*models: nn.Module) -> None:
    """Replace the float buffers (BatchNorm statistics) by their mean over the processes."""
    if world_size() == 1:
        return
    buffers = [buffer for model in models for buffer in model.buffers() if buffer.is_floating_point()]
    if not buffers:
        return
    mean = sum_over_ranks(torch.cat([buffer.double().flatten() for buffer in buffers])) / world_size()
    for buffer, part in zip(buffers, mean.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


class _Sum(torch.autograd.Function):
    """All-reduce; the gradient of a sum over processes is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.to(_device(tensor.device), copy=True).contiguous()
        dist.all_reduce(total)
        return total.to(tensor.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


def _device(device: torch.device) -> torch.device:
    """Where the group can reduce a tensor that is on `device`: NCCL alone knows no CPU."""
    if device.type == "cpu" and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device
