from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest

from app.errors import UsageError
from app.models.latents.patterns import KINDS, Kind, pattern


@pytest.mark.parametrize("kind", KINDS)
def test_a_pattern_moves_and_is_the_same_every_time(kind: Kind) -> None:
    frames = list(pattern(kind, 12, 40, 64, 3))
    assert all(frame.shape == (40, 64, 3) and frame.dtype == np.uint8 for frame in frames)
    assert all(np.array_equal(a, b) for a, b in zip(frames, pattern(kind, 30, 40, 64, 3), strict=False))
    assert not any(np.array_equal(a, b) for a, b in itertools.pairwise(frames))
    assert not np.array_equal(frames[0], next(pattern(kind, 1, 40, 64, 4)))
    assert frames[0].std() > 10  # a picture, not one colour


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (17, 31)])
def test_any_size_and_orientation(kind: Kind, size: tuple[int, int]) -> None:
    assert [frame.shape for frame in pattern(kind, 2, *size)] == [(*size, 3)] * 2


def test_noise_is_uniform_and_the_same_on_every_machine() -> None:
    (frame,) = pattern("noise", 1, 64, 64, 0)
    assert 126 < frame.mean() < 129
    assert hashlib.sha256(frame.tobytes()).hexdigest()[:16] == "4e0bcdbd087d80de"


def test_the_circle_is_where_its_formula_says() -> None:
    for frame in pattern("circle", 5, 96, 96, 1):
        bright = frame.max(-1) > 128
        assert bright.sum() == pytest.approx(np.pi * (0.15 * 96) ** 2, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("plasma", 1, 8, 8), "pattern_unknown"),
        (("noise", 0, 8, 8), "pattern_size"),
        (("noise", 1, 0, 8), "pattern_size"),
        (("noise", 1, 8, 100_000), "pattern_size"),
        (("noise", 1, 8, 8, -1), "pattern_size"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: tuple[Kind, int, int, int], code: str) -> None:
    with pytest.raises(UsageError) as refused:
        pattern(*arguments)
    assert refused.value.code == code
