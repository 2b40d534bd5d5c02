"""Sweeps: trials of several recipes over one budget, and the report that compares them."""
