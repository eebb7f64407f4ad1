"""Where the shots of a clip begin and end: hard cuts, found in one cheap pass over small frames.

Consecutive frames are compared at 64 pixels; a cut is a difference that stands out from its
neighbourhood (so that pans, shakes and noise do not count) and does not go back within a few frames (so
that flashes do not). Dissolves and fades are no cuts: nothing jumps there. Memory is a few numbers a
frame. The pass goes through `read_frames`, so its count of frames is exactly what a second pass with the
same rate gives. Knows nothing of models.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.video.probe import ClipInfo
from app.video.read import read_frames

if TYPE_CHECKING:
    from numpy.typing import NDArray

LONG_SIDE = 64
BLACK = 0.06  # below this, of 1, a bar is black
BACK = 5  # a frame is compared with this many before it: a flash of up to 3 frames is seen to go back
WINDOW = 10  # neighbours on each side that a cut must stand out from
# A cut is a distance above FLOOR + RATIO times what is usual around it, not more than REST of the way up
# from there to 1, and more than 1 / RETURN times the distance of the frames a little further on or back.
FLOOR, RATIO, REST, RETURN = 0.12, 2.0, 0.6, 0.6
SHORTEST = 4  # frames of a shot


@dataclass(frozen=True)
class Shot:
    """Frames start <= i < stop of a clip."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def find_shots(
    path: Path,
    info: ClipInfo,
    *,
    rate: Fraction | None = None,
    warn: Callable[[str], None] | None = None,
    on_frame: Callable[[], None] = lambda: None,
) -> list[Shot]:
    """The shots of a clip read at `rate`, in order, without gaps; their lengths sum to its frames.

    This pass reads to the very end: damage is found here. `warn` and errors as in `read_frames`; `on_frame`
    is called for each frame and may raise to stop.
    """
    scale = LONG_SIDE / max(info.width, info.height)
    size = max(1, round(info.height * scale)), max(1, round(info.width * scale))
    with closing(read_frames(path, info, rate=rate, size=size, warn=warn)) as frames:
        return shots_of(_told(frames, on_frame))


def _told(frames: Iterable[NDArray[Any]], on_frame: Callable[[], None]) -> Iterator[NDArray[Any]]:
    for frame in frames:
        on_frame()
        yield frame


def shots_of(frames: Iterable[NDArray[Any]]) -> list[Shot]:
    """The shots of small frames, each (height, width, 3) uint8."""
    distances = measure(frames)
    count = len(distances) // BACK
    edges = [0, *cuts(distances), count]
    return [Shot(start, stop) for start, stop in pairwise(edges)]


def measure(frames: Iterable[NDArray[Any]]) -> array[float]:
    """For each frame its distances to the 1st, ..., 5th frame before it, flat; 0 before the beginning."""
    import numpy as np

    earlier: deque[NDArray[Any]] = deque(maxlen=BACK)
    distances = array("f")
    for frame in frames:
        small = frame.astype(np.float32) / np.float32(255)
        distances.extend(distance(small, other) for other in earlier)
        distances.extend([0.0] * (BACK - len(earlier)))
        earlier.appendleft(small)
    return distances


def distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    """How different two pictures (height, width, 3) in [0, 1] are, in [0, 1]; a jolt of the camera is little.

    Where they differ much, one is first shifted to lie best on the other, and only what both show counts.
    """
    a, b = _without_bars(a, b)
    plain = _difference(a, b)
    if plain < FLOOR:
        return plain
    down, right = _shift(a, b)
    if (down, right) == (0, 0):
        return plain
    return min(plain, _difference(_overlap(a, down, right), _overlap(b, -down, -right)))


def _without_bars(a: NDArray[Any], b: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both without the black bars they share at the edges, which would be taken for likeness."""
    import numpy as np

    bright = np.maximum(a, b).max(-1) > BLACK
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    if not len(rows):
        return a, b
    inside = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return a[inside], b[inside]


def _difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Half of it is the mean absolute difference (full at 0.2), half the structural one.

    Structural: the difference of the pictures without their means, relative to their contrast: 0 for the
    same picture however bright, 1 for unrelated ones, dark or bright; small contrast counts for little.
    """
    import numpy as np

    plain = float(np.abs(a - b).mean()) / 0.2
    a0, b0 = a - a.mean((0, 1)), b - b.mean((0, 1))
    energy = float((a0 * a0).mean() + (b0 * b0).mean())
    structural = float(((a0 - b0) ** 2).mean()) / (energy + 1e-3)
    return 0.5 * min(1.0, plain) + 0.5 * min(1.0, structural)


def _shift(a: NDArray[Any], b: NDArray[Any]) -> tuple[int, int]:
    """(down, right): how far `a` lies from `b`, at most a quarter of each side, by cross-correlation."""
    import numpy as np

    height, width = a.shape[:2]
    grey_a, grey_b = a.mean(-1), b.mean(-1)
    size = 2 * height, 2 * width
    spectrum = np.fft.rfft2(grey_a - grey_a.mean(), size)
    spectrum *= np.conj(np.fft.rfft2(grey_b - grey_b.mean(), size))
    likeness = np.fft.irfft2(spectrum, size)
    downs = np.arange(-(height // 4), height // 4 + 1)
    rights = np.arange(-(width // 4), width // 4 + 1)
    common = np.outer(height - np.abs(downs), width - np.abs(rights))
    best = int(np.argmax(likeness[np.ix_(downs, rights)] / common))
    return int(downs[best // len(rights)]), int(rights[best % len(rights)])


def _overlap(picture: NDArray[Any], down: int, right: int) -> NDArray[Any]:
    """The part that is still there when the picture has moved by (down, right) on."""
    height, width = picture.shape[:2]
    return picture[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)]


def cuts(distances: Sequence[float]) -> list[int]:
    """The frames that begin a new shot, from what `measure` gives."""
    count = len(distances) // BACK
    steps = distances[::BACK]
    found: list[int] = []
    for i in range(1, count):
        if steps[i] < FLOOR or not _stands_out(steps, i) or _goes_back(distances, i, count):
            continue
        if found and i - found[-1] < SHORTEST:
            if steps[i] > steps[found[-1]]:
                found[-1] = i
        elif i >= SHORTEST and count - i >= SHORTEST:
            found.append(i)
    return found


def _stands_out(steps: Sequence[float], i: int) -> bool:
    """Whether step `i` is far above its neighbours, of which two may be cuts themselves."""
    around = sorted([*steps[max(1, i - WINDOW) : i], *steps[i + 1 : i + 1 + WINDOW]], reverse=True)
    usual = around[min(2, len(around) // 4)] if around else 0.0
    # distances end at 1: where all are large, most of what is left above them has to do
    return steps[i] > min(FLOOR + RATIO * usual, usual + REST * (1 - usual))


def _goes_back(distances: Sequence[float], i: int, count: int) -> bool:
    """Whether the picture before frame `i` comes back soon after, or frame `i` was there shortly before."""
    ahead = [distances[(i + k) * BACK + k] for k in range(1, BACK) if i + k < count]
    behind = [distances[i * BACK + k] for k in range(1, BACK) if i - 1 - k >= 0]
    return min([*ahead, *behind], default=1.0) < RETURN * distances[i * BACK]
