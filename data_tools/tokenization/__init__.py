"""Tokenize text to corpora, on one machine or many."""
