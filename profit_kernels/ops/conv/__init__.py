"""The quantized convolution: BatchNorm, activation, DuQ, padding with a value and the convolution (PROFIT, section 4.2)."""
