"""The autoencode pipeline: a clip's frames, what its codec makes of them, and what edits make of its latents.

    frames -> fit -> encode -> (latents in a file) -> edit -> decode -> fit back

Frames pass as a stream, twice: once to be encoded, once beside what comes back. Latents, which are small, lie
in files of the job's folder meanwhile. Knows nothing of videos' files or of requests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.models.latents import edits as editing
from app.models.latents.codec import Codec
from app.models.latents.edit_request import OWN, Described
from app.models.latents.fit import Fit, How
from app.models.latents.spool import Latents, chunks, spool
from app.models.latents.weights import Change, Manipulator
from app.timing import Stopwatch

LONG = 1 << 40  # latents, of a clip that is not counted yet
Frames = Iterable[Tensor]  # chunks (n, 3, height, width) in [-1, 1]
StateDicts = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Latent:
    """A clip's latents, as they were encoded and as they were edited. `edited` is `own` where nothing is."""

    own: Latents
    edited: Latents


@dataclass(frozen=True)
class Moment:
    """One frame, (3, height, width) each: of the clip, decoded again, and decoded after the edits."""

    original: Tensor
    reconstructed: Tensor
    edited: Tensor | None


class Session:
    """One clip in a codec."""

    def __init__(
        self,
        codec: Codec,
        source: Callable[[], Frames],
        size: tuple[int, int],
        folder: Path,
        *,
        fit: How = "reflect",
        on_step: Callable[[], None] = lambda: None,
        clock: Stopwatch | None = None,
    ) -> None:
        """source: Gives the clip's frames from its beginning, each time it is called. size: (height, width)
        of the frames. folder: an existing one, for latents. on_step: called between chunks; may raise to
        stop.
        clock: gets the seconds of "encode", "edit" and "decode"."""
        self.codec = codec
        self._source, self._folder, self._how = source, folder, fit
        self._fit = Fit(*size, codec.facts, fit)
        self._size = size
        self._on_step, self._clock = on_step, clock or Stopwatch()
        self._changed: Codec | None = None

    def latents(
        self,
        edits: Sequence[Described] = (),
        changes: Sequence[Change] = (),
        others: Mapping[str, Callable[[], Frames]] | None = None,
        models: StateDicts | None = None,
    ) -> Latent:
        """Encode the clip, and edit its latents.

        changes: Of the codec's weights, for what is edited. others: clips beside "a", by name, of the same
        size. models: state dicts that weights may be interpolated with, by name.

        Raises:
            UsageError: An edit or a change does not fit. InputError: `clip_empty`, `latents_not_finite`.
        """
        codec = self.codec
        names = [OWN, *(others or {})]
        # What does not fit the codec is refused before the clip is encoded; its length is not known yet.
        editing.check(edits, dict.fromkeys(names, (codec.facts.channels, LONG, *self._fit.latent_size)))
        if changes:
            codec = self._changed = copy.deepcopy(self.codec)
            manipulator = Manipulator(codec.module, models)
            for change in changes:
                manipulator.apply(change)
        own = base = self._encoded(self.codec, self._fit, self._source(), OWN)
        if not edits and not changes:
            return Latent(own, own)
        if changes:
            base = self._encoded(codec, Fit(*self._size, codec.facts, self._how), self._source(), "changed")
        clips: dict[str, Latents] = {OWN: base}
        for name, other in (others or {}).items():
            clips[name] = self._encoded(codec, Fit(*self._size, codec.facts, self._how), other(), name)
        with self._clock("edit"):
            return Latent(own, editing.apply(edits, clips, self._folder, self._on_step))

    def moments(self, latents: Latent) -> Generator[Moment]:
        """The clip again, frame by frame, beside what comes back of it."""
        plain = latents.edited is latents.own
        originals = _single(self._source())
        reconstructed = self._decoded(self.codec, latents.own)
        edited = None if plain else self._decoded(self._changed or self.codec, latents.edited)
        for original, again in zip(originals, reconstructed, strict=True):
            yield Moment(original, again, None if edited is None else next(edited))

    def _encoded(self, codec: Codec, fit: Fit, frames: Frames, name: str) -> Latents:
        with torch.inference_mode():
            encoded = self._clock.around("encode", iter(codec.encode(fit.frames(self._watched(frames)))))
            return spool(self._folder / f"latents-{name}", encoded)

    def _decoded(self, codec: Codec, latents: Latents) -> Iterator[Tensor]:
        frames = iter(self._fit.restore(codec.decode(self._watched(chunks(latents)))))
        while True:
            with torch.inference_mode(), self._clock("decode"):
                chunk = next(frames, None)
            if chunk is None:
                return
            yield from chunk.float().clamp(-1, 1)

    def _watched(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._on_step()
            yield item


def _single(chunks: Frames) -> Iterator[Tensor]:
    for chunk in chunks:
        yield from chunk
