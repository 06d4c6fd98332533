"""The drawings of the report, made from the completed results (profit.report.results). Each returns None when there is
nothing to draw; the captions stand in the template."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from profit.report.results import finite
from profit.report.svg import COLOURS, Chart, figure, plain, to_chart

WIDTH = 900
ROW = 21
SMALLEST_ERROR = 0.1  # percent: where the accuracy axis ends when it is logarithmic in the error


def accuracy_by_phase(phases: Sequence[Mapping[str, Any]], accuracy_fp: float | None) -> Chart | None:
    """Dots, one row per phase: test accuracy in percent of the raw and of the EMA model."""
    raw = [_number(phase["accuracy"]) for phase in phases]
    ema = [_number(phase["accuracy_ema"]) for phase in phases]
    measured = [value for value in raw + ema if math.isfinite(value)]
    if not measured:
        return None
    rows = list(range(len(phases)))
    with figure(WIDTH, ROW * len(phases) + 90) as fig:
        axes = fig.add_subplot()
        if finite(accuracy_fp):
            label = f"full precision, {accuracy_fp:.2f} %"
            axes.axvline(accuracy_fp, color=COLOURS["muted"], linewidth=1.2, linestyle=(0, (5, 3)), label=label)
        axes.plot(raw, rows, "-", color=COLOURS["raw"], linewidth=1, alpha=0.5)
        axes.plot(raw, rows, "o", color=COLOURS["raw"], markersize=8, label="raw model")
        if any(math.isfinite(value) for value in ema):
            hollow = {"markerfacecolor": "none", "markeredgewidth": 1.8, "markersize": 8}
            axes.plot(ema, rows, "D", color=COLOURS["ema"], label="EMA model", **hollow)
        _error_axis(axes.xaxis, measured + ([accuracy_fp] if finite(accuracy_fp) else []))
        axes.set_yticks(rows, [plain(_phase_label(i, phase)) for i, phase in enumerate(phases, start=1)])
        axes.set_ylim(len(phases) - 0.4, -0.6)
        axes.grid(axis="both")
        axes.tick_params(length=0)
        axes.set_xlabel("test accuracy (%)")
        fig.legend(loc="outside upper center", ncols=3)
        alt = (
            f"Dot chart of the test accuracy after {_many(len(phases), 'phase')}, "
            f"from {min(measured):.2f} to {max(measured):.2f} percent."
        )
        return to_chart(fig, "accuracy", alt)


def training_curves(phases: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Accuracy, loss and learning rate over the epochs of all phases, one after the other."""
    epochs = [{**row, "bits": phase["bits"] or "?"} for phase in phases for row in phase["history"]]
    if not epochs:
        return None
    with figure(WIDTH, 640) as fig:
        grid = fig.subplots(3, 1, sharex=True, height_ratios=(3, 2.2, 1.4))
        _curves(grid[0], epochs, (("accuracy", "raw model, test", "raw"), ("accuracy_ema", "EMA model, test", "ema")))
        _curves(grid[1], epochs, (("test_loss", "test", "raw"), ("train_loss", "training", "ema")))
        _curves(grid[2], epochs, (("lr", None, "ink"),))
        _error_axis(grid[0].yaxis, _finite(epochs, "accuracy", "accuracy_ema"))
        _log_axis(grid[1].yaxis, _finite(epochs, "test_loss", "train_loss"))
        _log_axis(grid[2].yaxis, _finite(epochs, "lr"))
        for axes, label in zip(grid, ("accuracy (%)", "loss", "learning rate"), strict=True):
            axes.set_ylabel(label)
            axes.grid(axis="y")
        _bit_bands(grid, epochs)
        grid[0].set_xlim(0.5, len(epochs) + 0.5)
        grid[-1].set_xlabel("epoch, counted over all phases")
        grid[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        fig.align_ylabels()
        alt = f"Test accuracy, loss and learning rate over {_many(len(epochs), 'epoch')} of training."
        return to_chart(fig, "curves", alt)


def _curves(axes: Any, epochs: Sequence[Mapping[str, Any]], series: Sequence[tuple[str, str | None, str]]) -> None:
    marker = "." if len(epochs) <= 60 else None
    for key, label, colour in series:
        line = [_number(row[key]) for row in epochs]
        if any(math.isfinite(value) for value in line):
            axes.plot(range(1, len(line) + 1), line, marker=marker, color=COLOURS[colour], linewidth=1.6, label=label)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="best")


def _error_axis(axis: Any, accuracies: Sequence[float]) -> None:
    """Logarithmic in the error where accuracies span from a collapse to nearly perfect, else linear."""
    if not accuracies or 100 - min(accuracies) < 20 * max(100 - max(accuracies), SMALLEST_ERROR):
        return

    def place(accuracy: Any) -> Any:
        import numpy

        return -numpy.log10(numpy.maximum(100.0 - numpy.asarray(accuracy, dtype=float), SMALLEST_ERROR))

    # a sixth more error on the left, a tenth less on the right: no mark on the frame
    low, high = 100 - (100 - min(accuracies)) * 1.15, max(accuracies) + (100 - max(accuracies)) * 0.1
    axes, functions = axis.axes, (place, lambda position: 100.0 - 10.0 ** (-position))
    (axes.set_xscale if axis.axis_name == "x" else axes.set_yscale)("function", functions=functions)
    (axes.set_xlim if axis.axis_name == "x" else axes.set_ylim)(low, high)
    ticks = [100 - error for error in (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1) if low <= 100 - error <= high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])


def _log_axis(axis: Any, values: Sequence[float], span: float = 4.0) -> None:
    """Log scale with ticks written as plain numbers, where values are positive and spread by a factor of `span`."""
    if values and min(values) > 0 and max(values) >= span * min(values):
        (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
        _plain_ticks(axis, min(values), max(values))


def _bit_bands(grid: Any, epochs: Sequence[Mapping[str, Any]]) -> None:
    """Shade every other run of equal bit widths and write the widths above it."""
    start = 0.5
    for index, (bits, group) in enumerate(groupby(row["bits"] for row in epochs)):
        stop = start + len(list(group))
        for axes in grid:
            if index % 2:
                axes.axvspan(start, stop, color=COLOURS["band"], linewidth=0, zorder=0)
            elif index:
                axes.axvline(start, color=COLOURS["line"], linewidth=0.8, zorder=0)
        # below about 8 px a character a horizontal label would run into its neighbour
        narrow = (stop - start) / len(epochs) * (WIDTH - 90) < 8 * len(plain(bits, 12))
        place = {"rotation": 90 if narrow else 0, "ha": "center", "va": "bottom", "fontsize": 11}
        text = grid[0].text((start + stop) / 2, 1.02, plain(bits, 12), transform=grid[0].get_xaxis_transform(), **place)
        text.set_in_layout(True)
        start = stop


def aiwq_bars(layers: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Horizontal bars in network order, one per ranked layer: AIWQ on a log axis, the colour by freezing stage."""
    scored = [layer for layer in layers if finite(layer["aiwq"])]
    positive = [layer["aiwq"] for layer in scored if layer["aiwq"] > 0]
    if not positive:
        return None
    low, high = min(positive), max(positive)
    left = 10.0 ** math.floor(math.log10(low) - 0.3)
    with figure(WIDTH, 17 * len(scored) + 90) as fig:
        axes = fig.add_subplot()
        for row, layer in enumerate(scored):
            value = max(layer["aiwq"], left)
            axes.barh(row, value - left, left=left, height=0.72, color=COLOURS[stage_colour(layer)], linewidth=0)
            axes.text(value * 1.06, row, _bar_label(layer), va="center", fontsize=10)
        _log_axis(axes.xaxis, [left, high], span=1)
        # room on the right for the labels
        axes.set_xlim(left, high * (high / left) ** 0.22 * 1.6)
        axes.set_yticks(range(len(scored)), [plain(layer["name"] or "?") for layer in scored], fontsize=10)
        axes.set_ylim(len(scored) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_xlabel("AIWQ (nats, log scale)")
        fig.legend(*_stage_legend(scored), loc="outside upper center", ncols=5)
        alt = (
            f"Bar chart of AIWQ for {_many(len(scored), 'ranked layer')}, from {low:.1e} to {high:.1e}; "
            f"the colour and a mark such as S1 tell the freezing stage."
        )
        return to_chart(fig, "aiwq", alt)


def stage_colour(layer: Mapping[str, Any]) -> str:
    """Name of the colour of a layer's freezing stage; every layer frozen in stage 4 or later shares one."""
    stage = layer["frozen_stage"]
    return f"stage{min(max(int(stage), 1), 4)}" if finite(stage) else "never"


def _bar_label(layer: Mapping[str, Any]) -> str:
    parts = [f"{layer['aiwq']:.1e}" if layer["aiwq"] else "0"]
    if finite(layer["rank"]):
        parts.append(f"#{int(layer['rank'])}")
    if finite(layer["frozen_stage"]):
        parts.append(f"S{int(layer['frozen_stage'])}")
    return "  ".join(parts)


def _stage_legend(layers: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[str]]:
    from matplotlib.patches import Patch

    stages = sorted({int(layer["frozen_stage"]) for layer in layers if finite(layer["frozen_stage"])})
    entries = [(stage_colour({"frozen_stage": stage}), f"frozen from stage {stage} (S{stage})") for stage in stages]
    if any(not finite(layer["frozen_stage"]) for layer in layers):
        entries.append(("never", "not frozen in any stage"))
    return [Patch(color=COLOURS[colour]) for colour, _ in entries], [text for _, text in entries]


def weight_histogram(name: str, entry: Mapping[str, Any], prefix: str) -> Chart | None:
    """Histogram of the latent weights with one stem per quantization level.

    Both are densities (share of the weights per unit of the x axis), so that a stem stands as high as the histogram
    around it where the level is used by the weights that lie there.
    """
    edges, counts, grid, used = entry["edges"], entry["counts"], entry["grid"], entry["code_counts"]
    total = sum(counts)
    if not total:
        return None
    # a fixed frame: there are many of these, and fitting one to its labels costs as much as drawing it
    with figure(250, 130, layout=None) as fig:
        axes = fig.add_axes((0.03, 0.19, 0.94, 0.79))
        widths = [right - left for left, right in zip(edges, edges[1:], strict=False)]
        density = [count / total / width if width > 0 else 0.0 for count, width in zip(counts, widths, strict=True)]
        axes.stairs(density, edges, fill=True, color=COLOURS["hist"], linewidth=0)
        coded = sum(used)
        if len(grid) > 1 and coded:
            steps = [(grid[min(i + 1, len(grid) - 1)] - grid[max(i - 1, 0)]) for i in range(len(grid))]
            steps = [step / (1 if i in (0, len(grid) - 1) else 2) for i, step in enumerate(steps)]
            stems = [count / coded / step if step > 0 else 0.0 for count, step in zip(used, steps, strict=True)]
            thin = len(grid) > 31
            axes.vlines(grid, 0, stems, color=COLOURS["level"], linewidth=0.7 if thin else 1.4)
            if not thin:
                axes.plot(grid, stems, "o", color=COLOURS["level"], markersize=3.5)
        axes.set_ylim(bottom=0)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.xaxis.get_major_locator().set_params(nbins=5)
        axes.tick_params(labelsize=11)
        levels = f" on {_many(len(grid), 'level')}" if grid else ""
        return to_chart(fig, prefix, f"Histogram of the {int(total)} weights of {plain(name)}{levels}.")


def size_accuracy(sizes: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Points of measured accuracy over the model size; a dotted line alone where no accuracy was measured."""
    known = sorted((size for size in sizes if finite(size["bytes"]) and size["bytes"] > 0), key=lambda s: s["bytes"])
    points = [(size["bytes"] / 1000, size["accuracy"]) for size in known if finite(size["accuracy"])]
    if not points:
        return None
    with figure(WIDTH, 330) as fig:
        axes = fig.add_subplot()
        _log_axis(axes.xaxis, [size["bytes"] / 1000 for size in known], span=1)
        for size in known:
            axes.axvline(size["bytes"] / 1000, color=COLOURS["muted"], linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
            label = plain(size["label"] or "?", 12)
            place = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 11}
            axes.text(size["bytes"] / 1000, 1.02, label, transform=axes.get_xaxis_transform(), **place)
        axes.plot(*zip(*points, strict=True), "o-", color=COLOURS["raw"], linewidth=1, markersize=8)
        smallest, largest = known[0]["bytes"] / 1000, known[-1]["bytes"] / 1000
        axes.set_xlim(smallest / 1.15, largest * 1.15)
        values = [value for _, value in points]
        margin = max(0.2 * (max(values) - min(values)), 0.5)
        axes.set_ylim(min(values) - margin, max(values) + margin)
        axes.grid(axis="y")
        axes.set_xlabel("model size (kB of 1000 bytes, log scale)")
        axes.set_ylabel("test accuracy (%)")
        span = f"{points[0][0]:.4g} to {points[-1][0]:.4g} kilobytes"
        alt = f"Test accuracy at {_many(len(points), 'model size')}, {span}."
        return to_chart(fig, "sizes", alt)


def _plain_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks for a log axis, written as plain numbers: 1-2-5 over a few decades, powers of ten over more."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    steps = (1, 2, 5) if high < 100 * low else (1,)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    axis.set_major_locator(FixedLocator([step * 10.0**decade for decade in decades for step in steps]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _phase_label(index: int, phase: Mapping[str, Any]) -> str:
    return f"{index}  {phase['name'] or phase['kind'] or 'unnamed'}"


def _finite(rows: Sequence[Mapping[str, Any]], *keys: str) -> list[float]:
    return [row[key] for row in rows for key in keys if finite(row[key])]


def _number(value: Any) -> float:
    return float(value) if finite(value) else math.nan


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
