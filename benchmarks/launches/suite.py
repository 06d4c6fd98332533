"""Kernel launches of one training step, counted without a GPU: the eager reference against the Triton kernels.

Counted is what torch dispatches: each operator that computes is one launch, views and allocations none. Where the operator is
known to be several kernels on a GPU it counts as so many (SEVERAL). A Triton kernel counts when it is launched; it is
not executed, so this runs on any machine, and the numbers a step computes mean nothing. What cuDNN or a tensor library
launches inside one operator is not seen: the true counts are at least these.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import profit
from profit.files import write_atomic

from ..harness import options
from ..harness.rows import Report

# Allocation and questions about a tensor: no kernel.
NO_LAUNCH = {
    "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize_", "set_", "detach",
    "alias", "as_strided_", "_unsafe_view", "_reshape_alias", "lift_fresh", "is_same_size", "is_nonzero", "item",
    "_local_scalar_dense", "is_non_overlapping_and_dense",
}  # fmt: skip
PHASES = ("forward", "backward", "optimizer")


def _several(name: str, arguments: tuple[Any, ...]) -> int:
    """Kernels of an operator that is more than one: a border is filled and the inside copied; one gradient each."""
    if name == "constant_pad_nd":
        return 2
    if name == "convolution_backward":
        return sum(arguments[-1])
    return 1


@dataclass
class Counts:
    """Launches by phase of the step: operators of torch by name, Triton kernels by name."""

    phase: str = ""
    torch: dict[str, Counter] = field(default_factory=lambda: {phase: Counter() for phase in PHASES})
    triton: dict[str, Counter] = field(default_factory=lambda: {phase: Counter() for phase in PHASES})

    def totals(self) -> dict[str, int]:
        """Phase -> launches."""
        return {phase: self.torch[phase].total() + self.triton[phase].total() for phase in PHASES}


class _Counting(TorchDispatchMode):
    """Counts operators; looks inside the operators of this project, whose launchers call torch as well."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace.startswith("profit_"):
            with self:  # the kernel itself, with this mode still watching what it calls
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        name = func._schema.name.partition("::")[2]
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if func.namespace == "aten" and not view and name not in NO_LAUNCH and self.counts.phase:
            self.counts.torch[self.counts.phase][name] += _several(name, args)
        return func(*args, **kwargs)


@contextlib.contextmanager
def counted_triton(counts: Counts) -> Iterator[None]:
    """Every launch of a Triton kernel counts, and does not happen."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        while hasattr(kernel, "fn") and not hasattr(kernel, "__name__"):  # the function below the autotuner
            kernel = kernel.fn
        if counts.phase and not kwargs.get("warmup"):
            counts.triton[counts.phase][kernel.__name__] += 1

    with contextlib.ExitStack() as stack:
        for cls in (Autotuner, InterpretedFunction, JITFunction):
            stack.enter_context(mock.patch.object(cls, "run", run))
        yield


def count(variant: str, model_name: str, batch: int, px: int) -> Counts:
    """Launches of one step (the third, so that the optimizer has its state) of a W4A4 network.

    Args:
        variant: "reference-eager", "triton" or "float-eager", as in the suite step.
    """
    from ..step.jobs import Job, backend_for, build, example, loss_of

    job = Job(variant, model_name, batch, px, "cpu", "fp32", torch.get_num_threads())
    images, labels = example(job)
    model = build(job, images)
    # foreach, as torch chooses it on a GPU.
    optimizer = torch.optim.SGD(profit.param_groups(model, lr=1e-4, weight_decay=4e-5), momentum=0.9, foreach=True)
    counts = Counts()
    triton = counted_triton(counts) if variant == "triton" else contextlib.nullcontext()
    with backend_for(variant, "cpu"), triton:
        for last in (False, False, True):
            with _Counting(counts) if last else contextlib.nullcontext():
                counts.phase = "forward" if last else ""
                loss = loss_of(model, images, labels, "fp32")[0]
                counts.phase = "backward" if last else ""
                loss.backward()
                counts.phase = "optimizer" if last else ""
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return counts


def main(argv: Sequence[str]) -> int:
    """Command line of the suite; returns the exit status."""
    parser = options.parser("launches", __doc__.splitlines()[0])
    options.add_model(parser)
    given = parser.parse_args(argv)
    given.device = "cpu"
    given.batch = given.batch or 2  # the counts do not depend on it
    wrong = options.resolve(given) or options.unknown_variants(given, ["float-eager", "reference-eager", "triton"])
    if wrong is not None:
        return options.refuse(wrong)
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then take CPU tensors
    report = Report("launches", "cpu", options.settings(given), given.json)
    rows = []
    for model in given.model:
        for variant in options.chosen(given, ["float-eager", "reference-eager", "triton"]):
            counts = count(variant, model, given.batch, given.size)
            kinds = {"torch": counts.torch, "triton": counts.triton}
            by_name = {phase: {kind: dict(found[phase].most_common()) for kind, found in kinds.items()} for phase in PHASES}
            rows.append({"model": model, "variant": variant, **counts.totals(), "total": sum(counts.totals().values()),
                         "triton": sum(c.total() for c in counts.triton.values()), "by_name": by_name})  # fmt: skip
    content = report.to_dict() | {"rows": rows}
    if given.json is not None:
        write_atomic(given.json, json.dumps(content, indent=1) + "\n")
    print(table(rows))
    return 0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The counts as aligned text."""
    head = ("model", "variant", *PHASES, "total", "triton")
    lines = [head, *(tuple(str(row[key]) for key in head) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.rjust(w) if i > 1 else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
