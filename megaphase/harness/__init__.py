"""Benchmarks by lm-evaluation-harness on a model in memory, with any number of processes."""
