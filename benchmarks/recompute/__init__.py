"""What computing the quantized input of pointwise layers anew costs in a backward, beside writing it."""

MEASURES = True
