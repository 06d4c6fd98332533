"""One epoch of training and one pass of testing: the two inner loops."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from profit.aiwq import AIWQMonitor
from profit.data import Loader
from profit.distributed import sum_over_ranks
from profit.errors import TrainingError
from profit.train.ema import ModelEma

# Reading a loss waits for a GPU; there, losses are read in groups and the first bad one is found by its place.
_GPU_LOSSES_PER_READ = 50


@dataclass(frozen=True)
class EpochStats:
    """Mean training loss, images per second and seconds of one epoch."""

    loss: float
    images_per_s: float
    wall_s: float


class Objective:
    """CE(label, student) + weight * CE(softmax(teacher), student) + penalty(), at temperature 1 (PROFIT, section 5)."""

    def __init__(
        self,
        teacher: nn.Module | None,
        weight: float,
        label_smoothing: float,
        penalty: Callable[[], Tensor] | None = None,
    ) -> None:
        self.teacher, self.weight, self.label_smoothing, self.penalty = teacher, weight, label_smoothing, penalty

    def __call__(self, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if self.penalty is not None:
            loss = loss + self.penalty()
        if self.teacher is None or self.weight == 0:
            return loss
        with torch.no_grad():
            target = self.teacher(images).softmax(1)
        return loss + self.weight * F.cross_entropy(logits, target)


def train_epoch(
    model: nn.Module,
    loader: Loader,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    lr_at: Callable[[float], float],
    ema: ModelEma | None = None,
    monitor: AIWQMonitor | None = None,
    clip_grad: float | None = None,
    accumulate: int = 1,
    amp: torch.dtype | None = None,
    on_step: Callable[[float, float, int], None] | None = None,
    where: str = "training",
) -> EpochStats:
    """Train one epoch.

    Args:
        model: in any mode; is put in training mode. May be wrapped by DistributedDataParallel.
        loader: gives the batches, already on the model's device.
        objective: loss of (images, labels, logits).
        optimizer: its groups carry `lr_mult`, the factor on the learning rate.
        lr_at: learning rate at a fraction of this epoch, 0..1.
        ema: updated after every step.
        monitor: its `step()` is called after every step.
        clip_grad: largest norm of the gradient.
        accumulate: batches of the loader per optimizer step; what is left over at the end is not used.
        amp: autocast forward pass and loss to this dtype.
        on_step: called with (loss, learning rate, images) whenever losses are read.
        where: phase and epoch, for the error.

    Returns:
        Of this process.

    Raises:
        TrainingError: a loss that is not finite, naming the step, or a loader without a batch.
    """
    model.train()
    batches, start, images_seen, total = len(loader) // accumulate * accumulate, time.perf_counter(), 0, 0.0
    pending: list[Tensor] = []
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    batch = pending_images = 0
    for batch, (images, labels) in enumerate(islice(loader, batches), start=1):
        first, last = batch % accumulate == 1 or accumulate == 1, batch % accumulate == 0
        with nullcontext() if last else _without_sync(model):
            with autocast(images.device, amp):
                loss = objective(images, labels, model(images))
            pending.append(loss.detach())
            pending_images += len(images)
            # before the step: a loss that is not finite must not reach the weights where that is free to know
            if loss.device.type == "cpu" or len(pending) == _GPU_LOSSES_PER_READ or batch == batches:
                total += _read(pending, batch, accumulate, where)
                if on_step is not None:
                    on_step(float(pending[-1]), lr_at((batch - 1) // accumulate * accumulate / batches), pending_images)
                images_seen += pending_images
                pending, pending_images = [], 0
            if first:
                optimizer.zero_grad(set_to_none=True)
            (loss / accumulate).backward()
        if not last:
            continue
        lr = lr_at((batch - accumulate) / batches)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        if clip_grad is not None:
            nn.utils.clip_grad_norm_(parameters, clip_grad)
        optimizer.step()
        if monitor is not None:
            monitor.step()
        if ema is not None:
            ema.update()
    if not batch:
        raise TrainingError(f"{where}: the training data gave no batch; is data.batch_size larger than the data set?")
    wall = time.perf_counter() - start
    return EpochStats(total / batch, images_seen / wall, wall)


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, amp: torch.dtype | None = None) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in percent over a loader, in eval mode; the model's mode is put back.

    In several processes, over the loaders of all of them.

    Raises:
        TrainingError: a loader without an image.
    """
    training = model.training
    model.eval()
    loss = correct = seen = torch.zeros((), dtype=torch.float64)
    for images, labels in loader:
        with autocast(images.device, amp):
            logits = model(images)
        loss = loss.to(logits.device) + F.cross_entropy(logits.float(), labels, reduction="sum").double()
        correct = correct.to(logits.device) + (logits.argmax(1) == labels).sum()
        seen = seen + len(labels)
    model.train(training)
    loss, correct, seen = sum_over_ranks(torch.stack((loss.cpu(), correct.cpu().double(), seen))).tolist()
    if not seen:
        raise TrainingError("the test data gave no image")
    return loss / seen, 100.0 * correct / seen


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype`; None does nothing."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def _without_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Gradients add up in this process only; the last backward pass of the step averages them over all."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def _read(losses: list[Tensor], last_batch: int, accumulate: int, where: str) -> float:
    """The sum of these losses, which end at batch `last_batch`."""
    values = torch.stack(losses).tolist() if len(losses) > 1 else [losses[0].item()]
    for index, value in enumerate(values):
        if not math.isfinite(value):
            step = (last_batch - len(values) + index) // accumulate + 1
            raise TrainingError(
                f"the loss became {value} in {where}, step {step}: try a lower learning rate or optim.clip_grad"
            )
    return sum(values)
