"""Synthetic languages for the demo and tests: learnable text that needs no download."""
