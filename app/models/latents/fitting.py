"""What a clip through a codec takes of memory, told from its sizes alone, and how many frames pass at once.

The codec's own code runs on torch's meta device, where tensors have sizes and no values, and the tensors that
it makes are counted. Knows nothing of requests or of files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Final

import torch
from torch import Tensor

from app.errors import UnavailableError
from app.memory import Need, Room
from app.models.latents.codec import Codec
from app.models.latents.codecs import ImageCodec
from app.models.latents.fit import Fit as Way
from app.models.latents.fit import How
from app.models.latents.memory import MOST
from app.models.latents.spool import AT_ONCE
from app.nn.allocations import Allocations, Stand, on_meta

CHUNK: Final = 4  # frames that a clip is read in
STEADY: Final = 3  # latents after which a codec of video takes no more


@dataclass(frozen=True)
class Task:
    """A clip to encode and decode. frames: None where nobody knows. fit: how its size is made one that the
    codec takes. edited: whether edited latents are decoded beside its own. changed: whether by other weights.
    """

    height: int
    width: int
    frames: int | None = None
    fit: How = "reflect"
    edited: bool = False
    changed: bool = False


@dataclass(frozen=True)
class Fit:
    """What was chosen: frames at once, None for a codec of video, which takes a latent at a time. What it
    takes of what there is."""

    batch: int | None
    need: Need
    room: Room

    def __str__(self) -> str:
        return f"{self.way}: {self.room.told(self.need)}"

    @property
    def way(self) -> str:
        """The choice in words."""
        if self.batch is None:
            return "a latent at a time"
        return f"{self.batch} frame{'s' if self.batch > 1 else ''} at once"


class Estimate:
    """What a codec takes on a device of the type `device`."""

    def __init__(self, codec: Codec, device: str) -> None:
        self.device = device
        self._codec = copy.copy(codec)
        self._codec.module = on_meta(codec.module)  # type: ignore[misc] # a property of the protocol alone
        self._weight = next(codec.module.parameters()).dtype
        self.weights = sum(x.nbytes for x in (*codec.module.parameters(), *codec.module.buffers()))
        self.is_image = isinstance(codec, ImageCodec)
        self._known: dict[tuple[Task, int | None], int] = {}

    def need(self, task: Task, batch: int | None = None) -> Need:
        """What a clip takes, `batch` frames at once."""
        key = task, batch
        if key not in self._known:
            self._known[key] = max(self._encoded(task, batch), self._decoded(task, batch))
        host = 12 * task.height * task.width * 2 * (CHUNK + (batch or 0)) if self.device == "cuda" else 0
        return Need(self.weights * (1 + task.changed) + self._known[key], host)

    def _encoded(self, task: Task, batch: int | None) -> int:
        codec, way = self._of(batch), Way(task.height, task.width, self._codec.facts, task.fit)
        size = CHUNK, 3, task.height, task.width
        there = torch.empty(size, device="meta") if self._is_copied else None
        with torch.inference_mode(), Allocations("meta") as counted, Stand(self.device):
            frames = self._frames(task, batch)
            whole, rest = divmod(frames, CHUNK)
            sizes = chain(repeat(CHUNK, whole), [rest] if rest else [])
            chunks = (torch.empty(n, *size[1:], device="meta") if there is None else there[:n] for n in sizes)
            for latents in codec.encode(way.frames(chunks)):
                del latents
        return int(counted.peak)

    def _decoded(self, task: Task, batch: int | None) -> int:
        facts = self._codec.facts
        way = Way(task.height, task.width, facts, task.fit)
        way.length = self._frames(task, batch)
        count = facts.latents_holding(way.length)
        size = facts.channels, min(AT_ONCE, count), *way.latent_size
        there = torch.empty(size, device="meta") if self.device == "cuda" else None

        def shown(codec: Codec) -> Iterator[Tensor]:
            parts = [min(AT_ONCE, count - first) for first in range(0, count, AT_ONCE)]
            latents = (
                torch.empty(size[0], n, *size[2:], device="meta") if there is None else there[:, :n]
                for n in parts
            )
            for chunk in way.restore(codec.decode(latents)):
                yield from chunk.float().clamp(-1, 1)

        with torch.inference_mode(), Allocations("meta") as counted, Stand(self.device):
            read = torch.empty(CHUNK, 3, *size[2:], device="meta") if there is None else None
            clips = [shown(self._of(batch)) for _ in range(1 + task.edited)]
            for frames in zip(*clips, strict=True):
                for frame in frames:
                    (frame + 1).to(torch.uint8)
            del read, frames, frame
        return int(counted.peak)

    def _of(self, batch: int | None) -> Codec:
        if not isinstance(self._codec, ImageCodec):
            return self._codec
        codec = copy.copy(self._codec)
        codec.batch, codec.most = batch, None
        return codec

    def _frames(self, task: Task, batch: int | None) -> int:
        """Frames of a clip that takes as much as longer ones."""
        enough = 2 * batch if batch else self._codec.facts.frames_for(STEADY)
        return min(enough, task.frames or enough)

    @property
    def _is_copied(self) -> bool:
        """Whether frames lie in the host's memory, and a copy of another type on the device."""
        return self.device == "cuda" and self._weight != torch.float32


def fit(estimate: Estimate, task: Task, room: Room) -> Fit:
    """The most frames at once that fit.

    Raises:
        UnavailableError: `memory_short`, with what one frame or latent at a time takes.
    """
    batch = 1 if estimate.is_image else None
    found = Fit(batch, estimate.need(task, batch), room)
    if not room.holds(found.need):
        raise UnavailableError(
            "memory_short",
            f"A clip of {task.width}x{task.height} takes {room.told(found.need)} that are free, {found.way}; "
            "set a smaller short_side, free memory, or use a larger GPU.",
        )
    if batch is None:
        return found
    batch = min(MOST.get(estimate.device, 1), task.frames or MOST.get(estimate.device, 1))
    while batch > 1:
        more = Fit(batch, estimate.need(task, batch), room)
        if room.holds(more.need):
            return more
        batch //= 2
    return found
