"""Special values in rows of targets."""

IGNORED_TARGET = -100
"""Positions with this target have no loss; torch's default for `ignore_index`."""
