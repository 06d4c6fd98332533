"""The paper's Figure 6, redrawn and measured: which quantizer can represent the output of h-swish.

Normal data x of several widths go through h-swish; each quantizer is fitted to the result (least mean squared error over
its own parameters, by a grid of ranges and then gradient steps with its own straight-through gradients) at 4, 3 and 2 bits.
Source of the comparison: PROFIT (arXiv 2008.04693), Figure 6. The numbers are measured here, not taken from the paper.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from profit.environment import git_commit, versions
from profit.files import write_atomic
from profit.nn.baselines import BASELINES
from profit.nn.quantizer import InputQuantizer

from ..harness.place import RESULTS, ROOT

QUANTIZERS: dict[str, type[InputQuantizer]] = {name: pair[0] for name, pair in BASELINES.items()} | {
    "duq": InputQuantizer
}
LABELS = {"pact": "PACT", "qil": "QIL", "lsq": "LSQ", "lsq+": "LSQ+", "duq": "DuQ"}
BITS = (4, 3, 2)
WIDTHS = (1.0, 2.0, 4.0)  # standard deviations of x
PLOTTED_WIDTH = 2.0
OFFSET = -0.375
INK, MUTED, ACCENT, LIGHT = "#1f2933", "#9aa5b1", "#c2410c", "#e4e7eb"


def quantize(quantizer: InputQuantizer, x: Tensor, h: Tensor) -> Tensor:
    """The quantized h; QIL's result in [0, 1] is scaled to fit best, as the layer behind it would learn to."""
    q = quantizer(x)
    if type(quantizer) is QUANTIZERS["qil"]:
        q = q * ((q * h).sum() / q.square().sum().clamp(min=1e-12)).detach()
    return q


def fit(name: str, bits: int, x: Tensor, steps: int) -> InputQuantizer:
    """The quantizer with the least mean squared error found: 60 ranges, then `steps` steps of Adam from the best."""
    h = F.hardswish(x)
    top = (h.max() - OFFSET).item()
    best, least = None, math.inf
    for i in range(1, 61):
        candidate = QUANTIZERS[name](kind="offset", offset=OFFSET, activation="hardswish", bits=bits)
        reach = top * i / 60
        if reach + OFFSET <= 0.01:  # nothing of the positive part would be left
            continue
        candidate.set_range(reach)
        error = F.mse_loss(quantize(candidate, x, h), h).item()
        if error < least:
            best, least = candidate, error
    quantizer = copy.deepcopy(best)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = F.mse_loss(quantize(quantizer, x, h), h)
        if loss.item() < least:
            best, least = copy.deepcopy(quantizer), loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return best


@torch.no_grad()
def measure(quantizer: InputQuantizer, x: Tensor) -> dict[str, float | int]:
    """Errors on fresh data: mean squared, signal to noise in dB, mean squared where h < 0, and values in use."""
    h = F.hardswish(x)
    q = quantize(quantizer, x, h)
    squared = (q - h).square()
    mse = squared.mean().item()
    values, counts = q.unique(return_counts=True)
    return {
        "mse": mse,
        "sqnr_db": 10 * math.log10(h.square().mean().item() / mse),
        "mse_negative": squared[h < 0].mean().item(),
        "values_used": int((counts >= 1e-4 * q.numel()).sum()),
        "values_below_zero": int((values < -1e-6).sum()),
    }


def run(samples: int, steps: int, seed: int) -> tuple[list[dict[str, Any]], dict[tuple[str, int], InputQuantizer]]:
    """Rows for every width, bit width and quantizer, and the fitted quantizers of the plotted width."""
    generator = torch.Generator().manual_seed(seed)
    rows, fitted = [], {}
    for width in WIDTHS:
        train, test = (torch.randn(1, samples, generator=generator) * width for _ in range(2))
        for bits in BITS:
            for name in LABELS:
                quantizer = fit(name, bits, train, steps)
                rows.append({"quantizer": name, "bits": bits, "std": width} | measure(quantizer, test))
                if width == PLOTTED_WIDTH:
                    fitted[name, bits] = quantizer
    return rows, fitted


def _lookup(rows: list[dict[str, Any]], name: str, bits: int, width: float) -> dict[str, Any]:
    return next(r for r in rows if (r["quantizer"], r["bits"], r["std"]) == (name, bits, width))


def _tidy(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


@torch.no_grad()
def _curves(axes: Any, quantizer: InputQuantizer, color: str) -> None:
    """h-swish and its quantized form over x, and at the left how often each output occurs."""
    x = torch.linspace(-5, 4, 3601)[None]
    h = F.hardswish(x)
    generator = torch.Generator().manual_seed(0)
    samples = F.hardswish(torch.randn(200_000, generator=generator) * PLOTTED_WIDTH)
    density, edges = torch.histogram(samples, bins=90, range=(-0.5, 4.0))
    length = 1.6 * (density / density.max()).sqrt()
    axes.barh(edges[:-1].numpy(), length.numpy(), float(edges[1] - edges[0]), left=-5, color=LIGHT, align="edge")
    axes.plot(x[0].numpy(), h[0].numpy(), color=MUTED, linewidth=1)
    axes.plot(x[0].numpy(), quantize(quantizer, x, h)[0].numpy(), color=color, linewidth=1.4)
    axes.axhline(0, color=LIGHT, linewidth=0.8, zorder=0)


def plot(rows: list[dict[str, Any]], fitted: dict[tuple[str, int], InputQuantizer], path: Path) -> None:
    """Transfer curves of every quantizer over the density of h, and the signal-to-noise ratios."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9.2), facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(4, len(LABELS), height_ratios=(1, 1, 1, 1.15), hspace=0.42, wspace=0.12)
    colors = {name: ACCENT if name == "duq" else INK for name in LABELS}
    first = None
    for row, bits in enumerate(BITS):
        for column, (name, label) in enumerate(LABELS.items()):
            axes = figure.add_subplot(grid[row, column], sharex=first, sharey=first)
            first = first or axes
            _curves(axes, fitted[name, bits], colors[name])
            _tidy(axes, f"{label}, {bits} bits: {_lookup(rows, name, bits, PLOTTED_WIDTH)['sqnr_db']:.1f} dB")
            axes.tick_params(labelleft=column == 0)
    first.set(xlim=(-5, 4), ylim=(-0.85, 4.1))
    panels = grid[3, :].subgridspec(1, len(WIDTHS), wspace=0.16)
    shared = None
    for column, width in enumerate(WIDTHS):
        axes = figure.add_subplot(panels[0, column], sharey=shared)
        shared = shared or axes
        for bits, shift, alpha in zip(BITS, (-0.27, 0.0, 0.27), (1.0, 0.65, 0.35), strict=True):
            for place, name in enumerate(LABELS):
                value = _lookup(rows, name, bits, width)["sqnr_db"]
                bar = axes.bar(place + shift, value, 0.25, color=colors[name], alpha=alpha)
                axes.bar_label(bar, [f"{value:.0f}"], fontsize=7, color=INK, padding=1)
        axes.set_xticks(range(len(LABELS)), LABELS.values())
        _tidy(axes, f"x with standard deviation {width:g}")
    shared.set_ylim(0, 26)
    shared.set_ylabel("SQNR [dB] at 4, 3, 2 bits", fontsize=9, color=INK)
    figure.suptitle(
        "Quantizing h-swish: quantized h-swish(x) over x, every quantizer fitted for least squared error\n"
        "grey line: h-swish; grey area: how often each output occurs "
        f"(square root of the density, x of standard deviation {PLOTTED_WIDTH:g})",
        fontsize=11,
        color=INK,
        y=0.965,
    )
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, bbox_inches="tight", format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, picture.getvalue())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    lines = ["std  bits  quantizer  SQNR dB        MSE  MSE (h < 0)  values used"]
    for r in rows:
        lines.append(
            f"{r['std']:<4g} {r['bits']:<5d} {LABELS[r['quantizer']]:<9s} {r['sqnr_db']:8.2f}  {r['mse']:9.3e}"
            f"    {r['mse_negative']:9.3e}  {r['values_used']:11d}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Command line of the suite; writes the plot and the JSON and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks figure6", description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "figure6.png")
    parser.add_argument("--json", type=Path, default=RESULTS / "figure6.json")
    parser.add_argument("--samples", type=int, default=20_000, help="data to fit on, and again to measure on")
    parser.add_argument("--steps", type=int, default=300, help="gradient steps after the grid of ranges")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    rows, fitted = run(options.samples, options.steps, options.seed)
    settings = {"samples": options.samples, "steps": options.steps, "seed": options.seed}
    result = {
        "schema": 1,
        "suite": "figure6",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "device": "cpu",
        "versions": versions(),
        "data": "h-swish of normal x with mean 0; fitted and measured on separate samples",
        "settings": settings,
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.json, json.dumps(result, indent=1) + "\n")
    plot(rows, fitted, options.plot)
    print(table(rows))
    print(f"wrote {options.plot} and {options.json}")
    return 0
