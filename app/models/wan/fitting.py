"""Which way to make a clip fits the memory there is, decided before anything is computed.

The text encoder on the device, whole blocks through the decoder and the window that was asked for, where
they fit. What is given up otherwise, in this order: blocks are decoded a latent at a time; the text encoder
goes to the host's memory, or out of memory, once it has read the prompts; last, the window gets shorter.
Knows nothing of models' layers or of requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from app.errors import UnavailableError
from app.memory import Need, Room
from app.models.wan.generate import Stays
from app.models.wan.memory import Choice, Task

_WHERE: Final = {"device": "on the device", "host": "in the host's memory", "nowhere": "out of memory"}


class Needs(Protocol):
    """What a choice takes: see `memory.Estimate`."""

    def need(self, task: Task, choice: Choice) -> Need: ...


@dataclass(frozen=True)
class Limits:
    """What may be chosen. stays: places of the text encoder, best first. shorten: whether the window may get
    shorter."""

    stays: Sequence[Stays] = ("device", "host", "nowhere")
    shorten: bool = True


@dataclass(frozen=True)
class Fit:
    """What was chosen, what it takes of what there is."""

    task: Task
    choice: Choice
    need: Need
    room: Room

    def __str__(self) -> str:
        return f"{self.way}: {self.room.told(self.need)}"

    @property
    def way(self) -> str:
        """The choice in words."""
        length = self.task.options.length
        seen = f"{length.made} latents at once" if length.at_once else f"a window of {self.window} latents"
        pieces = "decoded whole" if self.choice.decode is None else "decoded one by one"
        if not length.at_once and self.choice.decode is None:
            pieces = f"decoded {length.block} at a time"
        where = _WHERE[self.choice.text] if self.room.apart or self.choice.text == "nowhere" else "in memory"
        text = f", the text encoder {where}" if self.task.text else ""
        return f"{seen}, {pieces}{text}"

    @property
    def window(self) -> int:
        """Latents that a block sees."""
        return seen_with(self.task, self.choice.window)


def fit(needs: Needs, task: Task, room: Room, limits: Limits, what: str) -> Fit:
    """The first way that fits. `what` begins the sentence of a refusal: "A result of 832x480".

    Raises:
        UnavailableError: `memory_short`, with what the least way takes.
    """
    for choice in _ways(task, limits):
        found = Fit(task, choice, needs.need(task, choice), room)
        if room.holds(found.need):
            return found
    length = task.options.length
    less = " or fewer frames" if length.at_once else "" if limits.shorten else " or a shorter window"
    raise UnavailableError(
        "memory_short",
        f"{what} takes {room.told(found.need)} that are free, by {found.way}; ask for a smaller size{less}, "
        "free memory, or use a larger GPU.",
    )


def _ways(task: Task, limits: Limits) -> Iterator[Choice]:
    """The one that gives up least first, and the one that takes least last."""
    asked, length = task.options.window, task.options.length
    stays = limits.stays if task.text else limits.stays[:1]
    for text in stays:
        for decode in (None, 1):
            yield Choice(asked, decode, text)
    if limits.shorten and not length.at_once:
        least = task.options.sink + 2 * length.block
        for window in range(seen_with(task, asked) - length.block, least - 1, -length.block):
            yield from (Choice(window, 1, text) for text in stays[-2:])


def seen_with(task: Task, window: int | None) -> int:
    """Latents that a block sees with this window."""
    return replace(task.options, window=window).latents_seen
