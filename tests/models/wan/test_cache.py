import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.models.wan.cache import KVCache
from tests.models.wan.small import SMALL


def shifted(blocks: list[int], size: int, sink: int) -> list[list[int]]:
    """What the original's cache holds after each block's first pass: it moves what it keeps to the left."""
    held: list[int] = []
    states = []
    first = 0
    for frames in blocks:
        evicted = max(0, len(held) + frames - size)
        held = held[:sink] + held[sink + evicted :] + list(range(first, first + frames))
        first += frames
        states.append(held)
    return states


@st.composite
def clips(draw: st.DrawFn) -> tuple[list[int], int, int]:
    blocks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=12))
    sink = draw(st.integers(0, 4))
    return blocks, sink + draw(st.integers(max(blocks), 9)), sink


@given(clips())
def test_the_ring_holds_what_a_shifting_cache_holds(clip: tuple[list[int], int, int]) -> None:
    blocks, size, sink = clip
    cache = KVCache(SMALL, 2, size, sink=sink)
    tokens: list[tuple[int, int] | None] = [None] * (2 * size)
    first = 0
    for frames, expected in zip(blocks, shifted(blocks, size, sink), strict=True):
        place = cache.take(frames)
        own = [(first + i // 2, i % 2) for i in range(2 * frames)]
        for mine, there in place.writes:
            tokens[there] = own[mine]
        assert len(tokens) == 2 * size
        assert len(place.writes) <= 3
        assert sorted(filter(None, tokens[: place.length])) == [(f, i) for f in expected for i in range(2)]
        first += frames


def test_frames_in_order_are_one_piece() -> None:
    cache = KVCache(SMALL, 10, 6)
    assert [cache.take(3).writes for _ in range(3)] == [
        ((slice(0, 30), slice(0, 30)),),
        ((slice(0, 30), slice(30, 60)),),
        ((slice(0, 30), slice(0, 30)),),
    ]


def test_a_clip_however_long_has_few_places_and_storage_that_stays() -> None:
    """A pass could be recorded as a graph for each: 7 while the window fills, 6 more as it rolls."""
    cache = KVCache(SMALL, 2, 21)
    at = [part.data_ptr() for layer in cache.layers for part in layer]
    assert len({repr(cache.take(3)) for _ in range(100)}) == 13
    assert [part.data_ptr() for layer in cache.layers for part in layer] == at


def test_a_cleared_cache_begins_anew() -> None:
    cache = KVCache(SMALL, 1, 4, sink=1)
    first = [cache.take(2) for _ in range(4)]
    cache.clear()
    assert [cache.take(2) for _ in range(4)] == first


@pytest.mark.parametrize(("frames", "sink"), [(3, 3), (3, 4), (3, -1), (0, 0)])
def test_a_sink_without_room_is_refused(frames: int, sink: int) -> None:
    with pytest.raises(ValueError, match="no room"):
        KVCache(SMALL, 1, frames, sink=sink)


def test_a_block_that_does_not_fit_is_refused() -> None:
    cache = KVCache(SMALL, 1, 4, sink=2)
    cache.take(4)
    with pytest.raises(ValueError, match="a block of 3 frames does not fit into 4 with a sink of 2"):
        cache.take(3)
