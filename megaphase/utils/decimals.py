"""Numbers of a run file as the decimal numbers that were written."""

from __future__ import annotations

from fractions import Fraction


def as_written(value: float) -> Fraction:
    """The decimal number that stands in a file, not the binary one nearest to it.

    2.32 is 58/25, so that 2.32 epochs of 50 samples are 116 samples. Every count or threshold that
    is computed from such a number is computed from this.
    """
    return Fraction(value) if isinstance(value, int) else Fraction(repr(float(value)))
