"""BatchNorm, activation, DuQ and convolution as one operator that keeps the pre-BatchNorm tensor alone."""
