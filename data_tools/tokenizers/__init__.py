"""Tokenizers trained, looked at and measured."""
