from collections.abc import Iterator

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from app.models.seedvr2.segment import SHORTEST, Span, spans
from app.models.seedvr2.windowed import cut, fade, in_windows, noise


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


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.data())
def test_a_stream_is_cut_wherever_its_parts_end(lengths: list[int], data: st.DataObject) -> None:
    whole = torch.arange(sum(lengths))
    skip = data.draw(st.integers(0, len(whole)))
    count = data.draw(st.integers(0, len(whole) - skip))
    parts = list(cut(iter(whole.split(lengths)), skip, count))
    assert torch.equal(torch.cat([whole[:0], *parts]), whole[skip : skip + count])
    assert all(len(part) for part in parts)


def test_nothing_is_asked_for_after_the_cut() -> None:
    stream = iter([torch.zeros(2), torch.zeros(2), torch.zeros(2)])
    list(cut(stream, 1, 3))
    assert len(list(stream)) == 1
