"""Frame rates as exact fractions: which constant rate a clip is read at.

Knows nothing of files.
"""

from __future__ import annotations

from fractions import Fraction

STANDARD_RATES = (
    Fraction(5),
    Fraction(10),
    Fraction(12),
    Fraction(15),
    Fraction(24000, 1001),
    Fraction(24),
    Fraction(25),
    Fraction(30000, 1001),
    Fraction(30),
    Fraction(48),
    Fraction(50),
    Fraction(60000, 1001),
    Fraction(60),
    Fraction(100),
    Fraction(120000, 1001),
    Fraction(120),
    Fraction(240),
)
_HIGHEST_NOMINAL = 120
_MOST_ABOVE_AVERAGE = 1.9
_SAME = 0.01
_SPOKEN = 2e-4
_ROUNDING = Fraction(1, 100_000)


def standard_rate(average: float) -> Fraction:
    """The lowest standard rate that is not below `average` by more than 1%: no picture is lost for long."""
    return next((rate for rate in STANDARD_RATES if rate >= average * (1 - _SAME)), STANDARD_RATES[-1])


SLOWEST = Fraction(1, 1001)


def exact_rate(rate: float) -> Fraction:
    """The rate a person means: 29.97 is 30000/1001, 23.98 is 24000/1001, 12.5 is 25/2; at least SLOWEST."""
    near = (standard for standard in STANDARD_RATES if abs(float(standard) / rate - 1) < _SPOKEN)
    return next(near, max(Fraction(rate).limit_denominator(1001), SLOWEST))


def is_constant(nominal: Fraction, average: float) -> bool:
    """Whether a clip that declares `nominal` and holds `average` frames a second has a constant rate."""
    return abs(float(nominal) / average - 1) <= _SAME


def constant_rate(nominal: Fraction, average: float) -> Fraction:
    """The constant rate to read a clip at; both in frames per second.

    A constant rate is kept exactly (19001/317, which Matroska's milliseconds make of 60000/1001, is
    taken for what it was). A variable one is read at its nominal rate (the coarsest grid its
    times fall on) while that is at most 120 and less than 1.9 times the average, so that no picture is
    dropped; a nominal rate far above the average says nothing but the container's clock, and the
    standard rate at or above the average is taken instead.
    """
    nominal = next((rate for rate in STANDARD_RATES if abs(nominal / rate - 1) < _ROUNDING), nominal)
    if is_constant(nominal, average):
        return nominal
    if 0 < nominal <= _HIGHEST_NOMINAL and float(nominal) < _MOST_ABOVE_AVERAGE * average:
        return nominal
    return standard_rate(average)
