"""report.html from results.json: one file that needs nothing else, neither the network nor the model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from profit.errors import ProfitError
from profit.files import write_atomic
from profit.report import figures
from profit.report.formats import FILTERS, accuracy, size
from profit.report.results import RESULTS_NAME, finite, read_results

REPORT_NAME = "report.html"
_SHOWN_HISTOGRAMS = 12


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir`/report.html from `run_dir`/results.json and return its path.

    The page holds its style and its drawings; it opens without a network and carries no script. What the run did not
    reach, or did not measure, stands as a sentence in its place. The file is replaced in one step.

    Raises:
        ProfitError: results.json missing or malformed, matplotlib or jinja2 missing, the folder not writable.
    """
    html = render(read_results(run_dir))
    path = Path(run_dir) / REPORT_NAME
    try:
        write_atomic(path, html, follow=False)
    except ProfitError as error:
        raise ProfitError(f"{path} cannot be written: {str(error).rpartition(': ')[2]}") from None
    return path


def render(results: Mapping[str, Any]) -> str:
    """The page for results as `read_results` returns them."""
    try:
        import jinja2
        import matplotlib  # noqa: F401
        import yaml
    except ModuleNotFoundError as error:
        raise ProfitError(
            f"the report needs {error.name}, which is not installed: pip install 'profit-kernels[train]'"
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("profit.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    recipe = yaml.safe_dump(results["recipe"], sort_keys=False, allow_unicode=True) if results["recipe"] else ""
    page = {**results, **_headline(results), **_drawings(results), "recipe_text": recipe, "source": RESULTS_NAME}
    return environment.get_template("report.html.j2").render(page)


def _drawings(results: Mapping[str, Any]) -> dict[str, Any]:
    layers = _with_scores(results["layers"], results["aiwq"])
    histograms = _histograms(results["weights"], layers)
    return {
        "layers": layers,
        "stages": sorted({int(layer["frozen_stage"]) for layer in layers if finite(layer["frozen_stage"])}),
        "accuracy_chart": figures.accuracy_by_phase(results["phases"], results["final"]["accuracy_fp"]),
        "curves_chart": figures.training_curves(results["phases"]),
        "aiwq_chart": figures.aiwq_bars(layers),
        "sizes_chart": figures.size_accuracy(results["sizes"]),
        "histograms_shown": histograms[:_SHOWN_HISTOGRAMS],
        "histograms_more": histograms[_SHOWN_HISTOGRAMS:],
        "full_size": next((entry["bytes"] for entry in results["sizes"] if entry["bits"] == 32), None),
    }


def _with_scores(layers: Sequence[dict[str, Any]], aiwq: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Layers with a score: a run stopped right after sampling has scores that no layer row carries yet."""
    scores = {name: score for name, score in (aiwq["scores"] if aiwq else {}).items() if finite(score)}
    return [{**row, "aiwq": scores.get(row["name"]) if row["aiwq"] is None else row["aiwq"]} for row in layers]


def _histograms(weights: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One small drawing per layer, the most unstable layers first, then in network order."""
    rows = {layer["name"]: layer for layer in layers}
    order = sorted(weights, key=lambda name: -_score(rows.get(name)))
    drawings = []
    for index, name in enumerate(order):
        chart = figures.weight_histogram(name, weights[name], f"w{index}")
        if chart is not None:
            row = rows.get(name, {})
            unit = weights[name]["unit"]
            drawings.append({"name": name, "chart": chart, "unit": unit, "layer": row, "colour": _stage(row)})
    return drawings


def _score(layer: Mapping[str, Any] | None) -> float:
    return layer["aiwq"] if layer is not None and finite(layer["aiwq"]) else -1.0


def _stage(row: Mapping[str, Any]) -> str | None:
    return figures.stage_colour(row) if row and finite(row["frozen_stage"]) else None


def _headline(results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the first lines: what came out, against full precision, at which bits, at which size."""
    final, phases = results["final"], results["phases"]
    bits = phases[-1]["bits"] if phases else None
    label = f"Accuracy at {bits}" if bits else "Accuracy"
    cards = [(label, accuracy(final["accuracy"]), _difference(final, "accuracy"))]
    if finite(final["accuracy_ema"]):
        cards.append(("Accuracy, EMA model", accuracy(final["accuracy_ema"]), _difference(final, "accuracy_ema")))
    cards.append(("Full precision", accuracy(final["accuracy_fp"]), "same network, before quantization"))
    sizes = {entry["bits"]: entry["bytes"] for entry in results["sizes"] if finite(entry["bytes"])}
    width = phases[-1]["weight_bits"] if phases else None
    if width in sizes:
        note = f"weights packed; {size(sizes[32])} in float32" if 32 in sizes else "weights packed"
        cards.append(("Model size", size(sizes[width]), note))
    elif 32 in sizes:
        cards.append(("Model size", size(sizes[32]), "float32, not quantized yet"))
    return {"bits": bits, "cards": cards}


def _difference(final: Mapping[str, Any], key: str) -> str:
    if not finite(final[key]) or not finite(final["accuracy_fp"]):
        return "test set"
    return f"{final[key] - final['accuracy_fp']:+.2f} points from full precision".replace("-", "\u2212")
