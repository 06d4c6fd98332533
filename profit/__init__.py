# ruff: noqa: F405
"""PROFIT: progressive-freezing iterative training of mobile networks at 4 bits and below (Park & Yoo, ECCV 2020).

Convert a model, calibrate it, train it in phases; each part works alone in any training loop:

    profit.quantize_(model, profit.DuQConfig(weight_bits=4, act_bits=4), example_inputs=(images,))
    profit.calibrate_(model, loader, batches=8)

Importing this package is instant; the first use of one of its names imports torch and numpy.
Neither compiles anything or touches a GPU.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # as of typing, whose import is the longest part of this one's
if TYPE_CHECKING:
    from typing import Any

    from .api import *  # noqa: F403

__all__ = [
    "AIWQMonitor",
    "CalibrationError",
    "CheckpointError",
    "ConversionError",
    "DataError",
    "DuQConfig",
    "ExportError",
    "IntegerRuntime",
    "LayerRow",
    "LayerTable",
    "Phase",
    "PhaseSchedule",
    "ProfitError",
    "ProgressiveFreezer",
    "QuantConv2d",
    "QuantLinear",
    "RecipeError",
    "TrainingError",
    "apply_quantization_state_",
    "calibrate_",
    "export_onnx",
    "export_packed",
    "export_torch",
    "freeze_all",
    "layer_table",
    "load_authors_checkpoint",
    "load_packed_",
    "param_groups",
    "quant_layers",
    "quantization_state",
    "quantize_",
    "read_packed",
    "reestimate_bn_",
    "set_bits",
    "unfuse_",
    "verify",
]


def __getattr__(name: str) -> Any:
    """A public name, or a module that stands behind one; the command line answers `--help` before torch is loaded."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    api = import_module(".api", __name__)

    if name in __all__:
        return globals().setdefault(name, getattr(api, name))
    if name in globals():  # a submodule, which the import above has set
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
