"""What the backward pays for computing the quantized input of its pointwise convolutions anew instead of keeping it.

Kept as packed codes it would have to be unpacked, which writes as many floats. So the time to write them is a lower bound of
that, and the difference the most that keeping could save. C++ kernels, every pointwise layer of a network, not only distinct
ones: the sums are those of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from profit_kernels import dispatch
from profit_kernels.layer import Norm, Quantizer
from profit_kernels.ops.norm import cpp, reference

from ..harness import gates, options, registry
from ..harness.children import WrongResult
from ..harness.data import BITS, random_data
from ..harness.registry import Layer
from ..harness.rows import FAILED, SKIPPED, Report
from ..harness.timing import Budget, Call, clock_for, interleaved

VARIANTS = ("anew", "write")


def run_layer(case: str, layer: Layer, dtype: torch.dtype, given: Any, report: Report) -> dict[str, float]:
    """Check and time one layer; variant -> median in seconds, empty if its result is wrong."""
    x = random_data(layer.shape, dtype, "cpu")
    y, channels = torch.empty_like(x), x.shape[1]
    zeros, ones = torch.zeros(channels), torch.ones(channels)
    norm = Norm(mean=zeros, invstd=ones, gamma=ones, beta=zeros, of_batch=True)  # which gives x itself
    quantizer = {"bits": BITS, "signed": layer.signed, "offset": layer.offset, "activation": layer.activation}
    a, c = torch.ones(1), torch.ones(1)
    q = Quantizer(a, c, **quantizer)
    try:
        gates.codes(cpp.quantized_input(x, norm, q), reference.quantized_input(x, norm, q), x, a, c, **quantizer)
    except WrongResult as reason:
        report.add(case, "anew", "forward", status=FAILED, note=str(reason))
        return {}
    calls = {"anew": Call(lambda _: cpp.quantized_input(x, norm, q)), "write": Call(lambda _: y.fill_(1.0))}
    timed = {variant: calls[variant] for variant in options.chosen(given, list(VARIANTS))}
    spreads = interleaved(timed, clock_for("cpu"), rounds=given.rounds, most=1 if given.toy else 20)
    for variant, spread in spreads.items():
        report.add(case, variant, "forward", spread)
    return {variant: spread.median for variant, spread in spreads.items()}


def run_network(model: str, dtype: str, given: Any, report: Report, budget: Budget) -> str | None:
    """Every pointwise layer that --filter leaves, until the time is used up; the sums in words, None without a layer."""
    sums, count = dict.fromkeys(options.chosen(given, list(VARIANTS)), 0.0), 0
    for layer in registry.layers(model, given.size, given.batch):
        case = f"{model} {layer.name}: {layer.label} {dtype}"
        if not layer.pointwise or given.filter not in case:
            continue
        if budget.used_up():
            report.add(f"{model}, further layers", "all", "forward", status=SKIPPED, note="no time left")
            break
        print(case, flush=True)
        medians = run_layer(case, layer, options.DTYPES[dtype], given, report)
        if medians:
            count += 1
            sums = {variant: sums[variant] + medians[variant] for variant in sums}
        report.save()
    if not count:
        return None
    name = f"{model} batch {given.batch}, {given.size} px, {dtype}"
    report.facts.setdefault("sums", {})[name] = {"layers": count, **{f"{variant}_s": sums[variant] for variant in sums}}
    return f"{name}, {count} layers: {', '.join(f'{variant} {1e3 * seconds:.1f} ms' for variant, seconds in sums.items())}"


def main(argv: Sequence[str]) -> int:
    """Command line of the suite; returns the exit status."""
    parser = options.parser("recompute", __doc__.splitlines()[0])
    options.add_model(parser)
    given = parser.parse_args(argv)
    if given.device == "cuda":
        return options.refuse("recompute measures C++ kernels, which run on the CPU; leave --device cuda out")
    given.device = "cpu"
    wrong = options.resolve(given) or options.unknown_variants(given, list(VARIANTS))
    if wrong is not None:
        return options.refuse(wrong)
    for dtype in given.dtype:
        if (reason := dispatch.why_not("block", "cpp", "cpu", options.DTYPES[dtype])) is not None:
            return options.refuse(f"the C++ kernels cannot be measured: {reason}")
    torch.manual_seed(0)
    report, budget = Report("recompute", "cpu", options.settings(given), given.json), Budget(given.budget)
    found = [run_network(model, dtype, given, report, budget) for model in given.model for dtype in given.dtype]
    if not report.rows:
        return options.refuse("nothing to measure: no layer and variant is left by --filter and --variants")
    status = report.finish()
    print("\n".join(["", "sums of a step:", *filter(None, found)]))
    return status
