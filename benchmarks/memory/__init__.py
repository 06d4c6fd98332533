"""Bytes kept for the backward, and the peak of a training step."""

MEASURES = True
