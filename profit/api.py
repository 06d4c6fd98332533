# ruff: noqa: F401
"""The public names of `profit`, gathered; `profit` itself hands them on when one of them is first used."""

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
