"""What may be done to a codec's weights, as a request describes it: a list of changes, applied in order.

On the command line: `noise layers=decoder.* strength=0.1`. Importing this needs no torch; `weights.py` does
what is described here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.models.latents import weights
from app.models.latents.edit_request import spelled
from app.spelling import as_text

WHOLE = 2**63 - 1


class _Change(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    layers: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        default=["*"],
        min_length=1,
        max_length=64,
        description='Shell patterns of the names of layers or tensors, such as "decoder.*".',
    )


class ScaleWeights(_Change):
    """Weights times `factor`."""

    kind: Literal["scale"]
    factor: float = Field(ge=-100, le=100, description="The factor.")


class NoiseWeights(_Change):
    """Plus Gaussian noise."""

    kind: Literal["noise"]
    strength: float = Field(
        ge=0, le=100, description="Standard deviation over each tensor's root mean square."
    )
    seed: int = Field(default=0, ge=0, le=WHOLE, description="Seed of the noise.")


class PruneWeights(_Change):
    """The smallest become 0."""

    kind: Literal["prune"]
    share: float = Field(ge=0, le=1, description="Share of each tensor's numbers.")


class QuantiseWeights(_Change):
    """Rounded to 2^bits - 1 levels."""

    kind: Literal["quantise"]
    bits: int = Field(ge=1, le=16, description="Bits of a weight.")


class InterpolateWeights(_Change):
    """Towards the weights of another model."""

    kind: Literal["interpolate"]
    amount: float = Field(ge=0, le=1, description="0 is the model itself, 1 the other.")
    other: str = Field(
        min_length=1, max_length=200, description="Name of the other model, of the same shape."
    )


Change = ScaleWeights | NoiseWeights | PruneWeights | QuantiseWeights | InterpolateWeights
Changes = Annotated[
    list[Annotated[Annotated[Change, Field(discriminator="kind")], as_text(spelled)]],
    Field(
        max_length=weights.MOST_CHANGES,
        description="Changes of the codec's weights, in order, for the edited result. On the command line: "
        'KIND NAME=VALUE ..., may be repeated, as in "noise layers=decoder.* strength=0.1".',
    ),
]


def changes_of(described: list[Change]) -> tuple[weights.Change, ...]:
    """The changes that are described."""
    return weights.parse([change.model_dump() for change in described])
