"""A CSV and a picture of every JSON file of a measuring suite.

Per case one panel of horizontal bars, a bar per variant: the median with the 20th and 80th percentile, the floor as a line; of
the suite memory the bytes instead. Of the operators the picture shows forward + backward; the CSV has every row.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from profit.files import write_atomic

from .. import measuring
from ..harness.options import refuse
from ..harness.place import RESULTS
from ..harness.rows import OK, Row

SUITES = measuring()
# Width in inches as a README shows it at 100 dpi, and panels of one picture: more go into further ones.
WIDTH, PER_PICTURE = 9.0, 16
BAR_INCHES, PANEL_INCHES = 0.19, 0.75
TITLE_CHARACTERS = 60
OURS, REFERENCE, FLOAT, OTHER = "#1b6ca8", "#8a8a8a", "#d08a2e", "#6b4e9b"


@dataclass(frozen=True)
class Measure:
    """A quantity of a row: its value and its spread in the unit of `label`, None where the row has none."""

    label: str
    value: Callable[[Row], float | None]
    spread: Callable[[Row], tuple[float, float] | None]
    floor: Callable[[Row], float | None]


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _times(row: Row) -> tuple[float, float] | None:
    return None if row.p20_s is None else (row.p20_s * 1e3, row.p80_s * 1e3)


TIME = Measure("ms", lambda row: _scaled(row.median_s, 1e3), _times, lambda row: _scaled(row.floor_s, 1e3))
KEPT = Measure("MB kept for the backward", lambda row: _scaled(row.kept_bytes, 1e-6), lambda _: None, lambda _: None)
PEAK = Measure("MB at the peak of a step", lambda row: _scaled(row.peak_bytes, 1e-6), lambda _: None, lambda _: None)


@dataclass(frozen=True)
class Panel:
    """One case in one measure."""

    title: str
    measure: Measure
    rows: tuple[Row, ...]


def panels(content: dict[str, Any]) -> list[Panel]:
    """The panels of a suite's JSON, in the order of its cases. Copies are the floor's, not a variant."""
    rows = [Row(**row) for row in content["rows"]]
    shown = [row for row in rows if row.variant != "copy" and row.direction in ("step", "forward+backward", "forward")]
    cases: dict[str, list[Row]] = {}
    for row in shown:
        cases.setdefault(row.case, []).append(row)
    found = []
    for case, of_case in cases.items():
        if any(row.direction == "forward+backward" for row in of_case):
            of_case = [row for row in of_case if row.direction == "forward+backward"]
        measures = (KEPT, PEAK) if content["suite"] == "memory" else (TIME,)
        found += [Panel(case, measure, tuple(of_case)) for measure in measures]
    return found


def colour(variant: str) -> str:
    """By what a variant is: ours, the reference, full precision, another library."""
    for start, found in (("reference", REFERENCE), ("float", FLOAT), ("torch", OTHER), ("brevitas", OTHER), ("conv-kl", OTHER)):
        if variant.startswith(start):
            return found
    return OURS


def _label(row: Row, value: float | None) -> str:
    return row.status if value is None and row.status != OK else "no figure" if value is None else f"{value:.4g}"


def draw_panel(axes, panel: Panel) -> None:
    """The bars of one case; a variant without figure says why it has none in a word."""
    values = [panel.measure.value(row) if row.status == OK else None for row in panel.rows]
    ends = []
    for i, (row, value) in enumerate(zip(panel.rows, values, strict=True)):
        spread = panel.measure.spread(row)
        ends.append(0.0 if value is None else spread[1] if spread else value)
        if value is not None:
            axes.barh(i, value, height=0.72, color=colour(row.variant))
            if spread:
                axes.errorbar(value, i, xerr=[[value - spread[0]], [spread[1] - value]], color="black", capsize=2, lw=0.8)
        axes.annotate(_label(row, value), (ends[-1], i), (4, 0), textcoords="offset points", va="center", fontsize=7)
    floors = [panel.measure.floor(row) for row in panel.rows if panel.measure.floor(row) is not None]
    if floors:
        axes.axvline(floors[0], color="crimson", lw=1.0, ls="--")
        axes.set_xlabel(f"{panel.measure.label} (dashed: floor, {floors[0]:.3g})", fontsize=7)
    else:
        axes.set_xlabel(panel.measure.label, fontsize=7)
    axes.set_yticks(range(len(panel.rows)), [row.variant for row in panel.rows], fontsize=7)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlim(0, (max(ends + floors) or 1.0) * 1.22)  # room for the figures behind the bars
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(textwrap.fill(panel.title, TITLE_CHARACTERS), fontsize=8, loc="left")


def picture(shown: Sequence[Panel], heading: str, path: Path) -> None:
    """Draw panels two abreast into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = [shown[i : i + 2] for i in range(0, len(shown), 2)]
    heights = [PANEL_INCHES + BAR_INCHES * max(len(panel.rows) for panel in pair) for pair in pairs]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(pairs), min(len(shown), 2), height_ratios=heights)
    for i, pair in enumerate(pairs):
        for j, panel in enumerate(pair):
            draw_panel(figure.add_subplot(grid[i, j]), panel)
    figure.suptitle(textwrap.fill(heading, 130), fontsize=8, x=0.01, ha="left")
    content = io.BytesIO()
    figure.savefig(content, bbox_inches="tight", metadata={"Software": None}, format="png")
    write_atomic(path, content.getvalue())


def write_csv(content: dict[str, Any], path: Path) -> None:
    """Every row of the JSON, one line each."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(content["rows"])
    write_atomic(path, out.getvalue())


def plot(path: Path, content: dict[str, Any]) -> list[Path]:
    """Write <name>.csv and <name>.png (<name>-2.png, ... where there are many cases) next to `path`; what was written."""
    written = [path.with_suffix(".csv")]
    write_csv(content, written[0])
    found = panels(content)
    heading = f"{content['suite']}: {content['device']}, threads: {content['threads']}, commit {content['commit']}"
    pages = [found[i : i + PER_PICTURE] for i in range(0, len(found), PER_PICTURE)]
    for number, page in enumerate(pages, 1):
        written.append(path.with_name(f"{path.stem}{f'-{number}' if number > 1 else ''}.png"))
        of = f" ({number} of {len(pages)})" if len(pages) > 1 else ""
        picture(page, heading + of, written[-1])
    return written


def read(path: Path) -> dict[str, Any]:
    """The content of a JSON file of a measuring suite. Raises ValueError, in one line, if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict) or content.get("suite") not in SUITES:
        raise ValueError(f"{path} is not the JSON of one of the suites {', '.join(SUITES)}")
    unknown = {key for row in content.get("rows", ()) for key in row} - {field.name for field in fields(Row)}
    missing = [key for key in ("rows", "device", "threads", "commit") if key not in content]
    if unknown or missing:
        what = f"the unknown column {min(unknown)!r}" if unknown else f"no {missing[0]!r}"
        raise ValueError(f"{path} has {what}; measure again with this version")
    return content


def main(argv: Sequence[str]) -> int:
    """Command line: 0, or 2 for a file that is not a suite's JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.json", help="default: those in benchmarks/results")
    given = parser.parse_args(argv)
    if importlib.util.find_spec("matplotlib") is None:
        return refuse("plot needs matplotlib: pip install 'profit-kernels[train]'")
    contents = {}
    for path in given.files or sorted(RESULTS.rglob("*.json")):
        try:
            contents[path] = read(path)
        except ValueError as problem:
            if given.files:
                return refuse(str(problem))
    if not contents:
        return refuse(f"nothing to plot: {RESULTS} holds no JSON of the suites {', '.join(SUITES)}")
    for path, content in contents.items():
        print("wrote", *plot(path, content))
    return 0
