"""Train, inspect and measure tokenizers."""
