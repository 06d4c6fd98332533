"""What a variant's step and layers must agree with before it gets a figure: the eager reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import profit
from profit.nn import weight_batch
from profit_kernels import use_backend

from ..harness import gates, peers
from ..harness.children import WrongResult
from .jobs import Job, backend_for, loss_of

# A network at 4 bits amplifies the last bit: a sum in another order flips a few codes in the next layer, these more codes
# behind them, until after some layers the rounding noise is another one. So whole steps are compared by what that noise
# averages out of (the loss, and the norm of all gradients), and every layer for itself, on one input, by its values.
LOSS, NORM = 0.05, 0.3
# A layer behind BatchNorm may be as touchy by itself: where a channel is nearly constant, or where many values are one and the
# same, as sums of few codes are, and that one lies at an edge. So a layer, and a step, may lie as far away as OWN times the
# reference moves when its input does by a rounding (gates.nudged), by the largest of NUDGES tries.
OWN, NUDGES = 4.0, 2


def summary(
    model: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, dtype: str
) -> tuple[float, float]:
    """(loss, L2 norm of all gradients) of one step."""
    loss, _ = loss_of(run, images, labels, dtype)
    loss.backward()
    norm = torch.stack([p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    model.zero_grad(set_to_none=True)
    return loss.item(), norm.item()


def check(job: Job, model: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> str:
    """Compare a variant with the eager reference (a peer: see peers.py); what was compared, in words. Raises WrongResult."""
    if job.variant in peers.PEERS:
        return peers.check(job.variant, model, lambda: loss_of(run, images, labels, job.dtype)[0])
    twin = copy.deepcopy(model)
    layers = profit.quant_layers(twin) if run is model else {}
    with use_backend("reference"):
        as_seen = images.to(torch.bfloat16) if job.dtype == "bf16" else images  # autocast rounds them in any case
        seen = [images, *(gates.nudged(as_seen).float() for _ in range(NUDGES))]
        expected, *moved = (summary(twin, twin, batch, labels, job.dtype) for batch in seen)
    check_layers(twin, layers, images, job)
    buffers = [b.clone() for b in model.buffers()]
    actual = summary(model, run, images, labels, job.dtype)
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    own = [max(abs(m[i] - expected[i]) for m in moved) / expected[i] for i in range(2)]
    apart = [abs(a - e) / e for a, e in zip(actual, expected, strict=True)]
    if not (apart[0] <= LOSS + OWN * own[0] and apart[1] <= NORM + OWN * own[1]):  # a NaN is wrong, too
        raise WrongResult(
            f"wrong result: loss {actual[0]:.4g} and gradients {actual[1]:.4g}, {expected[0]:.4g} and {expected[1]:.4g} in the "
            "eager reference"
        )
    by_layer = f", {len(layers)} layers compared" if layers else ""
    return f"loss {apart[0]:.1g} and gradient norm {apart[1]:.1g} from the eager reference{by_layer}"


def check_layers(model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor, job: Job) -> None:
    """Every quantized layer, forward and backward, on the input it has in the eager reference. Raises WrongResult.

    The reference computes in float64, as BatchNorm in float32 is up to 4e-4 off in torch; under autocast, as autocast does.
    `model` is a copy to be thrown away: from here on each of its layers quantizes its own weight.
    """
    weight_batch.detach(model)
    exact = copy.deepcopy(model).to(torch.float64 if job.dtype == "fp32" else torch.float32)

    def evaluate(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor | None]:
        norm = getattr(layer, "norm", None)
        leaves = dict(layer.named_parameters()) | ({} if norm is None else dict(norm.named_parameters(prefix="norm")))
        leaves = {name: p for name, p in leaves.items() if p.requires_grad}
        dtype = next(layer.parameters()).dtype
        x, grad = (t.detach().to(dtype if job.dtype == "fp32" else t.dtype) for t in (x, grad))
        with torch.enable_grad():
            y = layer.forward(x.requires_grad_())
            grads = torch.autograd.grad(y, [x, *leaves.values()], grad, allow_unused=True)
        return {"output": y.detach(), **dict(zip(("input", *leaves), grads, strict=True))}

    def compare(name: str, layer: nn.Module):
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x, grad = args[0], torch.randn_like(output)
            oracle = exact.get_submodule(name)
            want, *moved = (evaluate(oracle, other, grad) for other in (x, *(gates.nudged(x) for _ in range(NUDGES))))
            with backend_for(job.variant, job.device):
                got = evaluate(layer, x, grad)
            for key, expected in want.items():
                if expected is None:
                    continue
                what = f"the output of {name}" if key == "output" else f"the gradient of {name}, {key},"
                if key.endswith((".a", ".c")):
                    own = max(float((m[key] - expected).abs().max()) for m in moved)
                    gates.interval(what, got[key], expected.to(got[key].dtype), grad, OWN * own)
                else:
                    own = max(gates.distance_l2(m[key], expected) for m in moved)
                    allowed = gates.LAYER[got["output"].dtype] + OWN * own
                    gates.relative_l2(what, got[key], expected.to(got[key].dtype), allowed)

        return layer.register_forward_hook(hook)

    handles = [compare(name, layer) for name, layer in layers.items()]
    with torch.no_grad(), use_backend("reference"), gates.exact_convolutions():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=job.dtype == "bf16"):
            model(images)
    for handle in handles:
        handle.remove()
