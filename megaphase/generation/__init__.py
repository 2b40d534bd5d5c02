"""Generate text with a trained model: sampling, beam search, and scores of translations."""
