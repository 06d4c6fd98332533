"""The report of a run: what to record of a model (collect) and the page made of it (html)."""

from profit.report.collect import collect_layers, model_sizes, weight_histograms
from profit.report.html import write_report

__all__ = ["collect_layers", "model_sizes", "weight_histograms", "write_report"]
