"""Artificial languages, for demo and tests: text that takes learning, without a download."""
