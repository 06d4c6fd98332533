"""Kernel launches of a training step, counted without a GPU."""
