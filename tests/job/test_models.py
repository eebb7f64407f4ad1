"""Which model does a job, and what is refused before it is queued."""

from __future__ import annotations

from typing import Any

import pytest

from app.errors import UsageError
from app.job.models import check_served
from app.job.payload import validate

TASKS = {"nano": "restore", "sd": "autoencode", "wan-vae": "autoencode"}
SOURCE = {"source": {"path": "clip.mp4"}}
RESTORE: dict[str, Any] = {"task": "restore", **SOURCE}
AUTOENCODE: dict[str, Any] = {"task": "autoencode", **SOURCE}


def other(name: str) -> dict[str, Any]:
    return {"weights": [{"kind": "interpolate", "amount": 0.5, "other": name}]}


@pytest.mark.parametrize(
    "payload",
    [
        RESTORE,
        {**RESTORE, "model": "nano"},
        {**AUTOENCODE, "model": "sd"},
        {**AUTOENCODE, "model": "sd", **other("wan-vae")},
    ],
)
def test_what_a_worker_can_do(payload: dict[str, Any]) -> None:
    check_served(TASKS, validate(payload))


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        (
            {"task": "generate", "prompt": "A fox"},
            "no model was named; this worker serves no model that does generate, but restore, autoencode",
        ),
        ({**RESTORE, "model": "sd"}, "model is 'sd'; this worker serves nano for restore"),
        ({**RESTORE, "model": "x" * 1_000_000}, "xx'; this worker serves nano for restore"),
        (AUTOENCODE, "no model was named; this worker serves sd, wan-vae for autoencode"),
        ({**AUTOENCODE, "model": "sd", **other("nano")}, "model is 'nano'; this worker serves sd, wan-vae"),
    ],
)
def test_what_it_cannot_is_told_with_what_it_can(payload: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match="model") as caught:
        check_served(TASKS, validate(payload))
    assert caught.value.code == "model_not_served" and told in caught.value.message
    assert len(caught.value.message) < 300
