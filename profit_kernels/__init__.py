"""Fused operators for training sub-4-bit networks with PROFIT (Park & Yoo, ECCV 2020).

Importing this package compiles nothing, loads no native library and touches no GPU.
"""

from .dispatch import BackendError, available_backends, set_backend, use_backend
from .ops.aiwq.op import (
    aiwq_conv2d,
    aiwq_conv2d_moments,
    aiwq_kl,
    quantized_conv2d_kl,
    quantized_conv2d_moments,
)
from .ops.aiwq.pooled import kl_of_pooled, pool_moments
from .ops.conv.op import block_conv2d, depthwise_conv2d, duq_conv2d, duq_depthwise_conv2d, quantized_conv2d
from .ops.duq.op import duq_codes, duq_fake_quantize, duq_fake_quantize_weights
from .ops.norm.op import batch_norm_act, block_batch_norm

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "aiwq_conv2d",
    "aiwq_conv2d_moments",
    "aiwq_kl",
    "available_backends",
    "batch_norm_act",
    "block_batch_norm",
    "block_conv2d",
    "depthwise_conv2d",
    "duq_codes",
    "duq_conv2d",
    "duq_depthwise_conv2d",
    "duq_fake_quantize",
    "duq_fake_quantize_weights",
    "kl_of_pooled",
    "pool_moments",
    "quantized_conv2d",
    "quantized_conv2d_kl",
    "quantized_conv2d_moments",
    "set_backend",
    "use_backend",
]
