"""Text from a trained model: sampling, beam search, and scores of translations."""
