"""What sampling AIWQ costs: the training step with and without the monitor, and the operator on every layer shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import profit_kernels as pk
from profit_kernels import dispatch

from ..harness import gates, options, registry
from ..harness.children import WrongResult
from ..harness.data import BITS, backend_context, random_data, raw_interval
from ..harness.registry import Layer
from ..harness.rows import FAILED, Report
from ..harness.timing import Budget, Call, clock_for, copies, copy_call, interleaved
from ..step.jobs import Job, case_name
from ..step.suite import run_case

# variant -> (variant of the step, mode of the monitor or None)
STEPS = {
    "auto": ("auto", None),
    "auto-aiwq": ("auto", "corrected"),
    "auto-aiwq-original": ("auto", "original"),
    "reference-eager": ("reference-eager", None),
    "reference-eager-aiwq": ("reference-eager", "corrected"),
    "reference-eager-aiwq-original": ("reference-eager", "original"),
}
GROUPS = ("step", "layers")


def layer_calls(layer: Layer, dtype: torch.dtype, device: str) -> dict[str, Call]:
    """KL of one layer's output from that of a weight with other codes: the operator by backend, and convolution + KL."""
    x = random_data(layer.shape, dtype, device, 2.0)
    new = torch.randn(layer.weight_shape, device=device) * 0.1
    old = new + 0.001 * torch.randn_like(new)
    a, c, aw, cw = (raw_interval(value, device).detach() for value in (3.0, 3.0, 0.3, 0.3))
    new, old = (pk.duq_fake_quantize(w, aw, cw, bits=BITS, signed=True).to(dtype) for w in (new, old))
    quantizer = {"signed": layer.signed, "offset": layer.offset, "activation": layer.activation}

    def convolve(w: Tensor) -> Tensor:
        h = pk.duq_fake_quantize(x, a, c, bits=BITS, **quantizer)
        return F.conv2d(F.pad(h, layer.padding, value=layer.pad_value), w, stride=layer.stride, groups=layer.groups)

    y = convolve(new)
    geometry = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups, "pad_value": layer.pad_value}

    def operator(_: object) -> Tensor:
        return pk.aiwq_conv2d(x, y, old, a_x=a, c_x=c, act_bits=BITS, **geometry, **quantizer)

    auto = backend_context("auto", dispatch.OPS)
    calls = {"auto": Call(operator, context=auto)}
    for backend in registry.backends("aiwq_conv", device, dtype):
        calls[backend] = Call(operator, context=backend_context(backend, ["aiwq_conv"]))
    calls["reference-eager"] = Call(operator, context=backend_context("reference", dispatch.OPS))
    calls["conv-kl"] = Call(lambda _: pk.aiwq_kl(y, convolve(old)), context=auto)
    return calls


def run_layer(layer: Layer, name: str, dtype: torch.dtype, given, report: Report) -> None:
    """Check and time one layer."""
    calls = layer_calls(layer, dtype, given.device)
    results = {}
    for variant, call in calls.items():
        with call.context(), gates.exact_convolutions():
            results[variant] = call.run(None)
    names = []
    for variant in options.chosen(given, list(calls)):
        try:
            gates.kl(results[variant], results["reference-eager"], dtype)
            names.append(variant)
        except WrongResult as reason:
            report.add(name, variant, "forward", status=FAILED, note=str(reason))
    timed = {variant: calls[variant] for variant in names}
    timed["copy"] = copy_call(layer.input_numel, dtype, given.device)
    most = 1 if given.toy else 20
    spreads = interleaved(timed, clock_for(given.device), rounds=given.rounds, most=most)
    floor = copies({"forward": 1 + layer.output_numel / layer.input_numel}, spreads["copy"].median)["forward"]
    for variant in names:
        report.add(name, variant, "forward", spreads[variant], floor_s=floor)
    report.add(name, "copy", "copy", spreads["copy"])


def layer_cases(given) -> Iterator[tuple[str, Layer, torch.dtype]]:
    """(name, layer, dtype) of every distinct depthwise and pointwise layer of the networks."""
    for dtype in given.dtype:
        for kind, find in (("depthwise", registry.depthwise_layers), ("pointwise", registry.pointwise_layers)):
            found = find(given.size, given.batch, given.model)
            for layer in found[:: len(found) - 1] if given.toy else found:
                yield f"aiwq {kind} {layer.label} {dtype}", layer, options.DTYPES[dtype]


def step_cases(given) -> Iterator[tuple[str, dict[str, Job]]]:
    """(name, jobs) of every network."""
    for model in given.model:
        for dtype in given.dtype:
            jobs = {
                name: Job(base, model, given.batch, given.size, given.device, dtype, torch.get_num_threads(), monitor)
                for name, (base, monitor) in STEPS.items()
                if name in options.chosen(given, list(STEPS))
            }
            yield case_name(model, given, dtype), jobs


def run(given, report: Report, budget: Budget) -> None:
    """Every case that --filter and --group leave, until the time is used up."""
    if "step" in given.group:
        for name, jobs in step_cases(given):
            if given.filter in name and jobs:
                run_case(report, name, jobs, given, budget)
    if "layers" in given.group:
        for name, layer, dtype in layer_cases(given):
            if budget.used_up():
                report.add("aiwq, further layers", "all", "forward", status="skipped", note="no time left")
                break
            if given.filter in name:
                print(name, flush=True)
                run_layer(layer, name, dtype, given, report)
                report.save()


def main(argv: Sequence[str]) -> int:
    """Command line of the suite; returns the exit status."""
    parser = options.parser("aiwq", __doc__.splitlines()[0])
    options.add_model(parser)
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=GROUPS, help="default: both")
    given = parser.parse_args(argv)
    wrong = options.resolve(given) or options.unknown_variants(given, [*STEPS, *dispatch.BACKENDS, "conv-kl"])
    if wrong is not None:
        return options.refuse(wrong)
    torch.manual_seed(0)
    report = Report("aiwq", given.device, options.settings(given), given.json)
    run(given, report, Budget(given.budget))
    return report.finish()
