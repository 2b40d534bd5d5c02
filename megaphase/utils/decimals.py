"""Read numbers of a run file as the decimal numbers that were written."""

from __future__ import annotations

from fractions import Fraction


def as_written(value: float) -> Fraction:
    """Return the decimal number that was written in a file, not the nearest binary one.

    2.32 becomes 58/25, so that 2.32 epochs of 50 samples are 116 samples. Every count and
    threshold that is derived from such a number is computed with it.
    """
    return Fraction(value) if isinstance(value, int) else Fraction(repr(float(value)))
