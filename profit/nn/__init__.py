"""Quantized layers and their quantizers."""

from .conv import QuantConv2d
from .deferred import DeferredBatchNorm
from .layer import QuantLayer
from .linear import QuantLinear
from .quantizer import InputQuantizer, WeightQuantizer

__all__ = ["DeferredBatchNorm", "InputQuantizer", "QuantConv2d", "QuantLayer", "QuantLinear", "WeightQuantizer"]
