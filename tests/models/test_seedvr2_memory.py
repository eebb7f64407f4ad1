"""Predicted against measured on a CPU, where tensors can be counted; the published sizes by arithmetic."""

import copy
from dataclasses import replace
from functools import cache

import pytest

from app.models.seedvr2.memory import Choice, Estimate, Task
from benchmarks.memory import CASES, LENGTHS, MODELS, card_estimate, measured, predicted, published
from tests.models.nano import restorer

GB = 10**9


@cache
def estimate(kind: str) -> Estimate:
    return card_estimate(MODELS[kind]())


@pytest.mark.parametrize("name", CASES)
def test_predicted_peaks_are_those_measured(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    expected, found = predicted(case), measured(case)
    with capsys.disabled():
        print(f"\n{name}: predicted {expected / 1e6:.1f} MB, measured {found / 1e6:.1f} MB")
    assert 0.9 < expected / found < 1.1


def test_weights_are_counted_as_they_are() -> None:
    model = restorer()
    told = model.estimate
    own = sum(p.nbytes for p in (*model.dit.parameters(), *model.vae.parameters()))
    assert 0 <= sum(told.block_bytes()) + told.other_bytes() - own < 0.03 * own  # prompts, stored frequencies
    real = estimate("3b")
    assert sum(real.block_bytes()) + real.other_bytes() == pytest.approx(7.3 * GB, rel=0.02)


def test_memory_does_not_grow_with_a_shot_and_does_with_what_it_should() -> None:
    real = estimate("3b")
    need = {latents: real.need(Task(latents, (94, 160)), Choice(31)).device for latents in (1, 31, 62, 6000)}
    assert need[1] < need[31] < need[62] == need[6000]
    less = real.need(Task(62, (94, 160)), Choice(31, 32, stream=True))
    assert less.device < 0.25 * need[62] and less.host > 0
    assert real.need(Task(62, (94, 160)), Choice(5)).device < need[62]


def test_the_published_sizes_fit_their_cards() -> None:
    """3B at 720p and 1080p in 24 GB, 7B at 1080p and 4K in 80 GB; and 7B in 24 GB."""
    rows = [*published([24], ["720p", "1080p"], ["3b"]), *published([80], ["1080p", "2160p"], ["7b"])]
    rows += published([24], ["720p"], ["7b"])
    found = {(row.model, row.size, row.gib, row.length): row.fit for row in rows}
    for fitted in found.values():
        assert fitted is not None
        assert fitted.choice.window == 31
        assert fitted.room.holds(fitted.need)
    for length in LENGTHS:
        whole, streamed = found["7b", "1080p", 80, length], found["7b", "720p", 24, length]
        assert whole and whole.choice == Choice(31), "whole frames where they fit"
        assert streamed and streamed.choice.stream


def test_an_estimate_leaves_the_model_alone() -> None:
    model = replace(restorer(), dit=copy.deepcopy(restorer().dit))
    before = {name: p.data_ptr() for name, p in model.dit.named_parameters()}
    model.estimate.need(Task(7, (6, 8)), Choice(6))
    assert {name: p.data_ptr() for name, p in model.dit.named_parameters()} == before
