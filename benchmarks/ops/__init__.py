"""The operators, forward and backward, on the layer shapes of the networks."""

MEASURES = True
