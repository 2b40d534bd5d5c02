"""megaphase: train GPT language models on many languages in phases."""

__version__ = "0.1.0"
