"""One epoch of training and one pass of testing: the two inner loops."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from profit.aiwq import AIWQMonitor
from profit.data import Loader
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
    on_step: Callable[[float, float, int], None] | None = None,
    where: str = "training",
) -> EpochStats:
    """Train one epoch.

    Args:
        model: in any mode; is put in training mode.
        loader: gives the batches, already on the model's device.
        objective: loss of (images, labels, logits).
        optimizer: its groups carry `lr_mult`, the factor on the learning rate.
        lr_at: learning rate at a fraction of this epoch, 0..1.
        ema: updated after every step.
        monitor: its `step()` is called after every step.
        clip_grad: largest norm of the gradient.
        on_step: called with (loss, learning rate, images) whenever losses are read.
        where: phase and epoch, for the error.

    Raises:
        TrainingError: a loss that is not finite, naming the step, or a loader without a batch.
    """
    model.train()
    steps, start, images_seen, total = len(loader), time.perf_counter(), 0, 0.0
    pending: list[Tensor] = []
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    step = pending_images = 0
    for step, (images, labels) in enumerate(loader, start=1):
        lr = lr_at((step - 1) / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        loss = objective(images, labels, model(images))
        pending.append(loss.detach())
        pending_images += len(images)
        # before the step: a loss that is not finite must not reach the weights where that is free to know
        if loss.device.type == "cpu" or len(pending) == _GPU_LOSSES_PER_READ or step == steps:
            total += _read(pending, step, where)
            if on_step is not None:
                on_step(float(pending[-1]), lr, pending_images)
            images_seen += pending_images
            pending, pending_images = [], 0
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip_grad is not None:
            nn.utils.clip_grad_norm_(parameters, clip_grad)
        optimizer.step()
        if monitor is not None:
            monitor.step()
        if ema is not None:
            ema.update()
    if not step:
        raise TrainingError(f"{where}: the training data gave no batch; is data.batch_size larger than the data set?")
    wall = time.perf_counter() - start
    return EpochStats(total / step, images_seen / wall, wall)


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in percent over a loader, in eval mode; the model's mode is put back.

    Raises:
        TrainingError: a loader without an image.
    """
    training = model.training
    model.eval()
    loss = correct = seen = 0
    for images, labels in loader:
        logits = model(images)
        loss = loss + F.cross_entropy(logits.float(), labels, reduction="sum").double()
        correct = correct + (logits.argmax(1) == labels).sum()
        seen += len(labels)
    model.train(training)
    if not seen:
        raise TrainingError("the test data gave no image")
    return float(loss) / seen, 100.0 * float(correct) / seen


def _read(losses: list[Tensor], last_step: int, where: str) -> float:
    """The sum of these losses, which end at step `last_step`."""
    values = torch.stack(losses).tolist() if len(losses) > 1 else [losses[0].item()]
    for index, value in enumerate(values):
        if not math.isfinite(value):
            step = last_step - len(values) + 1 + index
            raise TrainingError(f"the loss became {value} in {where}, step {step}: try a lower learning rate")
    return sum(values)
