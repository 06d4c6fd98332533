"""Memory of a training step: bytes kept for the backward, and the peak above what is resident before the step.

Kept: every storage that autograd saves, once, parameters left out. Peak: everything between, gradients and buffers of the
operators included. One process per variant, compared with the eager reference first, as in the suite step.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..harness import options
from ..harness.children import measure
from ..harness.peak import why_no_peak
from ..harness.rows import Report
from ..harness.timing import Budget
from ..step.jobs import Job, cases, variants
from ..step.suite import prepare


def names(device: str) -> list[str]:
    """The variants of the suite step; a CUDA graph holds its memory for good, so it has no peak of a step."""
    return [name for name in variants(device) if not name.endswith("graph")]


def run_case(report: Report, case: str, jobs: dict[str, Job], given, budget: Budget) -> None:
    """Measure the variants of one case and add their rows."""
    outcomes = measure(
        prepare, jobs, rounds=0, turn_s=0.0, at_once=1 if given.device == "cpu" else 3, peak=True,
        say=lambda text: print(f"{case}  {text}", flush=True), budget=budget,
    )  # fmt: skip
    for variant, outcome in outcomes.items():
        report.add(
            case, variant, "step", kept_bytes=outcome.kept_bytes, peak_bytes=outcome.peak_bytes, status=outcome.status,
            note=outcome.note or outcome.facts["note"],
        )  # fmt: skip
    report.save()


def main(argv: Sequence[str]) -> int:
    """Command line of the suite; returns the exit status."""
    parser = options.parser("memory", __doc__.splitlines()[0])
    options.add_model(parser)
    given = parser.parse_args(argv)
    wrong = options.resolve(given)
    known = names(given.device)
    wrong = wrong or options.unknown_variants(given, known) or why_no_peak(given.device)
    if wrong is not None:
        return options.refuse(wrong)
    report = Report("memory", given.device, options.settings(given), given.json)
    budget = Budget(given.budget)
    for case, jobs in cases(given, known):
        run_case(report, case, jobs, given, budget)
    if not report.rows:
        return options.refuse("nothing to measure: no case and variant is left by --filter and --variants")
    return report.finish()
