"""Quantized layers and their quantizers."""

from .conv import QuantConv2d
from .deferred import BatchNormAct, DeferredBatchNorm, StandIn
from .layer import QuantLayer
from .linear import QuantLinear
from .quantizer import InputQuantizer, WeightQuantizer

__all__ = [
    "BatchNormAct",
    "DeferredBatchNorm",
    "InputQuantizer",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "StandIn",
    "WeightQuantizer",
]
