"""Clips side by side, under their names: what a person judges an autoencoder or an edit by.

    board = Board(["original", "reconstructed"], height, width)
    with VideoWriter(path, board.width, board.height, rate) as writer:
        for frame in side_by_side(board, [frames, others]):      # or board.frame([frame, other])
            writer.write(frame[None])

The sheet of moments of clips that are files is `app.video.sheet.write_sheet`. Frames here are (height,
width, 3) uint8; one of each clip is held at a time. Importing this needs neither numpy nor Pillow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Frame = NDArray[np.uint8]

GAP: Final = 4  # pixels between columns
GROUND, INK = (18, 20, 26), (240, 240, 240)


class Board:
    """Makes frames that show clips next to each other. `height` and `width` are those of its frames, even."""

    def __init__(self, names: Sequence[str], height: int, width: int) -> None:
        """height, width: what a clip's frames are shown at."""
        import numpy as np

        self._cell = height, width
        self._top = max(14, min(height // 12, 48))
        rows, columns = self._top + height, len(names) * (width + GAP) - GAP
        self.height, self.width = rows + rows % 2, columns + columns % 2
        self._ground = np.full((self.height, self.width, 3), GROUND, np.uint8)
        for i, name in enumerate(names):
            self._place(self._ground, i)[: self._top] = _label(name, self._top, width)

    def frame(self, frames: Sequence[Frame]) -> Frame:
        """One frame of each clip, in the order of the names; those of another size are resized."""
        shown = self._ground.copy()
        for i, frame in enumerate(frames):
            self._place(shown, i)[self._top : self._top + self._cell[0]] = _sized(frame, *self._cell)
        return shown

    def _place(self, board: Frame, column: int) -> Frame:
        left = column * (self._cell[1] + GAP)
        return board[:, left : left + self._cell[1]]


def side_by_side(board: Board, clips: Sequence[Iterable[Frame]]) -> Iterator[Frame]:
    """Frames of the board, as many as the longest clip has; one that is over holds its last frame. ValueError
    for a clip of no frames."""
    streams = [iter(clip) for clip in clips]
    held = [next(stream, None) for stream in streams]
    while True:
        shown = [frame for frame in held if frame is not None]
        if len(shown) < len(streams):
            raise ValueError("A clip of no frames cannot be shown beside others.")
        yield board.frame(shown)
        fresh = [next(stream, None) for stream in streams]
        if all(frame is None for frame in fresh):
            return
        held = [old if new is None else new for old, new in zip(held, fresh, strict=True)]


def differences(first: Iterable[Frame], second: Iterable[Frame], gain: float = 4.0) -> Iterator[Frame]:
    """How far two clips of one size are apart: mid-grey is equal, `gain` times the difference around it."""
    import numpy as np

    for one, other in zip(first, second, strict=False):
        apart = (other.astype(np.float32) - one) * gain
        yield np.round(np.clip(apart + 128, 0, 255)).astype(np.uint8)


def _label(text: str, height: int, width: int) -> Frame:
    """A name in a column's width, cut where it is longer; marks that do not print are left out."""
    import numpy as np
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (width, height), GROUND)
    printable = "".join(letter for letter in text[:200] if letter.isprintable())
    ImageDraw.Draw(picture).text((4, height / 2), printable, INK, font_size=int(height * 0.7), anchor="lm")
    return np.asarray(picture)


def _sized(frame: Frame, height: int, width: int) -> Frame:
    if frame.shape[:2] == (height, width):
        return frame
    import numpy as np
    from PIL import Image

    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
