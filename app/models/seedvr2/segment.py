"""What it takes to make a run of a shot's frames exactly as the whole shot would make them. Torch-free.

The result depends on the past: the VAE's convolutions see so many latents back, and the transformer's
windows, which are those of the whole shot, are faded into each other. A segment therefore begins earlier
than the frames that are asked for, and drops what comes out of its beginning. Knows nothing of files, of
tensors or of who works on a segment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from app.models.seedvr2.vae_config import VAEConfig

OVERLAP: Final = 2  # latents that neighbouring windows share
SHORTEST: Final = 2 * OVERLAP + 1  # a window must keep a latent that no neighbour sees


@dataclass(frozen=True)
class Span:
    """A run of latents or frames: start to stop of a shot, half open."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Segment:
    """A run of a shot's frames, and the work that it takes.

    frames: of the whole shot. made: frames that come out. read: frames that go in; where they end with the
    shot, the last is repeated until it fills its latent. encoded, decoded: latents that pass the VAE, each
    as a clip of its own. windows: those that the transformer runs, in the places of the whole shot's.
    """

    frames: int
    made: Span
    read: Span
    encoded: Span
    decoded: Span
    windows: tuple[Span, ...]


def spans(latents: int, longest: int, overlap: int = OVERLAP) -> list[Span]:
    """The windows over a shot of `latents` latents, none longer than `longest`.

    As few as will do, their lengths equal to within one, so that no short window is left at the end.
    Neighbours share `overlap` latents.

    Raises:
        ValueError: `longest` is too short for a window to keep a latent that no neighbour sees.
    """
    if latents <= longest:
        return [Span(0, latents)]
    if longest <= 2 * overlap:
        raise ValueError(f"a window of {longest} latents is too short; it takes {2 * overlap + 1} or more")
    count = math.ceil((latents - overlap) / (longest - overlap))
    # Each window but the last brings this many new latents before the next one begins.
    starts = [round(i * (latents - overlap) / count) for i in range(count)]
    return [
        Span(start, (starts[i + 1] if i + 1 < count else latents - overlap) + overlap)
        for i, start in enumerate(starts)
    ]


def segment(frames: int, made: Span, longest: int, config: VAEConfig) -> Segment:
    """The work for the frames `made` of a shot of `frames` frames, with windows of at most `longest` latents.

    Raises:
        ValueError: `made` is empty or leaves the shot, or `longest` is too short.
    """
    if not 0 <= made.start < made.stop <= frames:
        raise ValueError(f"frames {made.start} to {made.stop} are no part of a shot of {frames}")
    factor = config.temporal_factor
    decoded = Span(
        max(0, config.latents_holding(made.start + 1) - 1 - decoder_reach(config)),
        config.latents_holding(made.stop),
    )
    windows = spans(config.latents_holding(frames), longest)
    # The first of these begins in the fade of the one before it: what it shares with that is not decoded.
    windows = [each for each in windows if each.stop > decoded.start and each.start < decoded.stop]
    encoded = Span(max(0, windows[0].start - encoder_reach(config)), windows[-1].stop)
    # A latent stands for the frames up to its number times the factor: as the first of a clip of its own,
    # for that one alone. So a segment's latents begin and end where the shot's do.
    read = Span(factor * encoded.start, min(factor * (encoded.stop - 1) + 1, frames))
    return Segment(frames, made, read, encoded, decoded, tuple(windows))


def segments(start: int, stop: int, edges: Sequence[int], longest: int, config: VAEConfig) -> list[Segment]:
    """The segments that make frames `start` to `stop` of a clip whose shots begin at `edges`, of which the
    last is where the last shot ends. The first holds `start`, the last `stop`; see `segment`."""
    return [
        segment(end - begin, Span(max(start, begin) - begin, min(stop, end) - begin), longest, config)
        for begin, end in pairwise(edges)
    ]


def encoder_reach(config: VAEConfig) -> int:
    """How many latents back a latent depends on frames (28 as published)."""
    rate, frames = 1, 2  # frames between two steps of a stage; conv_in looks two steps back
    for stage in range(config.stages):
        frames += rate * 4 * config.layers_per_block
        if config.downsamples_time(stage):
            frames += rate * 2
            rate *= 2
    frames += rate * (8 + 2)  # the middle's two blocks, conv_out
    return math.ceil(frames / config.temporal_factor)


def decoder_reach(config: VAEConfig) -> int:
    """How many latents back a frame depends on latents (37 as published)."""
    rate = config.temporal_factor
    frames = rate * (2 + 8)  # conv_in, the middle's two blocks
    for stage in range(config.stages):
        frames += rate * 4 * (config.layers_per_block + 1)
        if stage < config.stages - 1:
            rate //= 2 if config.upsamples_time(stage) else 1
            frames += rate * 2  # the convolution after the upsampling
    frames += rate * 2  # conv_out
    return math.ceil(frames / config.temporal_factor)
