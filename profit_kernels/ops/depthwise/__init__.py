"""Depthwise convolution with a padding value, plain and with the activation quantizer in front (PROFIT, section 4.2)."""
