"""The plan: mixture, blend and sample index of all phases, and the batches read from them."""
