"""Clips of any size, orientation and length through a codec, and back to what they were.

    fit = Fit(720, 1281, codec.facts)                 # or Fit(..., how="resize")
    latents = codec.encode(fit.frames(frames))        # sides made multiples, the last frame repeated
    frames = fit.restore(codec.decode(latents))       # cut or resized back, the repeated frames dropped

Both ways go frame chunk by frame chunk: memory does not grow with the clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from app.errors import InputError, UsageError
from app.models.latents.codec import Facts

How = Literal["reflect", "edge", "resize"]
HOW: Final[tuple[str, ...]] = get_args(How)
LARGEST_SIDE = 16384


class Fit:
    """One clip's way into a codec and back.

    how: "reflect" (mirrored rows and columns below and to the right) and "edge" (the last ones repeated)
    leave every pixel as it is; "resize" scales both sides up to the next multiples, and back.

    `rows` and `columns` are the sides that the codec sees. `length` is how many frames of the clip have
    passed so far, `latent_count` how many latents they become.
    """

    def __init__(self, height: int, width: int, facts: Facts, how: How = "reflect") -> None:
        if how not in HOW:
            raise UsageError("fit_unknown", f"fit is {how!r}; expected one of {', '.join(HOW)}.")
        for name, side in (("height", height), ("width", width)):
            if not 1 <= side <= LARGEST_SIDE:
                raise InputError(
                    "size_invalid",
                    f"The clip's {name} is {side} pixels; expected 1 to {LARGEST_SIDE}: resize it first.",
                )
        self.height, self.width = height, width
        self.rows, self.columns = height + -height % facts.multiple, width + -width % facts.multiple
        self.facts = facts
        self.how = how
        self.length = 0

    @property
    def latent_count(self) -> int:
        """Latents of the frames that have passed, the last one's frames filled up."""
        return self.facts.latents_holding(self.length) if self.length else 0

    @property
    def latent_size(self) -> tuple[int, int]:
        """(height, width) of a latent."""
        return self.facts.latent_size(self.rows, self.columns)

    def frames(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """What the codec encodes, from chunks (n, 3, height, width) in [-1, 1]. Use once.

        Raises:
            InputError: `clip_empty`: no frame came.
        """
        assert not self.length, "a clip passes once"
        last: Tensor | None = None
        for chunk in frames:
            if chunk.shape[1:] != (3, self.height, self.width):
                raise ValueError(
                    f"The clip is {self.height}x{self.width}; got a chunk of {tuple(chunk.shape)}."
                )
            if not len(chunk):
                continue
            fitted = self._enlarge(chunk)
            self.length += len(chunk)
            last = fitted[-1:]
            yield fitted
        if last is None:
            raise InputError("clip_empty", "The clip has no frames; expected one or more: give another file.")
        missing = self.facts.frames_for(self.latent_count) - self.length
        for _ in range(missing):
            yield last

    def restore(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """The clip's own size and length again, from chunks (n, 3, rows, columns) as the codec decodes them.

        No more frames come back than went in: the clip must have passed `frames` as far as it is decoded,
        which a codec that reads it lazily also ensures. What was changed in time may be as long as it likes
        below that.
        """
        given = 0
        for chunk in frames:
            if chunk.shape[1:] != (3, self.rows, self.columns):
                raise ValueError(
                    f"The codec's frames are {self.rows}x{self.columns}; got a chunk of {tuple(chunk.shape)}."
                )
            own = chunk[: max(0, self.length - given)]
            given += len(own)
            if len(own):
                yield self._reduce(own)

    def _enlarge(self, chunk: Tensor) -> Tensor:
        if (self.rows, self.columns) == (self.height, self.width):
            return chunk
        if self.how == "resize":
            return resize(chunk, self.rows, self.columns)
        down, right = self.rows - self.height, self.columns - self.width
        if self.how == "reflect":
            # A side shorter than what is wanted is mirrored as often as it takes.
            while down or right:
                most = min(down, chunk.shape[2] - 1), min(right, chunk.shape[3] - 1)
                if not any(most):
                    break
                chunk = F.pad(chunk, (0, most[1], 0, most[0]), mode="reflect")
                down, right = down - most[0], right - most[1]
        return F.pad(chunk, (0, right, 0, down), mode="replicate") if down or right else chunk

    def _reduce(self, chunk: Tensor) -> Tensor:
        if self.how == "resize":
            return resize(chunk, self.height, self.width)
        return chunk[:, :, : self.height, : self.width]


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """(n, 3, h, w) in [-1, 1] -> (n, 3, height, width), clamped: an antialiased bicubic overshoots."""
    if frames.shape[-2:] == (height, width):
        return frames
    return F.interpolate(frames, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)
