"""Offline programs: from raw text to a tokenizer and to tokenized corpora."""
