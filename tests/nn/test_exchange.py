"""Moves of rows between ranks, with lists in place of a network."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from app.nn.exchange import Exchange, exchange, shares


def carried(moves: list[Exchange], rows: list[Tensor]) -> list[Tensor]:
    """What every rank has after its part of a move."""
    left = [held[move.send].split(move.sent) for move, held in zip(moves, rows, strict=True)]
    arrived = []
    for rank, move in enumerate(moves):
        parts = [sent[rank] for sent in left]
        assert tuple(len(part) for part in parts) == move.got
        arrived.append(torch.cat(parts)[move.take])
    return arrived


@given(st.integers(1, 5), st.integers(1, 40), st.randoms(use_true_random=False))
def test_every_rank_gets_the_rows_it_wants_in_its_order(count: int, rows: int, random: object) -> None:
    generator = torch.Generator().manual_seed(hash(str(random)) % 2**31)
    values = torch.rand(rows, 3, generator=generator)

    def spread() -> list[Tensor]:
        order = torch.randperm(rows, generator=generator)
        return [order[torch.arange(rows) % count == rank] for rank in range(count)]

    before, after, everywhere = spread(), spread(), [torch.randperm(rows, generator=generator)] * count
    for wanted in (after, everywhere):
        moves = [exchange(before, wanted, rank) for rank in range(count)]
        for rank, got in enumerate(carried(moves, [values[held] for held in before])):
            assert torch.equal(got, values[wanted[rank]])


def test_a_row_that_stays_is_sent_to_nobody_else() -> None:
    before = after = [torch.tensor([0, 1]), torch.tensor([3, 2])]
    assert exchange(before, after, 1).sent == (0, 2)


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ([1] * 8, 4, [range(2), range(2, 4), range(4, 6), range(6, 8)]),
        ([1] * 5, 2, [range(2), range(2, 5)]),
        ([7], 2, [range(0), range(1)]),
        ([6, 1, 1, 1, 1, 1, 1], 2, [range(1), range(1, 7)]),
    ],
)
def test_shares_are_about_equal_and_cover_all(sizes: list[int], count: int, expected: list[range]) -> None:
    assert shares(sizes, count) == expected
