"""Which quantizer represents the output of h-swish best (the paper's Figure 6)."""
