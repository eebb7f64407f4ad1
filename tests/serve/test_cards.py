"""Which cards each process of a server gets."""

from __future__ import annotations

import pytest

from app.errors import ConfigError, UnavailableError
from app.serve.cards import count_cards, share_out
from app.settings import load_settings


@pytest.mark.parametrize(
    ("here", "environment", "expected"),
    [
        (0, {}, [None]),
        (1, {}, ["0"]),
        (4, {}, ["0", "1", "2", "3"]),
        (4, {"SEEDPOD_GPUS": "1"}, ["0"]),
        (4, {"SEEDPOD_SP_SIZE": "2"}, ["0,1", "2,3"]),
        (5, {"SEEDPOD_SP_SIZE": "2"}, ["0,1", "2,3"]),
        (3, {"SEEDPOD_SP_SIZE": "2", "SEEDPOD_GPUS": "1"}, ["0,1"]),
        (2, {"CUDA_VISIBLE_DEVICES": "5,GPU-8932f937"}, ["5", "GPU-8932f937"]),
        (4, {"SEEDPOD_DEVICE": "cuda:2"}, [None]),
        (4, {"SEEDPOD_DEVICE": "cpu"}, [None]),
        (0, {"SEEDPOD_GPUS": "2"}, [None, None]),
        (4, {"SEEDPOD_DEVICE": "cpu", "SEEDPOD_GPUS": "3"}, [None, None, None]),
    ],
)
def test_cards_are_shared_out(here: int, environment: dict[str, str], expected: list[str | None]) -> None:
    assert share_out(load_settings(environment), lambda: here) == expected


@pytest.mark.parametrize(
    ("here", "environment"),
    [
        (2, {"SEEDPOD_GPUS": "3"}),
        (2, {"SEEDPOD_SP_SIZE": "4"}),
        (3, {"SEEDPOD_GPUS": "2", "SEEDPOD_SP_SIZE": "2"}),
    ],
)
def test_more_than_there_are_is_refused(here: int, environment: dict[str, str]) -> None:
    with pytest.raises(UnavailableError, match=f"this machine shows {here}") as caught:
        share_out(load_settings(environment), lambda: here)
    assert caught.value.code == "device_unavailable"


@pytest.mark.parametrize("value", ["0", "100", "all", "-1", "1.5"])
def test_a_number_without_sense_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="SEEDPOD_GPUS"):
        load_settings({"SEEDPOD_GPUS": value})


def test_counting_needs_no_driver() -> None:
    assert count_cards() >= 0
