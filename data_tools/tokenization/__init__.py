"""Text to corpora, on one machine or many."""
