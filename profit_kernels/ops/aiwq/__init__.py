"""AIWQ, activation instability induced by weight quantization: per-channel Gaussian KL (PROFIT, section 3.2)."""
