"""Damaged recipes, results, weights, checkpoints, exports and images: how the commands end."""
