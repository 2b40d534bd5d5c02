"""Corpora looked at, checked, joined, split and put in another order."""
