"""Test videos that need no file: frames drawn by a formula of their number.

    for frame in pattern("circle", frames=48, height=256, width=384, seed=3): ...

The same arguments give the same frames, and a longer clip begins like a shorter one. Importing this needs
neither torch nor numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final, Literal, get_args

from app.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Frame = NDArray[np.uint8]

Kind = Literal["circle", "rainbow", "gradients", "checkerboard", "noise", "text"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
LARGEST_SIDE: Final = 8192
LOOP: Final = 48  # frames after which a movement repeats
WORDS: Final = ("SEED", "POD", "latent", "0123", "video", "AaBbCc")


def pattern(kind: Kind, frames: int, height: int, width: int, seed: int = 0) -> Iterator[Frame]:
    """Frames (height, width, 3) uint8, one after the other.

    kind: circle (one moves on an ellipse), rainbow (hues drift by), gradients (three, each turning),
    checkerboard (drifts diagonally), noise (new on every frame), text (words pass).
    seed: 0 to 2^64 - 1; where it begins, and its colours.

    Raises:
        UsageError: `pattern_unknown`, `pattern_size`, before the first frame is asked for.
    """
    if kind not in _DRAWN:
        raise UsageError("pattern_unknown", f"The pattern is {kind!r}; expected one of {', '.join(KINDS)}.")
    if (
        frames < 1
        or not (1 <= height <= LARGEST_SIDE and 1 <= width <= LARGEST_SIDE)
        or not 0 <= seed < 2**64
    ):
        raise UsageError(
            "pattern_size",
            f"The pattern has {frames} frames of {height}x{width} and the seed {seed}; expected a frame or "
            f"more, sides of 1 to {LARGEST_SIDE} and a seed of 0 to 2^64 - 1.",
        )
    return (_DRAWN[kind](number, height, width, seed) for number in range(frames))


def _circle(number: int, height: int, width: int, seed: int) -> Frame:
    import numpy as np

    begin, hue = _drawn(seed, 2)
    turn = 2 * math.pi * (number / LOOP + begin)
    row, column = height * (0.5 + 0.3 * math.sin(turn)), width * (0.5 + 0.3 * math.cos(turn))
    rows, columns = np.ogrid[:height, :width]
    distance = np.hypot(rows + 0.5 - row, columns + 0.5 - column)
    inside = np.clip(0.15 * min(height, width) + 0.5 - distance, 0, 1)[..., None]  # an edge of one pixel
    return _bytes(inside * _hue(np.array(hue)) + (1 - inside) * np.array([0.1, 0.12, 0.18]))


def _rainbow(number: int, height: int, width: int, seed: int) -> Frame:
    import numpy as np

    (begin,) = _drawn(seed, 1)
    rows, columns = np.ogrid[:height, :width]
    return _bytes(_hue((columns / width + 0.25 * rows / height + number / LOOP + begin) % 1))


def _gradients(number: int, height: int, width: int, seed: int) -> Frame:
    import numpy as np

    rows, columns = np.ogrid[:height, :width]
    y, x = (rows + 0.5) / height - 0.5, (columns + 0.5) / width - 0.5
    signs = (1, -1, 2)
    turns = [2 * math.pi * (_drawn(seed, 3)[i] + signs[i] * number / LOOP) for i in range(3)]
    return _bytes(np.stack([0.5 + 0.7 * (x * math.cos(turn) + y * math.sin(turn)) for turn in turns], -1))


def _checkerboard(number: int, height: int, width: int, seed: int) -> Frame:
    import numpy as np

    begin, hue = _drawn(seed, 2)
    side = max(min(height, width) // 8, 1)
    offset = int(begin * 2 * side) + number * max(side // 8, 1)
    rows, columns = np.ogrid[:height, :width]
    light = ((rows + offset) // side + (columns + offset) // side) % 2
    return _bytes(np.where(light[..., None] == 1, _hue(np.array(hue)) * 0.3 + 0.7, 0.1))


def _noise(number: int, height: int, width: int, seed: int) -> Frame:
    import numpy as np

    bits = np.random.Philox(
        key=np.array([seed, 0], np.uint64), counter=np.array([0, 0, 0, number], np.uint64)
    )
    words = bits.random_raw(-(-height * width * 3 // 8))
    return words.astype("<u8").view(np.uint8)[: height * width * 3].reshape(height, width, 3)


def _text(number: int, height: int, width: int, seed: int) -> Frame:
    import numpy as np
    from PIL import Image, ImageDraw

    begins = _drawn(seed, 3)
    picture = Image.new("RGB", (width, height), (24, 26, 34))
    pen = ImageDraw.Draw(picture)
    size = max(height // 4, 6)
    for line, begin in enumerate(begins):
        word = WORDS[int(begin * len(WORDS))]
        length = pen.textlength(word, font_size=size)
        along = (begin + (1 if line % 2 == 0 else -1) * number / LOOP) % 1
        colour = tuple(int(255 * value) for value in _hue(np.array((begin + line / 3) % 1)))
        pen.text(
            (along * (width + length) - length, height * (line + 0.15) / 3), word, colour, font_size=size
        )
    return np.asarray(picture).copy()


_DRAWN: Mapping[Kind, Callable[[int, int, int, int], Frame]] = {
    "circle": _circle,
    "rainbow": _rainbow,
    "gradients": _gradients,
    "checkerboard": _checkerboard,
    "noise": _noise,
    "text": _text,
}


def _drawn(seed: int, count: int) -> list[float]:
    """Numbers in [0, 1) of a seed."""
    import numpy as np

    bits = np.random.Philox(key=np.array([seed, 1], np.uint64)).random_raw(count)
    return [int(word) / 2**64 for word in bits]


def _hue(hue: NDArray[np.float64]) -> NDArray[np.float64]:
    """Hues in [0, 1) as full colours, (..., 3) in [0, 1]."""
    import numpy as np

    colours: NDArray[np.float64] = np.abs((hue[..., None] * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    return np.clip(colours, 0, 1)


def _bytes(picture: NDArray[np.float64]) -> Frame:
    import numpy as np

    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
