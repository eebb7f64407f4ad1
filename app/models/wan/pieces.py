"""How the tokens of a block pass through a layer: in pieces, each under one modulation.

On a card a piece is all it can be. On a CPU it is small: what a layer computes between its attentions stays
in a core's cache, and the widest of it, the MLP's, takes the memory of a piece instead of a block's.
Torch-free; it knows nothing of what a layer computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Slices = tuple[slice, slice]


@dataclass(frozen=True)
class Piece:
    """Tokens of one batch item and, where frames differ in their timesteps, of one frame.

    `own`: which of the block's tokens. `row`: of the modulation. `writes`: pairs of slices, of the piece's
    tokens and of the cache's.
    """

    item: int
    row: int
    own: slice
    writes: tuple[Slices, ...]


def pieces(batch: int, tokens: int, rows: int, at_once: int, writes: Sequence[Slices]) -> list[Piece]:
    """The pieces of a block, in order.

    Args:
        tokens: Of the block.
        rows: Timesteps of the block: one, or one a frame.
        at_once: Tokens of a piece, at most.
        writes: Where the block's tokens go in the cache, as `Place.writes`.
    """
    each = tokens // rows
    cut = [
        (row, slice(begin, min(begin + at_once, (row + 1) * each)))
        for row in range(rows)
        for begin in range(row * each, (row + 1) * each, at_once)
    ]
    return [Piece(item, row, own, tuple(_within(own, writes))) for item in range(batch) for row, own in cut]


def _within(own: slice, writes: Sequence[Slices]) -> list[Slices]:
    """The part of `writes` that is about the tokens `own`."""
    parts = []
    for mine, there in writes:
        begin, end = max(own.start, mine.start), min(own.stop, mine.stop)
        if begin < end:
            first = there.start + begin - mine.start
            parts.append((slice(begin - own.start, end - own.start), slice(first, first + end - begin)))
    return parts
