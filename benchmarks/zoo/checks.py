"""What a user does with a converted model, tried on one of the zoo.

A check gets a calibrated W4A4 model in eval mode, images, and the model's row; it returns "" or what went wrong.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from profit import param_groups, quant_layers, quantize_, set_bits
from profit.state import apply_quantization_state_, quantization_state

from .models import Row, build, config, logits, relative


def check_compile(model: nn.Module, x: Tensor, row: Row) -> str:
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    with torch.no_grad():
        same = torch.equal(compiled(x), model(x))
    return "" if same else "the compiled model gives other logits"


def check_training(model: nn.Module, x: Tensor, row: Row) -> str:
    """Two steps of SGD: losses and gradients finite, every parameter reached that is reached before conversion."""
    model = copy.deepcopy(model).train()
    labels = torch.arange(len(x))
    optimizer = torch.optim.SGD(param_groups(model, 1e-3, 4e-5), momentum=0.9, nesterov=True)
    for _ in range(2):
        loss = F.cross_entropy(logits(model(x)), labels)
        optimizer.zero_grad()
        loss.backward()
        if not torch.isfinite(loss):
            return f"the loss is {float(loss)}"
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
        if bad:
            return f"the gradient of {bad[0]} is not finite"
        missed = [n for n, layer in quant_layers(model).items() if layer.weight.grad is None]
        if missed:
            return f"no gradient reaches {missed[0]}"
        optimizer.step()
    return ""


def check_deepcopy(model: nn.Module, x: Tensor, row: Row) -> str:
    return _same(copy.deepcopy(model), model, x)


def check_pickle(model: nn.Module, x: Tensor, row: Row) -> str:
    return _same(pickle.loads(pickle.dumps(model)), model, x)


def check_state_dict(model: nn.Module, x: Tensor, row: Row) -> str:
    """Through a file of weights, into a fresh model converted alike and into one rebuilt from its quantization state."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    alike, rebuilt = build(row.model), build(row.model)
    quantize_(alike, config(4, row.remedy), x[:1])
    apply_quantization_state_(rebuilt, json.loads(json.dumps(quantization_state(model))))
    for other in (alike, rebuilt):
        other.load_state_dict(state)
        problem = _same(other.eval(), model, x)
        if problem:
            return problem
    return ""


def check_autocast(model: nn.Module, x: Tensor, row: Row) -> str:
    model = copy.deepcopy(model).train()
    with torch.autocast("cpu", torch.bfloat16):
        y = logits(model(x))
    F.cross_entropy(y.float(), torch.arange(len(x))).backward()
    if not bool(torch.isfinite(y).all()):
        return "logits are not finite"
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    return f"the gradient of {bad[0]} is not finite" if bad else ""


@torch.no_grad()
def check_channels_last(model: nn.Module, x: Tensor, row: Row) -> str:
    """In full precision, where the order of a sum cannot flip a code; and at 4 bits finite."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    other = x.contiguous(memory_format=torch.channels_last)
    if not bool(torch.isfinite(model(other)).all()):
        return "logits are not finite"
    set_bits(model, None, None)
    contiguous = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    error = relative(model(other), contiguous(x))
    return "" if error < 1e-3 else f"logits differ by {error:.1e}"


@torch.no_grad()
def check_modes(model: nn.Module, x: Tensor, row: Row) -> str:
    """Training and back: the flags of every module, and the same logits once statistics are put back."""
    model, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    before = model(x)
    model.train()
    if not all(m.training for m in model.modules()):
        return "train() leaves a module in eval mode"
    model(x)
    model.load_state_dict(state)
    model.eval()
    if any(m.training for m in model.modules()):
        return "eval() leaves a module in training mode"
    return "" if torch.equal(model(x), before) else "logits changed"


@torch.no_grad()
def check_average(model: nn.Module, x: Tensor, row: Row) -> str:
    """An average of weights in torch's own class, over the same weights, is the model."""
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(2):
        average.update_parameters(model)
    error = relative(average.eval()(x), model(x))
    return "" if error < 1e-3 else f"logits differ by {error:.1e}"


@torch.no_grad()
def _same(other: nn.Module, model: nn.Module, x: Tensor) -> str:
    return "" if torch.equal(other(x), model(x)) else "logits differ"


CHECKS: dict[str, Callable[[nn.Module, Tensor, Row], str]] = {
    "compile": check_compile, "train": check_training, "deepcopy": check_deepcopy, "pickle": check_pickle,
    "state_dict": check_state_dict, "bf16": check_autocast, "channels_last": check_channels_last, "modes": check_modes,
    "average": check_average,
}  # fmt: skip
