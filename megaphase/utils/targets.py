"""What stands in a row of targets besides token ids."""

IGNORED_TARGET = -100
"""No loss is taken where this is the target; torch's own default for `ignore_index`."""
