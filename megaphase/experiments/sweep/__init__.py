"""Arms of runs over one model, its corpora and one budget: which there are, and their start."""
