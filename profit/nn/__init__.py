"""Quantized layers and their quantizers."""

from .conv import QuantConv2d
from .layer import QuantLayer
from .linear import QuantLinear
from .quantizer import InputQuantizer, WeightQuantizer

__all__ = ["InputQuantizer", "QuantConv2d", "QuantLayer", "QuantLinear", "WeightQuantizer"]
