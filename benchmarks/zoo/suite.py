"""Which models convert, and what still works on the converted model.

Every model is built with random weights, its BatchNorm statistics settled on generated images, and converted. The table
says how many layers were converted and what feeds them, how far the 8-bit network is from the full-precision one (a deep
random network amplifies any noise, so the original network with noise of the size of 8-bit rounding stands beside it), and
whether everything a user does with a model works on the converted one (checks.py). A model that is refused shows
its message; where the message names a remedy, the model is converted with it.
"""

from __future__ import annotations

import argparse
import copy
import json
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from profit import calibrate_, quant_layers, quantize_, set_bits
from profit.errors import ProfitError

from ..harness.place import RESULTS
from .checks import CHECKS
from .models import BATCH, FULL, LARGER, MODELS, PIXELS, REMEDIES, Row, build, config, images, relative, settle


@torch.no_grad()
def worst_layer(model: nn.Module, x: Tensor) -> tuple[str, float]:
    """The layer whose 8-bit output is farthest from its full-precision one on the same input. A wrong kind shows here."""
    errors: dict[str, float] = {}
    layers = quant_layers(model)

    def hook(name: str) -> Callable[..., None]:
        def compare(layer: nn.Module, args: tuple[Tensor, ...], full: Tensor) -> None:
            layer.set_weight_bits(8), layer.set_act_bits(8)
            if float(full.norm()) > 0:
                errors[name] = max(errors.get(name, 0.0), relative(layer.forward(*args), full))
            layer.set_weight_bits(None), layer.set_act_bits(None)

        return compare

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    model(x)
    for handle in handles:
        handle.remove()
    return max(errors.items(), key=lambda item: item[1])


@torch.no_grad()
def with_rounding_noise(original: nn.Module, table: Any, x: Tensor) -> Tensor:
    """Logits of the unconverted network where weights and inputs of the converted layers carry uniform noise of one 8-bit
    step: the yardstick for the error of the quantized network, computed without any quantizer."""
    model, generator = copy.deepcopy(original), torch.Generator().manual_seed(0)

    def noisy(tensor: Tensor, steps: int) -> Tensor:
        noise = torch.rand(tensor.shape, generator=generator) - 0.5
        return tensor + noise * (tensor.max() - min(float(tensor.min()), 0.0) if steps == 255 else tensor.abs().max()) / steps

    for row in table:
        layer = model.get_submodule(row.name)
        layer.weight.copy_(noisy(layer.weight, 127))
        if row.kind != "raw":
            steps = 127 if row.kind == "signed" else 255
            layer.register_forward_pre_hook(lambda layer, args, steps=steps: (noisy(args[0], steps), *args[1:]))
    return model(x)


def examine(model_name: str, checks: Sequence[str] = tuple(CHECKS)) -> Row:
    """Convert one model and run `checks` on it."""
    start = time.perf_counter()
    row = Row(model_name)
    # At 4 bits about one random network in thirty explodes: channels that became constant, BatchNorm behind each other.
    torch.manual_seed(0)
    model = build(model_name)
    x = images(BATCH, LARGER.get(model_name, PIXELS), seed=0)
    settle(model, x)
    original = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(x)
    try:
        table = _converted(model, x, row)
    except ProfitError as error:
        row.refused = row.refused or str(error)
        row.wall_s = round(time.perf_counter() - start, 1)
        return row
    counts = table.counts()
    row.layers, row.ranked, row.fused = counts["layers"], counts["ranked"], counts["fused"]
    row.kinds = tuple(counts[kind] for kind in ("raw", "unsigned", "offset", "signed"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a dead squeeze-and-excite of a random network has no range
        row.full_precision_error = relative(model(x), expected)
        calibrate_(model, [x], batches=1, percentile="max")
        row.worst_layer = worst_layer(model, x)
        set_bits(model, 8, 8)
        row.eight_bit_error = relative(model(x), expected)
        row.noise_error = relative(with_rounding_noise(original, table, x), expected)
        set_bits(model, 4, 4)
    for name in checks:
        try:
            row.checks[name] = CHECKS[name](model, x, row)
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, pickle.PicklingError) as error:
            row.checks[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    row.wall_s = round(time.perf_counter() - start, 1)
    return row


def _converted(model: nn.Module, x: Tensor, row: Row) -> Any:
    """The layer table; a refusal is noted, and its remedy (if there is one here) tried."""
    start = time.perf_counter()
    try:
        table = quantize_(model, FULL, x[:1])
    except ProfitError as error:
        row.refused = str(error)
        if row.model not in REMEDIES:
            raise
        row.remedy = REMEDIES[row.model]
        start = time.perf_counter()
        table = quantize_(model, config(None, row.remedy), x[:1])
    row.convert_s = round(time.perf_counter() - start, 2)
    return table


def markdown(rows: Sequence[Row]) -> str:
    """The table of converted models, then the refusals."""
    heads = ("model", "layers", "raw/unsigned/offset/signed", "ranked", "fused", "8 bits, logits", "noise, logits",
             "8 bits, worst layer", *CHECKS, "conversion s")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in rows:
        if row.converted:
            cells = [
                row.model + (" (with the remedy)" if row.remedy else ""), row.layers, "/".join(map(str, row.kinds)),
                row.ranked, row.fused, f"{row.eight_bit_error:.1%}", f"{row.noise_error:.1%}", f"{row.worst_layer[1]:.1%}",
                *("-" if name not in row.checks else "no" if row.checks[name] else "yes" for name in CHECKS), row.convert_s,
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| refused | message |", "|---|---|"]
    lines += [f"| {row.model} | {row.refused} |" for row in rows if row.refused]
    problems = [f"{row.model}: {name}: {row.checks[name]}" for row in rows for name in row.failed]
    return "\n".join(lines + ["", *problems])


def _in_process(model: str, checks: Sequence[str]) -> Row:
    torch.set_num_threads(1)
    return examine(model, checks)


def main(argv: Sequence[str]) -> int:
    """Examine the models; returns 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks zoo", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["*"], metavar="PATTERN", help="as 'timm/mobilenetv3*'; all by default")
    parser.add_argument("--checks", nargs="*", default=list(CHECKS), choices=list(CHECKS), help="all by default")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each (default 2)")
    parser.add_argument("--out", type=Path, default=RESULTS / "zoo.json", help="the result file")
    options = parser.parse_args(argv)
    from profit.environment import git_commit, processor, versions
    from profit.files import write_atomic

    chosen = [m for m in MODELS if any(fnmatchcase(m, pattern) for pattern in options.models)]
    if not chosen:
        print(f"error: no model of the zoo matches {' '.join(options.models)}", file=sys.stderr)
        return 2
    start, rows = time.perf_counter(), {}
    content = {
        "suite": "zoo",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "versions": versions(),
        "processor": processor(),
        "jobs": options.jobs,
        "images": {"batch": BATCH, "pixels": PIXELS, "larger": LARGER},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(_in_process, model, options.checks): model for model in chosen}
        for done in as_completed(waiting):
            row = rows[waiting[done]] = done.result()
            state = "refused" if not row.converted else f"{row.layers} layers, 8 bits {row.eight_bit_error:.1%}"
            problems = "".join(f"; {name}: {row.checks[name]}" for name in row.failed)
            print(f"[{len(rows)}/{len(chosen)}] {row.model}: {state}, {row.wall_s:.0f} s{problems}", flush=True)
            found = [asdict(rows[model]) for model in chosen if model in rows]
            content.update(wall_s=round(time.perf_counter() - start, 1), models=found)
            write_atomic(options.out, json.dumps(content, indent=1) + "\n")
    ordered = [rows[model] for model in chosen]
    print("\n" + markdown(ordered))
    return int(any(row.failed for row in ordered))
