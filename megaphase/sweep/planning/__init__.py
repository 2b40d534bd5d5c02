"""Planning a sweep: its cost, the settings that fit a budget, and pruning by successive halving."""
