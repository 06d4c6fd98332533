"""Accuracy on the digits, five folds: W4A4, W3A3, W2A2 with and without PROFIT, calibration alone."""
