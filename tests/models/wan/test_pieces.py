from hypothesis import given
from hypothesis import strategies as st

from app.models.wan.cache import KVCache
from app.models.wan.pieces import pieces
from tests.models.wan.small import SMALL


@given(
    batch=st.integers(1, 2), frames=st.integers(1, 4), each=st.integers(1, 6), at_once=st.integers(1, 30),
    of_frames=st.booleans(), size=st.integers(5, 8), sink=st.integers(0, 1), before=st.integers(0, 9),
)  # fmt: skip
def test_every_token_passes_once_to_its_own_place(
    batch: int, frames: int, each: int, at_once: int, of_frames: bool, size: int, sink: int, before: int
) -> None:
    cache = KVCache(SMALL, each, size, sink=sink)
    for _ in range(before):
        cache.take(1)
    writes, rows = cache.take(frames).writes, frames if of_frames else 1
    found = pieces(batch, frames * each, rows, at_once, writes)
    tokens = [(piece.item, token) for piece in found for token in range(piece.own.start, piece.own.stop)]
    assert tokens == [(item, token) for item in range(batch) for token in range(frames * each)]
    places = {
        token: there.start + i for own, there in writes for i, token in enumerate(range(own.start, own.stop))
    }
    for piece in found:
        assert 0 < piece.own.stop - piece.own.start <= at_once
        assert {token // each for token in range(piece.own.start, piece.own.stop)} == {piece.row} or rows == 1
        got = {
            piece.own.start + token: there.start + i
            for own, there in piece.writes
            for i, token in enumerate(range(own.start, own.stop))
        }
        assert got == {token: places[token] for token in range(piece.own.start, piece.own.stop)}
