"""Re-estimate the BatchNorm statistics of a quantized model on training data."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .batches import run_batch


def reestimate_bn_(model: nn.Module, loader: Iterable[Any], batches: int) -> int:
    """Replace running mean and variance of every BatchNorm by their plain average over up to `batches` batches.

    Every batch weighs the same (momentum None: cumulative average), the old statistics do not enter, and the average
    variance is that within batches. Only BatchNorm is in training mode meanwhile, so dropout stays off; no gradient is
    computed. Momentum, training modes and weights are left as they were; the statistics too, should a batch fail.

    Args:
        model: model with BatchNorm; batches are moved to the device of its first parameter.
        loader: yields tensors, tuples or lists that start with one, or mappings of keyword arguments.
        batches: how many batches to use; a shorter loader gives fewer.

    Returns:
        The number of batches used.

    Raises:
        ValueError: `batches` < 1, a loader without a batch, or a model without BatchNorm that tracks statistics.
        TypeError: a batch of another form.
    """
    if batches < 1:
        raise ValueError(f"batches must be at least 1, got {batches}")
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise ValueError("the model has no BatchNorm with running statistics: there is nothing to re-estimate")

    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    statistics = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    used = 0
    finished = False
    try:
        model.eval()
        for norm in norms:
            norm.training = True
            norm.momentum = None
            norm.reset_running_stats()
        with torch.no_grad():
            for batch in islice(loader, batches):
                run_batch(model, batch, device)
                used += 1
        if not used:
            raise ValueError("the loader gave no batch: BatchNorm statistics cannot be re-estimated")
        finished = True
    finally:
        for norm, momentum, saved in zip(norms, momenta, statistics, strict=True):
            norm.momentum = momentum
            if not finished:
                for name, value in saved.items():
                    getattr(norm, name).copy_(value)
        for module, mode in modes.items():
            module.training = mode
    return used
