"""What a job of the API may ask for: JSON's own types, and nothing that only looks like them."""

from __future__ import annotations

from typing import Any

import pytest

from app.errors import UsageError
from app.job.payload import validate

JOB = {"task": "restore", "source": {"path": "clip.mp4"}}


@pytest.mark.parametrize(
    "values", [{"scale": 2}, {"rate": 25}, {"guidance": 0}, {"cuts": False}, {"height": 64}]
)
def test_a_whole_number_is_a_number(values: dict[str, Any]) -> None:
    request = validate({**JOB, **values})
    assert {name: getattr(request, name) for name in values} == values


@pytest.mark.parametrize(
    "values",
    [
        {"height": "512"},
        {"height": 512.5},
        {"height": True},
        {"scale": "2"},
        {"scale": False},
        {"rate": "25"},
        {"seed": "7"},
        {"cuts": "false"},
        {"cuts": 0},
        {"quality": "18"},
        {"codec": 264},
        {"model": 3},
        {"source": {"path": 3}},
        {"source": {"url": ["https://example.com/"]}},
    ],
)
def test_what_only_looks_like_a_value_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        validate({**JOB, **values})
    assert caught.value.code == "request_invalid"
    assert caught.value.message.startswith(next(iter(values)))


@pytest.mark.parametrize("payload", [None, "https://a.example/?key=5ec2e7", ["5ec2e7"], {"task": "a?5ec2e7"}])
def test_what_is_no_payload_is_told_without_its_text(payload: object) -> None:
    with pytest.raises(UsageError) as caught:
        validate(payload)
    assert "5ec2e7" not in caught.value.message
