"""Exported networks: codes against the model, top-1, file sizes, latency under onnxruntime."""
