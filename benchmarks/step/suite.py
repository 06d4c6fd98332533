"""A whole training step (forward, loss, backward, SGD) of a W4A4 network against full precision and the reference.

Every variant lives in a process of its own, with the allocator tuned alike, and is compared with the eager reference (or eager
full precision) first: one whose step or layers differ gets no figure.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import profit
from profit.nn import weight_batch
from profit_kernels import dispatch, use_backend
from profit_kernels.dispatch import set_backend

from ..harness import gates, nets, options, peers
from ..harness.children import Prepared, Unavailable, WrongResult, measure
from ..harness.rows import Report
from ..harness.timing import Budget, Call, capture, why_no_compile

# A network at 4 bits amplifies the last bit: a sum in another order flips a few codes in the next layer, these more codes
# behind them, until after some layers the rounding noise is another one. So whole steps are compared by what that noise
# averages out of (the loss, and the norm of all gradients), and every layer for itself, on one input, by its values.
LOSS, NORM = 0.05, 0.3
# A layer behind BatchNorm may be as touchy by itself: where a channel is nearly constant, or where many values are one and the
# same, as sums of few codes are, and that one lies at an edge. So a layer, and a step, may lie as far away as OWN times the
# reference moves when its input does by a rounding (gates.nudged), by the largest of NUDGES tries.
OWN, NUDGES = 4.0, 2


@dataclass(frozen=True)
class Job:
    """What a process needs to know. `variant`: a name of VARIANTS or of a backend; `monitor`: AIWQ mode or None."""

    variant: str
    model: str
    batch: int
    px: int
    device: str
    dtype: str
    threads: int
    monitor: str | None = None


# variant -> (converted, backend, torch.compile, CUDA graph), in the order in which a short time is spent
VARIANTS = {
    "auto": (True, "auto", False, False),
    "reference-eager": (True, "reference", False, False),
    "reference-compile": (True, "reference", True, False),
    "float-eager": (False, "reference", False, False),
    "float-compile": (False, "reference", True, False),
    "auto-graph": (True, "auto", False, True),
    **{peer: (False, "reference", False, False) for peer in peers.PEERS},
    "auto-compile": (True, "auto", True, False),
    "auto-frozen": (True, "auto", False, False),  # the last stage of PROFIT but one: 2/3 of the convolutions
}


def variants(device: str) -> list[str]:
    """The variants of a step on such a device; a backend by name only where it is not what `auto` takes anyway."""
    names = [name for name in VARIANTS if device == "cuda" or not name.endswith("graph")]
    auto = dispatch.plan(device)
    for backend in dispatch.BACKENDS[1:]:
        serves = backend_plan(backend, device)
        if backend in serves.values() and serves != auto:
            names.insert(1, backend)
    return names


def backend_plan(backend: str, device: str) -> dict[str, str]:
    """Operator -> `backend` where it has a kernel for it, else the reference."""
    return {
        op: backend if dispatch.why_not(op, backend, device, torch.float32) is None else "reference"
        for op in dispatch.OPS
    }


@contextlib.contextmanager
def backend_for(variant: str, device: str):
    """The choice of backend of a variant; those named after a backend use it for every operator that it has."""
    name = VARIANTS[variant][1] if variant in VARIANTS else variant
    with use_backend("auto" if name == "auto" else "reference"):
        if variant not in VARIANTS:
            for op, backend in backend_plan(variant, device).items():
                set_backend(backend, [op])
        yield


def example(job: Job) -> tuple[Tensor, Tensor]:
    """Random images and labels, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(job.batch, 3, job.px, job.px, generator=generator)
    labels = torch.randint(1000, (job.batch,), generator=generator)
    return images.to(job.device, memory_format=torch.channels_last), labels.to(job.device)


def build(job: Job, images: Tensor) -> nn.Module:
    """The network of a variant, in training mode; the reference's without fusion, as the textbook writes it."""
    torch.manual_seed(0)
    converted, backend, *_ = VARIANTS.get(job.variant, (True, ""))
    if converted:
        model = nets.converted(job.model, images[:16])
        if backend == "reference":
            profit.unfuse_(model)
        return model
    model = nets.create(job.model).to(job.device, memory_format=torch.channels_last).train()
    return peers.network(job.variant, model) if job.variant in peers.PEERS else model


def loss_of(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """(loss, logits); bf16 means autocast."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        logits = model(images)
        return F.cross_entropy(logits.float(), labels), logits


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


def freeze_two_thirds(model: nn.Module, images: Tensor, labels: Tensor, dtype: str) -> int:
    """Freeze 2/3 of the ranked convolutions as a run does, by the AIWQ of a few steps; how many.

    With their intervals: these need the weight's gradient just as the weight does, so that "weights" alone saves nothing.
    """
    optimizer = torch.optim.SGD(profit.param_groups(model, lr=1e-3, weight_decay=0.0))
    with profit.AIWQMonitor(model) as monitor:
        for _ in range(4):
            optimizer.zero_grad(set_to_none=True)
            loss_of(model, images, labels, dtype)[0].backward()
            optimizer.step()
            monitor.step()
    model.zero_grad(set_to_none=True)
    return len(profit.ProgressiveFreezer(model, monitor.scores(), stages=3, freeze="weights+intervals").apply(2))


def prepare(job: Job) -> Prepared:
    """Build, check and warm one variant; runs in its process."""
    torch.set_num_threads(job.threads)
    _, _, compiled, graph = VARIANTS.get(job.variant, (True, "", False, False))
    reason = why_no_compile(job.device) if compiled else None
    if reason is not None:
        raise Unavailable(reason)
    images, labels = example(job)
    model = build(job, images)
    run: Any = torch.compile(model, dynamic=False) if compiled else model

    def context() -> contextlib.AbstractContextManager:
        return backend_for(job.variant, job.device)

    with context():
        note = f"{backends_used(job)}; {check(job, model, run, images, labels)}"
        if job.variant == "auto-frozen":
            note += f", {freeze_two_thirds(model, images, labels, job.dtype)} layers frozen"
        groups = profit.param_groups(model, lr=1e-4, weight_decay=4e-5)
        # fused, as the trainer has it: torch's other ways spend 5 ms in Python on 158 tensors, and more on more
        optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, fused=True)
        monitor = None if job.monitor is None else profit.AIWQMonitor(model, mode=job.monitor)

        def step(_: object = None) -> None:
            optimizer.zero_grad(set_to_none=True)
            loss_of(run, images, labels, job.dtype)[0].backward()
            optimizer.step()
            if monitor is not None:
                monitor.step()

        call = step
        if graph:
            captured = capture(step)
            call = lambda _: captured.replay()  # noqa: E731
        else:
            for _ in range(3):
                step()
    return Prepared(
        Call(call, context=context), job.device, lambda: loss_of(run, images, labels, job.dtype),
        (*model.parameters(), images), {"note": note},
    )  # fmt: skip


def backends_used(job: Job) -> str:
    """Which backends serve the operators of the step with the present choice, in words."""
    if job.variant in peers.PEERS:
        return "its own operators"
    served = sorted(set(dispatch.plan(job.device).values()))
    return ", ".join(served) if VARIANTS.get(job.variant, (True,))[0] else "full precision"


def case_name(model: str, given: Any, dtype: str) -> str:
    return f"{model} batch {given.batch}, {given.size} px, {dtype}"


def cases(given: Any, known: Sequence[str]) -> Iterator[tuple[str, dict[str, Job]]]:
    """(name, variant -> job) of every network and dtype that --filter leaves."""
    for model in given.model:
        for dtype in given.dtype:
            case = case_name(model, given, dtype)
            if given.filter in case:
                place = (model, given.batch, given.size, given.device, dtype, torch.get_num_threads())
                yield case, {name: Job(name, *place) for name in options.chosen(given, known)}


def run_case(
    report: Report, case: str, jobs: dict[str, Any], given: Any, budget: Budget, prepare_job: Any = prepare
) -> None:
    """Measure the variants of one case and add their rows."""
    outcomes = measure(
        prepare_job, jobs, rounds=given.rounds, turn_s=2.0 if given.device == "cpu" else 0.5, most=1 if given.toy else 10,
        at_once=1 if given.device == "cpu" else 3, say=lambda text: print(f"{case}  {text}", flush=True), budget=budget,
    )  # fmt: skip
    for variant, outcome in outcomes.items():
        note = outcome.note or outcome.facts["note"]
        report.add(
            case, variant, "step", outcome.spread, kept_bytes=outcome.kept_bytes, status=outcome.status, note=note
        )
    report.save()


def main(argv: Sequence[str]) -> int:
    """Command line of the suite; returns the exit status."""
    parser = options.parser("step", __doc__.splitlines()[0])
    options.add_model(parser)
    given = parser.parse_args(argv)
    wrong = options.resolve(given)
    known = variants(given.device)
    wrong = wrong or options.unknown_variants(given, known)
    if wrong is not None:
        return options.refuse(wrong)
    report = Report("step", given.device, options.settings(given), given.json)
    budget = Budget(given.budget)
    for case, jobs in cases(given, known):
        run_case(report, case, jobs, given, budget)
    if not report.rows:
        return options.refuse("nothing to measure: no case and variant is left by --filter and --variants")
    return report.finish()
