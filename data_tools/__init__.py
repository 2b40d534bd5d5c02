"""Offline tools that train tokenizers on raw text and build tokenized corpora."""
