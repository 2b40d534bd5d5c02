"""Extend the vocabulary of a model."""
