"""PROFIT: progressive-freezing iterative training of mobile networks at 4 bits and below (Park & Yoo, ECCV 2020).

Convert a model, calibrate it, train it in phases; each part works alone in any training loop:

    profit.quantize_(model, profit.DuQConfig(weight_bits=4, act_bits=4), example_inputs=(images,))
    profit.calibrate_(model, loader, batches=8)

Importing this package needs torch and numpy, compiles nothing and touches no GPU.
"""

from .aiwq import AIWQMonitor
from .authors import load_authors_checkpoint
from .blocks import unfuse_
from .bn import reestimate_bn_
from .calibrate import calibrate_
from .config import DuQConfig
from .errors import (
    CalibrationError,
    CheckpointError,
    ConversionError,
    DataError,
    ExportError,
    ProfitError,
    RecipeError,
    TrainingError,
)
from .export import (
    IntegerRuntime,
    export_onnx,
    export_packed,
    export_torch,
    load_packed_,
    read_packed,
    verify,
)
from .freezing import ProgressiveFreezer, freeze_all
from .nn import QuantConv2d, QuantLinear
from .optim import param_groups
from .quantize import layer_table, quant_layers, quantize_, set_bits
from .schedule import Phase, PhaseSchedule
from .state import apply_quantization_state_, quantization_state
from .table import LayerRow, LayerTable

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
