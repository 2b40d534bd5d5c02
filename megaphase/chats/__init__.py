"""Conversations: rendered by a tokenizer's chat template, and marked where the assistant speaks."""
