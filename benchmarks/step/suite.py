"""A whole training step (forward, loss, backward, SGD) of a W4A4 network against full precision and the reference.

Every variant lives in a process of its own, with the allocator tuned alike, and is compared with the eager reference (or eager
full precision) first: one whose step or layers differ gets no figure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import profit

from ..harness import options
from ..harness.children import Prepared, Unavailable, measure
from ..harness.rows import Report
from ..harness.timing import Budget, Call, capture, why_no_compile
from .checks import check
from .jobs import VARIANTS, Job, backend_for, backends_used, build, cases, example, loss_of, variants


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
