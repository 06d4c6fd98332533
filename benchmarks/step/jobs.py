"""The variants of a training step: what each is, its network, its images, its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import profit
from profit_kernels import dispatch, use_backend
from profit_kernels.dispatch import set_backend

from ..harness import nets, options, peers


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
