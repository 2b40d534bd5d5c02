"""`megaphase evaluate`: losses of a checkpoint, and benchmarks without an optimizer."""
