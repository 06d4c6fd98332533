"""The operators on the layer shapes of the networks: forward, backward and both, beside the bytes they must move.

Every variant is compared with the reference before it is timed; a wrong result gets no figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from profit_kernels import dispatch

from ..harness import gates, options, peers
from ..harness.children import WrongResult
from ..harness.rows import FAILED, SKIPPED, Report
from ..harness.timing import Budget, Call, Spread, clock_for, copies, copy_call, interleaved, kept_bytes, why_no_compile
from .block_cases import UNFUSED
from .cases import makers
from .variants import Case, Variant

VARIANTS = (
    "auto", "reference-eager", "reference-compile", "float-eager", "float-compile", "torch-learnable", *peers.PEERS,
    "auto, layer by layer", UNFUSED,
)  # fmt: skip
DIRECTIONS = ("forward", "backward", "forward+backward")

GROUPS = ("duq", "weights", "depthwise", "block", "pointwise")


def calls(variant: Variant, grads: Sequence[Tensor]) -> dict[str, Call]:
    """The three directions of a variant. A backward is timed on a graph of its own, as in training."""

    def backward(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(outputs, variant.leaves, grads)

    return {
        "forward": Call(lambda _: variant.forward(), context=variant.context),
        "backward": Call(backward, setup=variant.forward, context=variant.context),
        "forward+backward": Call(lambda _: backward(variant.forward()), context=variant.context),
    }


def evaluate(case: Case, variant: Variant) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of the leaves) of one call."""
    with variant.context():
        outputs = variant.forward()
        return [y.detach() for y in outputs], list(torch.autograd.grad(outputs, variant.leaves, case.grads))


def passed(case: Case, names: Sequence[str], device: str, report: Report) -> list[str]:
    """The variants that may be timed; for the others, rows that say why not."""
    with gates.exact_convolutions():
        return _passed(case, names, device, report)


def _passed(case: Case, names: Sequence[str], device: str, report: Report) -> list[str]:
    expected = evaluate(case, case.variants["reference-eager"])
    good = []
    for name in names:
        variant = case.variants[name]
        reason = why_no_compile(device) if variant.compiled else None
        if reason is not None:
            report.add(case.name, name, DIRECTIONS[-1], status=SKIPPED, note=reason)
            continue
        try:
            got = evaluate(case, variant)
            if variant.gate is not None:
                variant.gate(*got, *expected)
            good.append(name)
        except WrongResult as reason:
            report.add(case.name, name, DIRECTIONS[-1], status=FAILED, note=str(reason))
        except (NotImplementedError, torch.OutOfMemoryError) as error:
            report.add(case.name, name, DIRECTIONS[-1], status=SKIPPED, note=str(error).partition("\n")[0])
    return good


def run_case(case: Case, given, report: Report) -> None:
    """Check, time and count one case."""
    torch.compiler.reset()
    names = passed(case, options.chosen(given, list(case.variants)), given.device, report)
    timed = {(n, d): call for n in names for d, call in calls(case.variants[n], case.grads).items()}
    copy = ("copy", "copy")
    timed[copy] = copy_call(case.numel, case.dtype, given.device)
    most = 1 if given.toy else 20
    spreads = interleaved(timed, clock_for(given.device), rounds=given.rounds, turn_s=given.turn, most=most)
    floors = copies(case.moved, spreads[copy].median)
    for name in names:
        variant = case.variants[name]
        with variant.context():
            kept = kept_bytes(variant.forward, case.parameters)
        for direction in DIRECTIONS:
            report.add(
                case.name, name, direction, spreads[name, direction], floor_s=floors[direction], kept_bytes=kept
            )
    report.add(case.name, "copy", "copy", spreads[copy], note=bandwidth(case, spreads[copy]))


def bandwidth(case: Case, spread: Spread) -> str:
    """What a copy of the case's tensor reaches."""
    return f"{2 * case.numel * case.dtype.itemsize / spread.median / 1e9:.4g} GB/s"


def run(given, report: Report, build: Callable = makers) -> None:
    """Every case that --filter leaves, until the time is used up."""
    budget = Budget(given.budget)
    for group, make in build(given.batch, given.size, given.device, given.dtype, given.toy):
        if budget.used_up():
            report.add(f"{group}, further cases", "all", "all", status=SKIPPED, note="no time left")
            break
        if given.group and group not in given.group:
            continue
        case = make()
        if given.filter in case.name:
            print(case.name, flush=True)
            run_case(case, given, report)
            report.save()


def main(argv: Sequence[str]) -> int:
    """Command line of the suite; returns the exit status."""
    parser = options.parser("ops", __doc__.splitlines()[0])
    parser.add_argument("--group", nargs="+", choices=GROUPS, help="only these operators")
    parser.add_argument("--dtype", nargs="+", choices=tuple(options.DTYPES), help="default: fp32 and bf16")
    parser.add_argument("--turn", type=float, default=0.05, metavar="SECONDS", help="length of a turn (default 0.05)")
    given = parser.parse_args(argv)
    given.dtype = given.dtype or (["fp32", "bf16"] if not given.toy else ["fp32"])
    known = [*(name for name in VARIANTS), *dispatch.BACKENDS[1:]]
    wrong = options.resolve(given) or options.unknown_variants(given, known)
    if wrong is not None:
        return options.refuse(wrong)
    torch.manual_seed(0)
    for peer in peers.PEERS:
        if (reason := peers.why_missing(peer)) is not None:
            print(f"{peer}: {reason}")
    report = Report("ops", given.device, options.settings(given), given.json)
    run(given, report)
    if not any(row.variant != "copy" for row in report.rows):
        return options.refuse("nothing to measure: no case and variant is left by --filter, --group and --variants")
    return report.finish()
