"""Rows of a tensor that are spread over ranks, and their moves from one spread to another.

Every rank knows which rows every other holds, so that a move is one all-to-all of the rows themselves. Knows
nothing of models, or of how ranks are started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

Spread = Sequence[Tensor]  # for each rank the rows that it holds, in its order: int64, on the CPU


class LostRankError(RuntimeError):
    """Another rank has gone, or has not answered in time."""


@dataclass(frozen=True)
class Exchange:
    """What one rank sends to each, and how it sorts what it gets.

    `send`: its rows, in the order in which they leave, `sent` of them to each rank. `got`: rows that come
    from each rank. `take`: which of those stands in each place. Indices are int64, on the rows' device.
    """

    send: Tensor
    sent: tuple[int, ...]
    got: tuple[int, ...]
    take: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """rows (n, ...) of this rank before the move -> (n', ...) after it. Bits are not changed.

        Raises:
            LostRankError: The others cannot be reached.
        """
        leaving = rows.index_select(0, self.send)
        arrived = rows.new_empty(sum(self.got), *rows.shape[1:])
        reached(lambda: dist.all_to_all_single(arrived, leaving, list(self.got), list(self.sent)))
        return arrived.index_select(0, self.take)


def exchange(before: Spread, after: Spread, rank: int, device: torch.device | str = "cpu") -> Exchange:
    """The part of `rank` in a move. Each row is held by one rank `before`; `after`, by any number of them."""
    count = sum(len(rows) for rows in before)
    owner, place = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    for number, rows in enumerate(before):
        owner[rows], place[rows] = number, torch.arange(len(rows))
    leaving = [place[rows[owner[rows] == rank]] for rows in after]
    source = owner[after[rank]]
    arrival = source.argsort(stable=True)  # ranks send in their order, each in the order that is wanted here
    take = torch.empty_like(arrival)
    take[arrival] = torch.arange(len(arrival))
    return Exchange(
        send=torch.cat(leaving).to(device),
        sent=tuple(len(rows) for rows in leaving),
        got=tuple(source.bincount(minlength=len(before)).tolist()),
        take=take.to(device),
    )


def broadcast(x: Tensor) -> None:
    """Fill x of every rank with x of rank 0.

    Raises:
        LostRankError: The others cannot be reached.
    """
    reached(lambda: dist.broadcast(x, src=0))


def reached(talk: Callable[[], object]) -> None:
    """Talk to the other ranks.

    Raises:
        LostRankError: They cannot be reached.
    """
    try:
        talk()
    except RuntimeError as error:  # gloo has no type of its own, NCCL's is one
        reason = str(error).partition("\n")[0]
        raise LostRankError(f"another rank cannot be reached ({reason})") from error


def shares(sizes: Sequence[int], count: int) -> list[range]:
    """Consecutive pieces of work of these sizes, for `count` ranks, about as much for each."""
    whole, begin, owners = sum(sizes), 0, []
    for size in sizes:
        owners.append(int((begin + size / 2) / whole * count))
        begin += size
    edges = [sum(owner < rank for owner in owners) for rank in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(edges)]
