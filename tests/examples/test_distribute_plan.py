from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.job.request import Part as PartOfJob
from app.models.seedvr2.segment import Span, decoder_reach, encoder_reach, segments
from app.video.shots import Shot
from examples.serve.distribute.plan import VAE, overhead, plan, split


def shots_of(lengths: list[int]) -> list[Shot]:
    edges = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return [Shot(start, stop) for start, stop in pairwise(edges)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=8), st.integers(30, 1500), st.integers(5, 40))
def test_every_frame_is_in_one_part(lengths: list[int], longest: int, window: int) -> None:
    shots = shots_of(lengths)
    parts = plan(shots, longest, window)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == shots[-1].stop
    assert [part.number for part in parts] == list(range(len(parts)))
    for part in parts:
        whole = [shot for shot in shots if shot.start < part.stop and shot.stop > part.start]
        assert part.edges == (*(shot.start for shot in whole), whole[-1].stop)
        assert shots[part.shot] == whole[0]
        # what a worker will look for is in what it is sent
        work = segments(part.start, part.stop, part.edges, window, VAE)
        assert part.read.start == part.edges[0] + work[0].read.start <= part.start
        assert part.read.stop == part.edges[-2] + work[-1].read.stop >= part.stop
        PartOfJob.model_validate(part.fields(part.read.start))


def test_short_shots_go_together_and_long_ones_are_split() -> None:
    parts = plan(shots_of([100, 100, 90, 2000, 50, 400]), 450, 31)
    assert [(part.shot, part.start, part.stop) for part in parts[:1] + parts[-2:]] == [
        (0, 0, 290),
        (3, parts[-2].start, 2290),
        (4, 2290, 2740),
    ]
    middle = parts[1:-1]
    assert len(middle) == 5
    assert all(part.shot == 3 and part.edges == (290, 2290) for part in middle)
    assert all(300 < len(part) < 560 for part in middle)


def test_a_split_is_where_a_piece_runs_no_window_for_its_end() -> None:
    """Two windows more than those of its own frames are run by each later piece: no third for its past."""
    spans = split(3000, 800, 31)
    assert len(spans) == 4
    for span in spans[1:]:
        work = segments(span.start, span.stop, [0, 3000], 31, VAE)[0]
        assert work.decoded.start == work.windows[0].start + 2


def test_a_shot_too_short_to_split_is_left_whole() -> None:
    assert split(150, 40, 31) == [Span(0, 150)]


@pytest.mark.parametrize(("longest", "least", "most"), [(3000, 1.0, 1.0), (1000, 1.1, 1.3), (500, 1.3, 1.7)])
def test_the_price_of_splitting(longest: int, least: float, most: float) -> None:
    """A shot of two minutes; a film of short shots costs nothing."""
    shots = shots_of([3000])
    assert least <= overhead(plan(shots, longest, 31), shots, 31) <= most
    many = shots_of([100] * 30)
    assert overhead(plan(many, longest, 31), many, 31) == 1.0


def test_what_a_piece_needs_of_the_past() -> None:
    """As published: no more than a window, its fade and the reach of encoder and decoder."""
    for span in split(5000, 500, 31)[1:]:
        read = segments(span.start, span.stop, [0, 5000], 31, VAE)[0].read
        assert span.start - read.start <= 4 * (31 + encoder_reach(VAE) + decoder_reach(VAE))
