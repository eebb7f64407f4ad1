"""Which way through the pipeline fits the memory there is, decided before anything is computed.

Whole frames, the whole window and all weights on the device, where they fit. What is given up otherwise, in
this order: blocks wait in the host's memory, which changes no value; the VAE takes tiles, the largest that
fit; both; last, the window gets shorter. Knows nothing of models' layers or of requests.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from app.errors import UnavailableError
from app.memory import Need, Room
from app.models.seedvr2.memory import Choice, Task
from app.models.seedvr2.segment import SHORTEST
from app.models.seedvr2.tiles import SMALLEST

SIDES: Final = (SMALLEST, 48, 64, 80, 96, 128, 160, 192, 256)  # of tiles, in latents
LARGE: Final = 64  # latents of a tile's side from which a larger one is not worth moving blocks for


class Needs(Protocol):
    """What a choice takes: see `memory.Estimate`."""

    def need(self, task: Task, choice: Choice) -> Need: ...


@dataclass(frozen=True)
class Limits:
    """What may be chosen. window: latents at most. tile: latents of a side, 0 for whole frames, None for
    whichever fits. shorten: whether the window may get shorter. stream: whether blocks may wait in the host's
    memory."""

    window: int
    tile: int | None = None
    shorten: bool = True
    stream: bool = True


@dataclass(frozen=True)
class Fit:
    """What was chosen, what it takes of what there is, and pixels of a latent's side."""

    choice: Choice
    need: Need
    room: Room
    unit: int

    @property
    def tile(self) -> int | None:
        """Pixels of a tile's side, None for whole frames."""
        return None if self.choice.tile is None else self.choice.tile * self.unit

    def __str__(self) -> str:
        return f"{self.way}: {self.room.told(self.need)}"

    @property
    def way(self) -> str:
        """The choice in words."""
        tile = "whole frames" if self.tile is None else f"tiles of {self.tile} pixels"
        blocks = ", the transformer in the host's memory" if self.choice.stream else ""
        return f"windows of {self.choice.window} latents, {tile}{blocks}"


def fit(needs: Needs, task: Task, room: Room, limits: Limits, what: str) -> Fit:
    """The first way that fits. `what` begins the sentence of a refusal: "A result of 1920x1080".

    Raises:
        UnavailableError: `memory_short`, with what the least way takes.
    """
    limits = Limits(limits.window, limits.tile, limits.shorten, limits.stream and room.apart)

    def fits(choice: Choice) -> bool:
        return room.holds(needs.need(task, choice))

    windows = list(_windows(min(limits.window, task.latents), limits))
    longest = max(task.frame)
    *_, least = _ways(windows[-1], longest, limits, lambda choice: False)
    ways = (choice for window in windows for choice in _ways(window, longest, limits, fits))
    choice = next(ways)
    if not fits(choice) and not _hopeless(needs, task, room, least, limits):
        choice = next((choice for choice in ways if fits(choice)), least)
    found = Fit(choice, needs.need(task, choice), room, task.unit)
    if room.holds(found.need):
        return found
    found = replace(found, choice=least, need=needs.need(task, least))
    raise UnavailableError(
        "memory_short",
        f"{what} takes {room.told(found.need)} that are free, by {found.way}; ask for a smaller size"
        f"{'' if limits.shorten else ' or a shorter window'}"
        f"{'' if limits.tile is None else ', leave tile unset'}, free memory, or use a larger GPU.",
    )


def _hopeless(needs: Needs, task: Task, room: Room, least: Choice, limits: Limits) -> bool:
    """Whether the device is too small for every way, which two of them tell: the shortest window with all
    blocks on the host, in the smallest tiles, and in whole frames, which may be hardly larger."""
    tiles = {least.tile} if limits.tile is not None else {least.tile, None}
    return not any(room.holds(Need(needs.need(task, replace(least, tile=tile)).device, 0)) for tile in tiles)


def _windows(window: int, limits: Limits) -> Iterator[int]:
    yield limits.window
    while limits.shorten and window > SHORTEST:
        window = max(SHORTEST, window // 2)
        yield window


def _ways(window: int, longest: int, limits: Limits, fits: Callable[[Choice], bool]) -> Iterator[Choice]:
    """Choices of one window, the one that gives up least first and the one that takes least last."""
    streams = (False, True) if limits.stream else (False,)
    if limits.tile is not None:
        yield from (Choice(window, limits.tile or None, stream) for stream in streams)
        return
    yield from (Choice(window, None, stream) for stream in streams)
    sides = [side for side in SIDES if side < longest]
    large, small = [side for side in sides if side >= LARGE], [side for side in sides if side < LARGE]
    for group, stream in ((large, False), (sides, True), (small, False)):
        if group and stream in streams:
            yield _largest([Choice(window, side, stream) for side in group], fits)
    if sides:
        yield Choice(window, sides[0], streams[-1])


def _largest(rising: Sequence[Choice], fits: Callable[[Choice], bool]) -> Choice:
    """The last of these that fits, or the first one if none does."""
    return rising[max(bisect_right(rising, False, key=lambda choice: not fits(choice)) - 1, 0)]
