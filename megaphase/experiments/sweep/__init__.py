"""Arms of runs over one model, its corpora and one budget: which runs there are; who starts them."""
