"""How a film is taken apart: each part a job of its own, together every frame once. Pure functions.

Short shots go together, long ones are split. A part of a long shot makes frames of its past again, because
they decide what its own become; it is split where that costs least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from app.models.seedvr2.segment import OVERLAP, Segment, Span, decoder_reach, segment, segments, spans
from app.models.seedvr2.vae_config import VAEConfig
from app.video.shots import Shot

VAE = VAEConfig.published()  # of every published model; one that looks less far back is sent a little more


@dataclass(frozen=True)
class Part:
    """Frames `start` to `stop` of the film. Its first shot is number `shot`; `edges` are where its shots
    begin, and where the last one ends; `read` the frames that a worker needs."""

    number: int
    start: int
    stop: int
    shot: int
    edges: tuple[int, ...]
    read: Span

    def __len__(self) -> int:
        return self.stop - self.start

    def fields(self, source_start: int) -> dict[str, Any]:
        """`part` of its job, with a source whose first frame is `source_start` of the film."""
        told = {"start": self.start, "stop": self.stop, "shot": self.shot, "edges": list(self.edges)}
        return {"source_start": source_start, **told}


def plan(shots: Sequence[Shot], longest: int, window: int, config: VAEConfig = VAE) -> list[Part]:
    """The parts of a film, in order, each of about `longest` frames at most: whole shots, or pieces of one
    that is longer."""
    parts: list[Part] = []

    def add(first: int, last: int, start: int, stop: int) -> None:
        """A part of shots number `first` to `last`."""
        edges = (*(shot.start for shot in shots[first : last + 1]), shots[last].stop)
        work = segments(start, stop, edges, window, config)
        read = Span(edges[0] + work[0].read.start, edges[-2] + work[-1].read.stop)
        parts.append(Part(len(parts), start, stop, first, edges, read))

    first = 0
    for number, shot in enumerate(shots):
        if number > first and shot.stop - shots[first].start > longest:
            add(first, number - 1, shots[first].start, shot.start)
            first = number
        if len(shot) > longest:
            for piece in split(len(shot), longest, window, config):
                add(number, number, shot.start + piece.start, shot.start + piece.stop)
            first = number + 1
    if first < len(shots):
        add(first, len(shots) - 1, shots[first].start, shots[-1].stop)
    return parts


def split(frames: int, longest: int, window: int, config: VAEConfig = VAE) -> list[Span]:
    """A shot of `frames` frames in about equal pieces of about `longest` at most."""
    latents = config.latents_holding(frames)
    # Where the past that a piece must decode begins just after a fade, no window is run for its end alone.
    good = (each.start + OVERLAP + decoder_reach(config) for each in spans(latents, window)[1:])
    places = [config.frames_for(latent) for latent in good if latent < latents]
    count = math.ceil(frames / longest)
    cuts = {min(places, key=lambda place: abs(place - frames * i / count)) for i in range(1, count) if places}
    edges = [0, *sorted(cuts), frames]
    return [Span(start, stop) for start, stop in pairwise(edges)]


def overhead(parts: Sequence[Part], shots: Sequence[Shot], window: int, config: VAEConfig = VAE) -> float:
    """How many times the work of one worker the parts are: windows of the transformer and latents through
    the VAE, each half of it."""

    def work(pieces: Sequence[Segment]) -> tuple[int, int]:
        return (
            sum(len(each) for piece in pieces for each in piece.windows),
            sum(len(piece.encoded) + len(piece.decoded) for piece in pieces),
        )

    whole = work([segment(len(shot), Span(0, len(shot)), window, config) for shot in shots])
    cut = work([each for p in parts for each in segments(p.start, p.stop, p.edges, window, config)])
    return (cut[0] / whole[0] + cut[1] / whole[1]) / 2
