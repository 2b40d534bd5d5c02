"""Continue token sequences with a GPT: a batch with cached keys, sampling and beam search."""
