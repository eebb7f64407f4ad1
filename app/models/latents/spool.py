"""Clips of latents that can be read anywhere: on disk, or as a view of others.

Latents are small beside frames, so a whole clip of them is put into a file of its job's folder; memory does
not grow with the clip. Layout: (channels, latents, height, width) float32 where a clip or a part of one is a
tensor; in the file, latent after latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from app.errors import FileError, InputError
from app.video.place import failures_of

AT_ONCE: Final = 8  # latents; of 720p, 59 MB with 16 channels


class Latents(Protocol):
    """A clip of latents: `shape` is (channels, latents, height, width)."""

    @property
    def shape(self) -> tuple[int, int, int, int]: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Latents `start` to `stop`, (channels, stop - start, height, width) float32 on the CPU, a copy or
        not: not to be written to."""


@dataclass(frozen=True)
class View:
    """Latents that are computed when they are read."""

    shape: tuple[int, int, int, int]
    read: Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Spool:
    """Latents in a file that nobody else writes to."""

    path: Path
    shape: tuple[int, int, int, int]

    def read(self, start: int, stop: int) -> Tensor:
        channels, count, height, width = self.shape
        assert 0 <= start <= stop <= count, (start, stop, count)
        with failures_of(self.path):
            values = np.fromfile(
                self.path,
                np.float32,
                (stop - start) * channels * height * width,
                offset=4 * start * channels * height * width,
            )
        if values.size != (stop - start) * channels * height * width:
            raise FileError(
                "latents_truncated",
                f"The file of latents {self.path.name} is shorter than it was written; expected {count} "
                "latents: nothing may change a job's folder while it runs.",
            )
        latents = torch.from_numpy(values).view(stop - start, channels, height, width)
        return latents.transpose(0, 1)


def spool(path: Path, chunks: Iterable[Tensor]) -> Spool:
    """Write a clip of latents to `path` and give it for reading.

    chunks: (channels, n, height, width), of any lengths n, on any device; no more than one is held.

    Raises:
        InputError: `latents_not_finite`, `clip_empty`. FileError: `output_no_space`, `output_failed`.
    """
    count, sides = 0, None
    with failures_of(path), path.open("wb") as file:
        for chunk in chunks:
            channels, length, height, width = chunk.shape
            if sides not in (None, (channels, height, width)):
                raise ValueError(f"A chunk of latents is {tuple(chunk.shape)}, unlike those before it.")
            sides = channels, height, width
            if not torch.isfinite(chunk).all():
                raise InputError(
                    "latents_not_finite",
                    f"Among latents {count} to {count + length - 1} are values that are infinite or no "
                    "numbers; expected finite ones: weaken the edits of latents or weights, or run in "
                    "float32 (SEEDPOD_DTYPE=float32).",
                )
            values = chunk.detach().to("cpu", torch.float32).transpose(0, 1).contiguous()
            values.numpy().tofile(file)
            count += length
    if sides is None or not count:
        raise InputError("clip_empty", "The clip has no latents; expected one or more: give another file.")
    return Spool(path, (sides[0], count, sides[1], sides[2]))


def chunks(latents: Latents, size: int = AT_ONCE) -> Iterator[Tensor]:
    """A clip of latents in order, `size` at a time: what `Codec.decode` takes."""
    count = latents.shape[1]
    for start in range(0, count, size):
        yield latents.read(start, min(start + size, count))


def held(latents: Tensor) -> View:
    """A clip of latents that is in memory, (channels, latents, height, width)."""
    channels, count, height, width = latents.shape
    values = latents.detach().to("cpu", torch.float32)
    return View((channels, count, height, width), lambda start, stop: values[:, start:stop])


def held_to_length(latents: Latents, count: int) -> Latents:
    """A clip cut to `count` latents, or with its last one repeated."""
    channels, own, height, width = latents.shape
    if own == count:
        return latents

    def read(start: int, stop: int) -> Tensor:
        there = latents.read(min(start, own - 1), max(min(stop, own), min(start, own - 1) + 1))
        index = torch.arange(start, stop).clamp_(max=own - 1) - min(start, own - 1)
        return there[:, index]

    return View((channels, count, height, width), read)
