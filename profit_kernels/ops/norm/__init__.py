"""BatchNorm with the activation and the quantizer behind it: the input side of a layer."""
