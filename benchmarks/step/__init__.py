"""A whole training step of a network."""

MEASURES = True
