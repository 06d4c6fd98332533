"""The quantizers that PROFIT's paper compares DuQ with, by their name in `DuQConfig.quantizer`.

They share the interface, the calibration state and the two parameters `a`, `c` of the DuQ quantizers; what the parameters
hold, and which of them is used, stands with each class. They are written for reading, in plain PyTorch with autograd.
"""

from __future__ import annotations

from .lsq import LSQInput, LSQPlusInput, LSQPlusWeight, LSQWeight
from .pact import PACTInput, PACTWeight, pact_penalty
from .qil import QILInput, QILWeight
from .quantizer import InputQuantizer, WeightQuantizer

BASELINES: dict[str, tuple[type[InputQuantizer], type[WeightQuantizer]]] = {
    "pact": (PACTInput, PACTWeight),
    "qil": (QILInput, QILWeight),
    "lsq": (LSQInput, LSQWeight),
    "lsq+": (LSQPlusInput, LSQPlusWeight),
}

__all__ = [
    "BASELINES",
    "LSQInput",
    "LSQPlusInput",
    "LSQPlusWeight",
    "LSQWeight",
    "PACTInput",
    "PACTWeight",
    "QILInput",
    "QILWeight",
    "pact_penalty",
]
