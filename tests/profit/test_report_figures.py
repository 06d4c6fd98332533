"""What the drawings say, read back from their SVG: positions against the numbers, colours against the stages."""

from __future__ import annotations

import math
import re
from importlib import resources

import pytest

from profit.report import figures
from profit.report.svg import COLOURS, plain
from tests import tolerances
from tests.profit.report_sample import sample_results

# A filled path of four corners: a bar, or (short) a patch of the legend.
BAR = re.compile(r'<path d="M (\S+) (\S+)\s+L (\S+) \S+\s+L \S+ (\S+)\s+L \S+ \S+\s+z\s*"[^>]*style="fill: var\(--(\w+)\)')
MARK = re.compile(r'<use href="#\S+" x="(\S+)" y="(\S+)" style="fill: var\(--raw\)')


@pytest.fixture
def results(rng) -> dict:
    return sample_results(rng.initial_seed(), blocks=4)


def affine_residual(x: list[float], y: list[float]) -> float:
    """Largest distance of y from the line through its first and last point by x."""
    order = sorted(range(len(x)), key=x.__getitem__)
    low, high = order[0], order[-1]
    slope = (y[high] - y[low]) / (x[high] - x[low])
    return max(abs(y[i] - y[low] - slope * (x[i] - x[low])) for i in order)


def test_aiwq_bars_are_logarithmic_and_coloured_by_stage(results):
    layers = [layer for layer in results["layers"] if layer["ranked"]]
    svg = figures.aiwq_bars(results["layers"]).svg
    # the bars of the plot come before the patches of the legend, and in the order of the layers
    bars = BAR.findall(svg)[: len(layers)]
    assert len(bars) == len(layers)
    rows = [float(bar[1]) for bar in bars]
    assert rows == sorted(rows)
    right = [max(float(bar[0]), float(bar[2])) for bar in bars]
    logs = [math.log10(layer["aiwq"]) for layer in layers]
    assert affine_residual(logs, right) < tolerances.SVG_PIXELS
    expected = ["never" if layer["frozen_stage"] is None else f"stage{layer['frozen_stage']}" for layer in layers]
    assert [bar[4] for bar in bars] == expected
    assert {"stage1", "stage2", "never"} == set(expected)
    for text in ("frozen from stage 1 (S1)", "frozen from stage 2 (S2)", "not frozen in any stage", "#1  S1"):
        assert text in svg


def test_aiwq_of_zero_is_listed_without_a_bar(results):
    results["layers"][0]["aiwq"] = 0.0
    svg = figures.aiwq_bars(results["layers"]).svg
    assert ">0  #" in svg and results["layers"][0]["name"] in svg


def test_accuracy_dots_lie_where_the_numbers_are(results):
    phases = results["phases"]
    for i, phase in enumerate(phases):  # an error from 5 to 20 percent: a linear axis
        phase.update(accuracy=80 + 15 * ((7 * i) % 22) / 21, accuracy_ema=None)
    phases[4]["accuracy"] = math.nan
    phases[5]["accuracy"] = None
    marks = MARK.findall(figures.accuracy_by_phase(phases, None).svg)
    measured = [(i, phase["accuracy"]) for i, phase in enumerate(phases) if i not in (4, 5)]
    assert len(marks) == len(measured) + 1  # the last one is the legend's
    marks = marks[: len(measured)]
    assert affine_residual([v for _, v in measured], [float(x) for x, _ in marks]) < tolerances.SVG_PIXELS
    assert affine_residual([float(i) for i, _ in measured], [float(y) for _, y in marks]) < tolerances.SVG_PIXELS


def test_a_collapse_does_not_squeeze_the_good_phases(results):
    phases = results["phases"][:4]
    for phase, accuracy in zip(phases, (10.0, 90.0, 99.0, 99.5), strict=True):
        phase.update(accuracy=accuracy, accuracy_ema=None)
    places = [float(x) for x, _ in MARK.findall(figures.accuracy_by_phase(phases, None).svg)][:4]
    errors = [math.log10(error) for error in (90, 10, 1, 0.5)]
    assert places == sorted(places)
    assert affine_residual(errors, places) < tolerances.SVG_PIXELS


def test_sizes_without_accuracy_get_a_line_and_no_point(results):
    svg = figures.size_accuracy(results["sizes"]).svg
    assert len(MARK.findall(svg)) == sum(size["accuracy"] is not None for size in results["sizes"])
    assert all(f">{size['label']}</text>" in svg for size in results["sizes"])


def test_histogram_and_stems_are_densities_of_the_same_weights():
    # 8 weights on 3 levels a distance 1 apart; bins of width 1: stems and bars are equally high
    entry = {"edges": [-1.5, -0.5, 0.5, 1.5], "counts": [2, 4, 2], "grid": [-1.0, 0.0, 1.0], "code_counts": [2, 4, 2]}
    svg = figures.weight_histogram("layer", entry, "w").svg
    area = re.search(r'<path d="([^"]+)"[^>]*style="fill: var\(--hist\)', svg)[1]
    bars = {round(float(y), 3) for y in re.findall(r"[ML] \S+ (\S+)", area)}
    stems = [re.findall(r"[ML] (\S+) (\S+)", d) for d in re.findall(r'<path d="([^"]+)"[^>]*stroke: var\(--level\)', svg)]
    tops = {round(min(float(y) for _, y in stem), 3) for stem in stems if len({x for x, _ in stem}) == 1 and len(stem) == 2}
    assert len(tops) == 2 and tops < bars
    assert "8 weights of layer on 3 levels" in svg


@pytest.mark.parametrize("grid", [[], [0.0], [0.5, 0.5]])
def test_histogram_without_a_usable_grid_still_draws(grid):
    entry = {"edges": [0.0, 0.0, 1.0], "counts": [1, 1], "grid": grid, "code_counts": [1] * len(grid)}
    assert figures.weight_histogram("layer", entry, "w") is not None


def test_names_stay_short_plain_text():
    assert plain("a\x00b\nc\ud800") == "a\ufffdb\ufffdc\ufffd"
    assert len(plain("x" * 500)) == 42 and plain("ab" * 300, 12).startswith("ababa") and "…" in plain("ab" * 300, 12)


def _themes() -> list[dict[str, str]]:
    css = resources.files("profit.report").joinpath("templates/style.css.j2").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{([^}]*)\}", css)
    return [dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block)) for block in blocks]


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_from_the_page(theme):
    """WCAG 2.2: text 4.5 to 1 (1.4.3), graphics 3 to 1 (1.4.11)."""
    colours = _themes()[theme]
    assert set(COLOURS) <= set(colours)
    for page in ("page", "panel"):
        for text in ("ink", "muted", "link", "good", "warn"):
            assert _contrast(colours[text], colours[page]) >= 4.5, (text, page)
    for mark in set(COLOURS) - {"ink", "muted", "line", "band"}:
        assert _contrast(colours[mark], colours["page"]) >= 3, mark
