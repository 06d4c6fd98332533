"""Several processes: the group that torchrun starts, the wrapped model, and one line when a process is lost.

    torchrun --nproc-per-node=4 -m profit train recipes/imagenet_mobilenetv2_w4a4.yaml

The run folder must be on a file system that all processes see; only process 0 writes to it.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from profit.distributed import rank, world_size
from profit.errors import TrainingError


@contextmanager
def process_group(timeout_s: float) -> Iterator[None]:
    """The default group for the time of a run: made here under torchrun, used as it is where there is one already.

    Raises:
        TrainingError: another process ended or did not answer in time; no process waits longer than `timeout_s`.
    """
    own = dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized()
    try:
        if own:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        with warnings.catch_warnings():
            # of 1x1 convolutions, whose gradient has strides of no consequence; said once per process otherwise
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            yield
        if own:
            dist.barrier()
    except RuntimeError as error:
        if not _is_loss_of_a_process(error):
            raise
        raise TrainingError(
            f"process {rank()} of {world_size()} waited in vain for another one, which ended or did not answer for "
            f"{timeout_s:g} s (run.timeout_s); its own error says why; --resume carries on from the last finished epoch"
        ) from error
    finally:
        if own and dist.is_initialized():
            gc.collect()  # a wrapped model lies in cycles that hold the group, whose threads must end before the interpreter
            dist.destroy_process_group()


def _is_loss_of_a_process(error: RuntimeError) -> bool:
    """NCCL and the store raise errors of torch.distributed; gloo a plain one with its source file in the text."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo/" in str(error))


def distributed_model(model: nn.Module, device: torch.device, find_unused: bool) -> nn.Module:
    """`model` with its gradients averaged over the processes; itself in a single one.

    For the parameters that require a gradient now: wrap anew wherever that changes. Parameters and buffers start as those
    of process 0.
    """
    if world_size() == 1:
        return model
    return DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, find_unused_parameters=find_unused,
        broadcast_buffers=False, gradient_as_bucket_view=True,
    )  # fmt: skip
