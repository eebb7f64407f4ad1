import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.models.seedvr2.windows import (
    RUN_TOKENS,
    inverse,
    make_windows,
    partition,
    transitions,
    window_size,
)

sizes = st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 100))
window_counts = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 45, 80), (1, 15, 27)),  # 720p image
        ((21, 45, 80), (6, 15, 27)),  # 720p clip
        ((60, 45, 80), (8, 15, 27)),  # longer than 30 latents: the window grows no further
        ((4, 68, 120), (1, 15, 27)),  # 1088 x 1920 sees the same share
        ((5, 80, 45), (2, 27, 15)),  # upright
        ((3, 10, 16), (1, 16, 26)),  # 47.43 -> 47, 75.89 -> 76
    ],
)
def test_window_sizes_by_hand(size: tuple[int, int, int], expected: tuple[int, int, int]) -> None:
    assert window_size(size, (4, 3, 3)) == expected


def test_shifted_cuts_begin_half_a_window_early_and_truncate() -> None:
    # Step 15 over 45: edges at int(7.5), int(22.5), int(37.5); step 27 over 80: int(13.5), ...
    windows = make_windows((1, 45, 80), (4, 3, 3), shifted=True)
    heights = sorted({(w[1].start, w[1].stop) for w in windows})
    widths = sorted({(w[2].start, w[2].stop) for w in windows})
    assert heights == [(0, 7), (7, 22), (22, 37), (37, 45)]
    assert widths == [(0, 13), (13, 40), (40, 67), (67, 80)]
    assert {(w[0].start, w[0].stop) for w in windows} == {(0, 1)}  # one frame: nothing to shift


@given(sizes, window_counts, st.booleans())
def test_windows_cover_every_token_once(
    size: tuple[int, int, int], windows: tuple[int, int, int], shifted: bool
) -> None:
    seen = torch.zeros(size, dtype=torch.int)
    for window in make_windows(size, windows, shifted):
        assert seen[window].numel() > 0
        seen[window] += 1
    assert seen.min() == seen.max() == 1


@given(sizes, window_counts, st.booleans())
def test_groups_are_views_of_windows(
    size: tuple[int, int, int], windows: tuple[int, int, int], shifted: bool
) -> None:
    parts = partition(size, windows, shifted)
    grid = torch.arange(size[0] * size[1] * size[2]).view(size)
    wanted = sorted(grid[w].flatten().tolist() for w in make_windows(size, windows, shifted))
    found = [
        window
        for group in parts.groups
        for window in parts.order[group.start : group.stop].view(group.count, group.length).tolist()
    ]
    assert sorted(found) == wanted
    assert parts.count == len(wanted)
    assert torch.equal(parts.order[inverse(parts.order)], torch.arange(grid.numel()))


@given(sizes, window_counts, st.booleans())
def test_runs_cover_every_token_in_order_and_stay_short(
    size: tuple[int, int, int], windows: tuple[int, int, int], shifted: bool
) -> None:
    position = 0
    for run in partition(size, windows, shifted).runs:
        for group in run:
            assert group.start == position
            position = group.stop
        single = len(run) == 1 and run[0].count == 1
        assert single or run[-1].stop - run[0].start <= RUN_TOKENS
    assert position == size[0] * size[1] * size[2]


def test_transitions_lead_through_every_order_and_home() -> None:
    regular = partition((5, 20, 31), (4, 3, 3), shifted=False)
    shifted = partition((5, 20, 31), (4, 3, 3), shifted=True)
    orders = [regular.order, shifted.order, shifted.order, regular.order]
    tokens = torch.arange(5 * 20 * 31)
    steps = transitions(orders)
    assert steps[2] is None  # same order: nothing moves
    for order, step in zip([*orders, torch.arange(len(tokens))], steps, strict=True):
        tokens = tokens if step is None else tokens[step]
        assert torch.equal(tokens, order)
