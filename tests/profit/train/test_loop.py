"""The inner loops: loss, learning rate, averages, and losses that are not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from profit.data import TensorLoader
from profit.errors import TrainingError
from profit.train import evaluate
from profit.train.ema import ModelEma
from profit.train.loop import Objective, train_epoch
from tests import tolerances


def _loader(rng: torch.Generator, count: int = 30, batch: int = 10, train: bool = True) -> TensorLoader:
    return TensorLoader(torch.randn(count, 1, 2, 2, generator=rng), torch.arange(count) % 3, batch, train=train)


def _model(rng: torch.Generator) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    return model


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def test_loss_is_the_sum_of_label_and_teacher_cross_entropy(rng) -> None:
    logits, taught = torch.randn(6, 3, generator=rng), torch.randn(6, 3, generator=rng)
    labels = torch.arange(6) % 3

    class Teacher(nn.Module):
        def forward(self, x):
            return taught

    logs = _log_softmax(logits.double().numpy())
    hard = -logs[np.arange(6), labels.numpy()].mean()
    soft = -(np.exp(_log_softmax(taught.double().numpy())) * logs).sum(1).mean()
    for weight in (0.0, 1.0, 0.5):
        loss = Objective(Teacher(), weight, 0.0)(torch.zeros(6), labels, logits)
        torch.testing.assert_close(loss.item(), hard + weight * soft, **tolerances.LOSS)
    extra = Objective(None, 1.0, 0.0, penalty=lambda: torch.tensor(0.25))(torch.zeros(6), labels, logits)
    torch.testing.assert_close(extra.item(), hard + 0.25, **tolerances.LOSS)
    smooth = 0.9 * hard - 0.1 * logs.mean()
    torch.testing.assert_close(Objective(None, 1.0, 0.1)(torch.zeros(6), labels, logits).item(), smooth, **tolerances.LOSS)


def test_learning_rate_follows_the_epoch_and_the_group(rng) -> None:
    model, loader = _model(rng), _loader(rng)
    groups = [{"params": [model[1].weight], "lr_mult": 1.0}, {"params": [model[1].bias], "lr_mult": 0.01}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append([group["lr"] for group in o.param_groups]))
    train_epoch(model, loader, Objective(None, 1, 0), optimizer, lr_at=lambda progress: 0.5 - 0.3 * progress)
    expected = [[rate, 0.01 * rate] for rate in (0.5, 0.4, 0.3)]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), **tolerances.LOSS)


def test_gradient_norm_is_clipped(rng) -> None:
    model, loader = _model(rng), _loader(rng)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "lr_mult": 1.0}], lr=0.0)
    norms = []

    def norm(o, args, kwargs):
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())))

    optimizer.register_step_pre_hook(norm)
    train_epoch(model, loader, Objective(None, 1, 0), optimizer, lr_at=lambda progress: 0.0, clip_grad=1e-3)
    assert len(norms) == 3 and all(value <= 1.001e-3 for value in norms)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [1, 3])
def test_a_loss_that_is_not_finite_names_the_step_and_spares_the_weights(rng, bad: float, step: int) -> None:
    model, loader = _model(rng), _loader(rng)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "lr_mult": 1.0}], lr=0.1)
    calls = []

    def objective(images, labels, logits):
        calls.append(1)
        return logits.sum() * 0 + (bad if len(calls) == step else 1.0)

    with pytest.raises(TrainingError, match=rf"became {bad} in phase x, epoch 2, step {step}"):
        train_epoch(model, loader, objective, optimizer, lr_at=lambda progress: 0.1, where="phase x, epoch 2")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_no_batch_is_an_error(rng) -> None:
    empty = TensorLoader(torch.empty(0, 1, 2, 2), torch.empty(0, dtype=torch.int64), 4, train=True)
    model = _model(rng)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "lr_mult": 1.0}], lr=0.1)
    with pytest.raises(TrainingError, match="gave no batch"):
        train_epoch(model, empty, Objective(None, 1, 0), optimizer, lr_at=lambda progress: 0.1)
    with pytest.raises(TrainingError, match="gave no image"):
        evaluate(model, TensorLoader(empty.images, empty.labels, 4))


def test_evaluation_counts_every_image_and_changes_nothing(rng) -> None:
    model, loader = _model(rng).train(), _loader(rng, count=23, batch=7, train=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loss, accuracy = evaluate(model, loader)
    logits = model.eval()(loader.images).detach().double().numpy()
    labels = loader.labels.numpy()
    torch.testing.assert_close(loss, -_log_softmax(logits)[np.arange(23), labels].mean(), **tolerances.LOSS)
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == labels).mean())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.train()
    evaluate(model, loader)
    assert model.training


def test_average_of_weights_against_its_formula(rng) -> None:
    model = _model(rng)
    model[1].bias.requires_grad_(False)
    ema = ModelEma(model, 0.8)
    expected = {key: value.double() for key, value in model.state_dict().items()}
    frozen = model[1].bias.clone()
    for _ in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=rng))
        model.train()(torch.randn(5, 1, 2, 2, generator=rng))
        ema.update()
        for key, value in model.state_dict().items():
            expected[key] = 0.8 * expected[key] + 0.2 * value.double() if value.is_floating_point() else value.double()
    for key, value in ema.module.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key], **tolerances.AVERAGE)
    assert torch.equal(ema.module[1].bias, frozen) and not ema.module.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_average_needs_a_decay_below_one(rng, decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        ModelEma(_model(rng), decay)
