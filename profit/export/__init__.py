"""Exporting a trained network: packed files in true bit widths, ONNX, torch.export; and the proof that they are what was
trained. What each format holds is in docs/export.md."""

from .network import Layer, Network
from .onnx_export import OnnxSummary, export_onnx
from .packed import PackedSize, export_packed, load_packed_, read_packed
from .runtime import IntegerRuntime
from .torch_export import export_torch
from .trace import trace_network
from .verify import Verification, verify

__all__ = [
    "IntegerRuntime",
    "Layer",
    "Network",
    "OnnxSummary",
    "PackedSize",
    "Verification",
    "export_onnx",
    "export_packed",
    "export_torch",
    "load_packed_",
    "read_packed",
    "trace_network",
    "verify",
]
