"""How many frames a Wan clip may have. Torch-free: a request is refused before anything is loaded.

The first latent holds one frame, every other four. A distilled model makes three latents at a time: 12 n - 3
frames, 81 of them for n = 7, as it was trained. After an image, which is the first frame, come 12 n more;
after a clip, 12 n new ones. An undistilled model makes the whole clip at once: 4 n - 3 frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from app.errors import UsageError
from app.models.wan.config import TRAINED_BLOCK, TRAINED_FRAMES

Start = Literal["nothing", "image", "clip"]
FACTOR = 4  # frames of a latent, but for the first
GIVEN = TRAINED_FRAMES - TRAINED_BLOCK  # most latents of a clip to go on from: a window less a block


@dataclass(frozen=True)
class Length:
    """Latents that are given and made, and frames of the result; `block`: latents made at a time."""

    given: int
    made: int
    block: int
    frames: int

    @property
    def at_once(self) -> bool:
        """Whether nothing is left to be seen by a later block."""
        return self.block == self.given + self.made


def length(frames: int, start: Start, *, blocks: bool, given: int = 0, exact: bool = True) -> Length:
    """The length of a clip of `frames` frames, or where that is none and not `exact`, of the next longer.

    Args:
        blocks: Made block by block, not at once.
        given: Latents of the clip to go on from, a multiple of three.

    Raises:
        UsageError: `frames_not_blocks`, with the nearest lengths that are.
    """
    if not blocks:
        step, first, block = FACTOR, 1, 0
    else:
        step, block = TRAINED_BLOCK * FACTOR, TRAINED_BLOCK
        first = {"nothing": step - FACTOR + 1, "image": step + 1, "clip": step}[start]
    count = max(0, -(-(frames - first) // step))
    shown = first + count * step
    if exact and shown != frames:
        nearest = f"{shown - step} or {shown}" if shown - step >= first else str(shown)
        form = f"{step} n + {first % step}" if first % step else f"{step} n"
        raise UsageError(
            "frames_not_blocks",
            f"frames is {frames}, and a clip is made {'block by block' if blocks else 'at once'}: expected "
            f"{form} frames, such as {nearest}; or give seconds, and what is too much is cut off.",
        )
    made = TRAINED_BLOCK * (count + 1) if blocks else count + 1
    before = {"nothing": 0, "image": 1, "clip": given}[start]
    return Length(before, made, block or made, shown)


def latent_of(frame: int) -> int:
    """The latent that holds a frame, both counted from 0."""
    return -(-frame // FACTOR)


def usable(frames: int) -> int:
    """How many of a clip's last frames can be gone on from: whole blocks' worth, at most a window less a
    block; 0 if the clip is too short."""
    most = min(frames, FACTOR * GIVEN - FACTOR + 1)
    blocks = (most + FACTOR - 1) // (FACTOR * TRAINED_BLOCK)
    return max(0, FACTOR * TRAINED_BLOCK * blocks - FACTOR + 1)
