from fractions import Fraction

import pytest

from app.video.rates import constant_rate, exact_rate, standard_rate


@pytest.mark.parametrize(
    ("average", "expected"),
    [
        (3.0, Fraction(5)),
        (23.976, Fraction(24000, 1001)),
        (24.0, Fraction(24000, 1001)),
        (24.5, Fraction(25)),
        (29.9, Fraction(30000, 1001)),
        (59.0, Fraction(60000, 1001)),
        (1000.0, Fraction(240)),
    ],
)
def test_standard_rate(average: float, expected: Fraction) -> None:
    assert standard_rate(average) == expected


@pytest.mark.parametrize(
    ("nominal", "average", "expected"),
    [
        (Fraction(30000, 1001), 29.97, Fraction(30000, 1001)),  # constant: exactly its own
        (Fraction(19001, 317), 59.94, Fraction(60000, 1001)),
        (Fraction(240), 240.0, Fraction(240)),
        (Fraction(17, 3), 5.67, Fraction(17, 3)),
        (Fraction(30), 29.5, Fraction(30)),  # a telephone's: the grid its frames fall on
        (Fraction(30000, 1001), 18.32, Fraction(30000, 1001)),
        (Fraction(60), 30.0, Fraction(30000, 1001)),  # the grid is twice as fine as the frames
        (Fraction(90000), 24.9, Fraction(25)),  # only the clock of the container
        (Fraction(0), 24.9, Fraction(25)),
        (Fraction(1000), 14.2, Fraction(15)),
    ],
)
def test_constant_rate(nominal: Fraction, average: float, expected: Fraction) -> None:
    assert constant_rate(nominal, average) == expected


@pytest.mark.parametrize(
    ("spoken", "expected"),
    [
        (29.97, Fraction(30000, 1001)),
        (23.976, Fraction(24000, 1001)),
        (23.98, Fraction(24000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (24, Fraction(24)),
        (30.0, Fraction(30)),
        (12.5, Fraction(25, 2)),
        (7.3, Fraction(73, 10)),
    ],
)
def test_exact_rate(spoken: float, expected: Fraction) -> None:
    assert exact_rate(spoken) == expected
