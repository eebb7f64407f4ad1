"""A clip through the VAE with whole frames or in tiles of them, whose memory does not grow with the picture.

Only the outer parts of the VAE, which hold nearly all of its memory and whose layers see no further than
their kernels, pass in tiles; the middle, in which every position sees its whole frame, passes whole. Tiles
share `OVERLAP` latents, over which they are cross-faded. They are not what whole frames give: beside the
zeros at a tile's edge, whose trace the fade leaves out, each normalisation takes the mean and deviation of
its tile.

In time nothing changes: a run of slices passes tile by tile, and what a tile's convolutions remember waits
in the host's memory for the next run. Knows nothing of windows, of colours or of how much memory there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from app.models.seedvr2.segment import Span, spans
from app.models.seedvr2.vae import VideoVAE
from app.nn.causal_conv import CausalState

OVERLAP: Final = 8  # latents that neighbouring tiles share
EDGE: Final = 2  # of them those at a tile's own edge that do not count
SMALLEST: Final = 4 * OVERLAP  # latents of a tile's side
HOST: Final = torch.device("cpu")

Half = Callable[[Tensor, CausalState], Tensor]


class Whole:
    """One clip of so many latents through the VAE, encoded or decoded, whole frames of each slice."""

    def __init__(self, vae: VideoVAE, latents: int) -> None:
        self.vae = vae
        self.left = latents
        self.state = vae.new_state()

    def encode(self, clips: Sequence[Tensor], on_step: Callable[[], None]) -> list[Tensor]:
        """Slices of frames, as `VideoVAE.encode_slice` takes them, to posterior means."""
        factor = self.vae.config.temporal_factor
        return [self.vae.encode_slice(clip, self._next(clip, factor, on_step)) for clip in clips]

    def decode(self, latents: Sequence[Tensor], on_step: Callable[[], None]) -> list[Tensor]:
        """Slices of latents, as `VideoVAE.decode_slice` takes them, to frames."""
        return [self.vae.decode_slice(z, self._next(z, 1, on_step)) for z in latents]

    def _next(self, part: Tensor, factor: int, on_step: Callable[[], None]) -> CausalState:
        on_step()
        self.left -= held(part, factor)
        if not self.left:
            self.state.end()  # gigabytes at full size
        return self.state


class Tiled:
    """As `Whole`, in tiles of at most `side` latents in height and in width; runs of slices are given and
    come back in the host's memory."""

    def __init__(self, vae: VideoVAE, latents: int, height: int, width: int, side: int) -> None:
        """height, width: of the clip, in latents."""
        self.vae = vae
        self.left = latents
        self.middle = vae.new_state()
        self.tiles = tiles(height, width, side)
        self.states = [Parked() for _ in self.tiles]
        self.size = height, width

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    def encode(self, clips: Sequence[Tensor], on_step: Callable[[], None]) -> list[Tensor]:
        config = self.vae.config
        self.left -= sum(held(clip, config.temporal_factor) for clip in clips)
        features = self._outer(self.vae.encoder.features, clips, config.spatial_factor, 1, on_step)
        means = []
        for whole in features:
            parameters = self.vae.encoder.parameters_of(whole.to(self.device), self.middle)
            means.append(parameters[:, : config.latent_channels])
        return means

    def decode(self, latents: Sequence[Tensor], on_step: Callable[[], None]) -> list[Tensor]:
        for z in latents:
            self.vae.config.check_latents(z, self.vae.config.latent_channels)
        self.left -= sum(held(z, 1) for z in latents)
        features = [self.vae.decoder.features(z.to(self.device), self.middle).to(HOST) for z in latents]
        return self._outer(self.vae.decoder.frames_of, features, 1, self.vae.config.spatial_factor, on_step)

    def _outer(
        self, half: Half, slices: Sequence[Tensor], into: int, out: int, on_step: Callable[[], None]
    ) -> list[Tensor]:
        """A run of slices through one half, tile by tile. `into`, `out`: positions per latent, of its input
        and of its output."""
        made: list[Tensor] = []
        for tile, state in zip(self.tiles, self.states, strict=True):
            state.move(self.device)
            for number, whole in enumerate(slices):
                on_step()
                if not self.left and number == len(slices) - 1:
                    state.end()
                part = half(tile.of(whole, into).to(self.device), state)
                if number == len(made):
                    size = *part.shape[:3], *(side * out for side in self.size)
                    made.append(torch.zeros(size, dtype=part.dtype))
                tile.of(made[number], out).add_((part * tile.weight(out, part)).to(HOST))
            state.move(HOST)
        return made


def held(part: Tensor, factor: int) -> int:
    """Latents that a slice of frames or latents (batch, channels, n, height, width) stands for."""
    return -(-part.shape[2] // factor)


class Parked(CausalState):
    """What convolutions remember, which can wait elsewhere."""

    def move(self, device: torch.device) -> None:
        self._tails = {conv: tail.to(device) for conv, tail in self._tails.items()}


@dataclass(frozen=True)
class Tile:
    """A rectangle of a frame of `height` x `width`, all in latents."""

    rows: Span
    columns: Span
    height: int
    width: int

    def of(self, x: Tensor, unit: int) -> Tensor:
        """The tile of (..., height, width), `unit` positions per latent: a view."""
        rows, columns = self.rows, self.columns
        return x[..., rows.start * unit : rows.stop * unit, columns.start * unit : columns.stop * unit]

    def weight(self, unit: int, like: Tensor) -> Tensor:
        """How much each of its positions counts, (rows, columns), `unit` of them per latent. Over all tiles
        of the frame they add up to 1."""
        rows, columns = fade(self.rows, self.height, unit), fade(self.columns, self.width, unit)
        return (rows[:, None] * columns).to(like)


def tiles(height: int, width: int, side: int) -> list[Tile]:
    """Tiles of at most `side` latents in height and in width over a frame of `height` x `width` latents: as
    few as will do, of nearly one size. ValueError where `side` is less than `SMALLEST`."""
    if side < SMALLEST:
        raise ValueError(f"tiles of {side} latents are too small; they take {SMALLEST} or more")
    return [
        Tile(rows, columns, height, width)
        for rows in spans(height, side, OVERLAP)
        for columns in spans(width, side, OVERLAP)
    ]


def fade(span: Span, length: int, unit: int) -> Tensor:
    """Weights along one axis of `length` latents, `unit` to a latent, float32: they rise from 0 to 1 over
    what a tile shares with a neighbour but the `EDGE` latents at either end."""
    at = (torch.arange(len(span) * unit, dtype=torch.float32) + 0.5) / unit
    rise = torch.ones_like(at)
    for begins, distance in ((span.start > 0, at), (span.stop < length, len(span) - at)):
        if begins:
            rise = rise * ((distance - EDGE) / (OVERLAP - 2 * EDGE)).clamp(0, 1)
    return rise
