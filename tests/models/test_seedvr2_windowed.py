from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from app.models.seedvr2.windowed import OVERLAP, SHORTEST, Span, fade, in_windows, noise, spans


@given(st.integers(1, 400), st.integers(SHORTEST, 40))
def test_windows_share_two_latents_and_are_even(latents: int, longest: int) -> None:
    windows = spans(latents, longest)
    assert windows[0].start == 0
    assert windows[-1].stop == latents
    lengths = [window.stop - window.start for window in windows]
    assert max(lengths) <= longest
    assert max(lengths) - min(lengths) <= 1
    assert all(a.stop - b.start == OVERLAP for a, b in pairwise(windows))


def test_as_few_windows_as_will_do() -> None:
    assert spans(31, 31) == [Span(0, 31)]
    assert spans(32, 31) == [Span(0, 17), Span(15, 32)]
    assert len(spans(31 + 29, 31)) == 2
    assert len(spans(31 + 29 + 1, 31)) == 3


def test_a_window_too_short_to_share_is_refused() -> None:
    with pytest.raises(ValueError, match="4 latents is too short; it takes 5"):
        spans(9, 4)
    assert spans(3, 4) == [Span(0, 3)]


def test_the_fade_is_a_cosine() -> None:
    torch.testing.assert_close(fade(2), torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(fade(5) + fade(5).flip(0), torch.ones(5))


@given(st.integers(1, 60), st.integers(SHORTEST, 12), st.integers(1, 9), st.data())
def test_a_pointwise_model_is_not_changed_by_windows(
    latents: int, longest: int, chunk: int, data: st.DataObject
) -> None:
    stream = torch.randn(latents, 2, 2, 3)
    seen: list[Span] = []

    def run(window: Tensor, span: Span) -> Tensor:
        assert torch.equal(window, stream[span.start : span.stop])
        seen.append(span)
        return window * 2 + 1

    windows = spans(latents, longest)
    out = torch.cat(list(in_windows(iter(stream.split(chunk)), windows, run)))
    assert seen == windows
    torch.testing.assert_close(out, stream * 2 + 1)


def test_shared_latents_are_cross_faded() -> None:
    windows = spans(8, 5)
    assert windows == [Span(0, 5), Span(3, 8)]
    results = iter([torch.zeros(5, 1, 1, 1), torch.ones(5, 1, 1, 1)])
    out = torch.cat(list(in_windows(iter([torch.zeros(8, 1, 1, 1)]), windows, lambda x, span: next(results))))
    torch.testing.assert_close(out.flatten(), torch.tensor([0, 0, 0, 0.25, 0.75, 1, 1, 1]))


def test_results_leave_as_soon_as_they_are_final() -> None:
    asked = 0

    def stream() -> Iterator[Tensor]:
        nonlocal asked
        for _ in range(100):
            asked += 1
            yield torch.zeros(1, 1, 1, 1)

    out = in_windows(stream(), spans(100, 10), lambda x, span: x)
    next(out)
    assert asked <= 10


def test_noise_belongs_to_its_address() -> None:
    whole = noise(7, "noise", 0, Span(0, 9), 4, 6)
    torch.testing.assert_close(whole[3:5], noise(7, "noise", 0, Span(3, 5), 4, 6), rtol=0, atol=0)
    for other in (
        noise(8, "noise", 0, Span(0, 9), 4, 6),
        noise(7, "condition", 0, Span(0, 9), 4, 6),
        noise(7, "noise", 1, Span(0, 9), 4, 6),
    ):
        assert not torch.equal(whole, other)
    assert abs(whole.mean().item()) < 0.05
    assert abs(whole.std().item() - 1) < 0.05
    assert not torch.equal(whole[0], whole[1])
