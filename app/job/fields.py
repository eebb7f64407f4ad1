"""Fields that the requests of several tasks have."""

from __future__ import annotations

from typing import Any

from pydantic import Field


def model(task: str, example: str) -> Any:
    """Which model does it: `str | None`."""
    return Field(
        default=None,
        description=f"Model of the manifest. Unset: the only {task} model there is.",
        examples=[example],
    )


def seed() -> Any:
    """What noise is drawn from: `int`."""
    return Field(
        default=0,
        ge=0,
        lt=2**63,
        description="Seed of the noise. The same seed and settings give the same result.",
    )


def quality(codecs: str) -> Any:
    """How well these codecs keep a result: `int | None`."""
    return Field(
        default=None,
        ge=0,
        le=51,
        description=f"Constant rate factor of {codecs}; lower is better and larger. Unset: a visually "
        "lossless one.",
    )
