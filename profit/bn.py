"""BatchNorm: statistics re-estimated on training data, and statistics of the whole batch in several processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .batches import run_batches
from .checks import check_module, check_whole
from .distributed import sum_over_ranks, world_size
from .errors import CalibrationError


def reestimate_bn_(model: nn.Module, loader: Iterable[Any], batches: int) -> int:
    """Replace running mean and variance of every BatchNorm by their plain average over up to `batches` batches.

    Every batch weighs the same (momentum None: cumulative average), the old statistics do not enter, and the average
    variance is that within batches. Only BatchNorm is in training mode meanwhile, so dropout stays off; no gradient is
    computed. Momentum, training modes and weights are left as they were; the statistics too, should a batch fail.

    In several processes (torch.distributed) each shows its own batches and the average is over all of them.

    Args:
        model: model with BatchNorm; batches are moved to the device of its first parameter.
        loader: yields tensors, tuples or lists that start with one, or mappings of keyword arguments.
        batches: how many batches to use; a shorter loader gives fewer.

    Returns:
        The number of batches used, in all processes.

    Raises:
        ValueError: `batches` is no whole number from 1, a loader without a batch, or a model without BatchNorm that tracks
            statistics. CalibrationError: statistics that are not finite, or a batch on which the model does not run.
        TypeError: no model, no loader, or a batch of another form.
    """
    check_module(model)
    batches = check_whole(batches, "batches", 1)
    named = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    norms = list(named.values())
    if not norms:
        raise ValueError("the model has no BatchNorm with running statistics: there is nothing to re-estimate")

    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    statistics = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    finished = False
    try:
        model.eval()
        for norm in norms:
            norm.training = True
            norm.momentum = None
            norm.reset_running_stats()
        with torch.no_grad():
            used = run_batches(model, loader, batches, device, "BatchNorm re-estimation")
        used = _average_over_ranks(norms, used)
        if not used:
            raise ValueError("the loader gave no batch: BatchNorm statistics cannot be re-estimated")
        _check_finite(named)
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


def _check_finite(norms: Mapping[str, nn.Module]) -> None:
    for name, norm in norms.items():
        if not bool(torch.isfinite(norm.running_mean).all() and torch.isfinite(norm.running_var).all()):
            raise CalibrationError(
                f"BatchNorm re-estimation: the input of {name or 'the BatchNorm'!r} holds NaN or infinity; the statistics are "
                "as before: look at the data and the weights in front"
            )


@torch.no_grad()
def _average_over_ranks(norms: list[nn.Module], used: int) -> int:
    """Average the statistics over the processes, each with the weight of its batches; the number of batches of all."""
    if world_size() == 1:
        return used
    statistics = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    own = torch.cat([torch.tensor([1.0], dtype=torch.float64), *(b.double().flatten().cpu() for b in statistics)]) * used
    total = sum_over_ranks(own)
    used = int(total[0])
    if used:
        means = (total[1:] / total[0]).split([buffer.numel() for buffer in statistics])
        for buffer, mean in zip(statistics, means, strict=True):
            buffer.copy_(mean.view_as(buffer))
    return used


def sync_batchnorm(model: nn.Module) -> nn.Module:
    """Let every BatchNorm take its statistics from the batches of all processes; returns the model.

    On a GPU these are torch's SyncBatchNorm modules (through timm, which knows its own fused BatchNorm). torch has none for
    the CPU: there BatchNorm keeps its module and gets the forward of :class:`SyncedOnCpu`. Names in the state_dict stay.
    """
    device = next(model.parameters()).device
    if device.type != "cpu":
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, SyncedOnCpu):
            cls = type(module)
            module.__class__ = type(f"Synced{cls.__name__}", (SyncedOnCpu, cls), {"__module__": __name__})
    return model


class SyncedOnCpu:
    """Mixin in front of a BatchNorm class: in training, mean and variance of the batches of all processes.

    The moments are float64, and gradients flow through them to every process, as in a single one with the whole batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = sum_over_ranks(torch.tensor(float(x.numel() // x.shape[1]), dtype=torch.float64))
        mean = sum_over_ranks(x.double().sum(dims)) / count
        variance = sum_over_ranks((x.double() - mean.view(shape)).square().sum(dims)) / count
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * count / (count - 1))
        y = ((x.double() - mean.view(shape)) * torch.rsqrt(variance.view(shape) + self.eps)).to(x.dtype)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        # timm's BatchNormAct2d drops out and activates as well
        return self.act(self.drop(y)) if hasattr(self, "act") else y

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        factor = 1.0 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), factor)
        self.running_var.lerp_(variance.to(self.running_var), factor)
