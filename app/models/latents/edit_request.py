"""What may be done to latents, as a request describes it: a list of edits, applied in order.

    [{"kind": "smooth", "sigma": 1.5}, {"kind": "interpolate", "clip": "b", "weight": 0, "end_weight": 1}]

Each edit also has a spelling for the command line: `smooth sigma=1.5`, `mask channels=0,3 outside=true`,
`path points=a@0,b@0.5,c`. An edit never changes how many latents there are or their size. Importing this
needs no torch; `edits.apply` does what is described here.

Clips of latents have names: "a" is the clip that is edited, as it was before the first edit; "b", "c", ...
are others, of which those shorter than "a" hold their last latent. Values are in units of a latent's standard
deviation, which is about 1; moments are fractions of the clip, 0 its first latent and 1 its last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.spelling import as_text

EDITS = 32
OWN = "a"  # the clip that is edited

Clip = Annotated[
    str,
    Field(
        pattern=r"^[a-z][a-z0-9_]{0,31}$",
        description='Name of a clip: "a" is the one that is edited, as it was; "b", "c", ... others.',
    ),
]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[
    int, Field(ge=0, lt=2**63, description="The same seed gives the same result; another one, another.")
]


class _Described(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def clips(self) -> set[str]:
        """Names of the clips that it needs."""
        return set()


class _OfChannels(_Described):
    channels: list[Annotated[int, Field(ge=0, le=1023)]] | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="Channels that are changed, from 0. Unset: all.",
    )


class Noise(_OfChannels):
    """Gaussian noise is added."""

    kind: Literal["noise"]
    strength: float = Field(ge=0, le=10, description="Standard deviation of the noise.")
    still: bool = Field(default=False, description="The same noise on every latent, which does not flicker.")
    seed: Seed = 0


class Scale(_OfChannels):
    """Latents times `factor`, plus `bias`."""

    kind: Literal["scale"]
    factor: float = Field(default=1.0, ge=-10, le=10, description="What latents are multiplied by.")
    bias: float = Field(default=0.0, ge=-10, le=10, description="What is added afterwards.")


class Smooth(_OfChannels):
    """A Gaussian over time: what moves blurs, flicker goes."""

    kind: Literal["smooth"]
    sigma: float = Field(gt=0, le=32, description="Standard deviation of the Gaussian, in latents.")


class Sharpen(_OfChannels):
    """What a Gaussian over time would take away is added once more: changes become stronger."""

    kind: Literal["sharpen"]
    sigma: float = Field(
        default=1.0, gt=0, le=32, description="Standard deviation of the Gaussian, in latents."
    )
    amount: float = Field(default=1.0, ge=0, le=10, description="How much is added; 0 changes nothing.")


class Interpolate(_OfChannels):
    """Towards another clip, latent by latent, by a constant weight or a ramp over time."""

    kind: Literal["interpolate"]
    clip: Clip
    weight: float = Field(
        default=0.5, ge=-1, le=2, description="0 is the clip itself, 1 the other; beyond both, extrapolated."
    )
    end_weight: float | None = Field(
        default=None,
        ge=-1,
        le=2,
        description="Weight of the last latent; those between go there evenly. Unset: it is constant.",
    )
    method: Literal["linear", "spherical"] = Field(
        default="linear",
        description="spherical follows the great circle between two latents (Shoemake 1985), which keeps "
        "their contrast.",
    )

    def clips(self) -> set[str]:
        return {self.clip}


def _point(text: str) -> dict[str, Any]:
    """A point as the command line writes it: `b`, `b@0.5`."""
    clip, at, moment = text.partition("@")
    return {"clip": clip, **({"at": moment} if at else {})}


class Point(_Described):
    """A clip that plays, or one of its moments, held."""

    clip: Clip
    at: Fraction | None = Field(default=None, description="The moment that is held. Unset: the clip plays.")


_Point = Annotated[Point, as_text(_point)]


class Path(_Described):
    """From point to point, evenly over the clip's time. One point with a moment is a still picture."""

    kind: Literal["path"]
    points: list[_Point] = Field(
        min_length=1,
        max_length=64,
        description="Clips, or moments of clips, that are passed in this order. On the command line: "
        "a@0,b@0.5,c.",
    )
    method: Literal["linear", "spherical"] = Field(default="linear", description="As for interpolate.")

    def clips(self) -> set[str]:
        return {point.clip for point in self.points}


class Grid(_Described):
    """A walk over a grid between four corners, each step to a neighbour: row by row, every second one
    backwards. The clip must have a latent for each cell."""

    kind: Literal["grid"]
    corners: list[_Point] = Field(
        min_length=4,
        max_length=4,
        description="Top left, top right, bottom left, bottom right: clips, or moments of clips.",
    )
    rows: int = Field(default=3, ge=2, le=64, description="Rows of the grid.")
    columns: int = Field(default=3, ge=2, le=64, description="Columns of the grid.")

    def clips(self) -> set[str]:
        return {corner.clip for corner in self.corners}


class Arithmetic(_OfChannels):
    """The clip plus `factor` times what one clip has and another has not: a + k (b - c)."""

    kind: Literal["arithmetic"]
    plus: Clip = "b"
    minus: Clip = "c"
    factor: float = Field(default=1.0, ge=-10, le=10, description="k.")

    def clips(self) -> set[str]:
        return {self.plus, self.minus}


class Motion(_OfChannels):
    """The mean over time and what moves around it, apart: freeze, weaken, exaggerate or swap motion."""

    kind: Literal["motion"]
    amount: float = Field(
        default=1.0, ge=-10, le=10, description="Factor on what moves; 0 freezes, 1 changes nothing."
    )
    still_from: Clip | None = Field(
        default=None, description="A clip whose mean over time takes the place of the clip's own."
    )
    motion_from: Clip | None = Field(
        default=None, description="A clip whose motion around its mean takes the place of the clip's own."
    )

    def clips(self) -> set[str]:
        return {name for name in (self.still_from, self.motion_from) if name}


class Quantise(_OfChannels):
    """Every value becomes the middle of the nearest of 2^bits equal steps."""

    kind: Literal["quantise"]
    bits: int = Field(ge=1, le=16, description="Bits of a value.")
    span: float = Field(
        default=4.0, gt=0, le=100, description="Steps lie between -span and span; values beyond are clipped."
    )


class Mask(_OfChannels):
    """Part of the clip is replaced: chosen channels, in a region, for a time."""

    kind: Literal["mask"]
    top: Fraction = Field(default=0.0, description="Upper edge of the region, as a fraction of the height.")
    bottom: Fraction = Field(default=1.0, description="Lower edge of the region.")
    left: Fraction = Field(default=0.0, description="Left edge of the region, as a fraction of the width.")
    right: Fraction = Field(default=1.0, description="Right edge of the region.")
    start: Fraction = Field(default=0.0, description="Where in time it begins, as a fraction of the length.")
    stop: Fraction = Field(default=1.0, description="Where in time it ends.")
    outside: bool = Field(
        default=False, description="Everything outside the region, the time and the channels is replaced."
    )
    value: float = Field(default=0.0, ge=-10, le=10, description="What the part is replaced by.")
    clip: Clip | None = Field(default=None, description="A clip that takes its place, instead of a value.")

    def clips(self) -> set[str]:
        return {self.clip} if self.clip else set()

    @model_validator(mode="after")
    def _encloses(self) -> Mask:
        for low, high in (("top", "bottom"), ("left", "right"), ("start", "stop")):
            a, b = getattr(self, low), getattr(self, high)
            if a >= b:
                raise ValueError(f"{low} {a:g} must be less than {high} {b:g}")
        return self


class Shuffle(_Described):
    """Blocks of latents change places."""

    kind: Literal["shuffle"]
    block: int = Field(default=1, ge=1, le=100_000, description="Latents that stay together.")
    seed: Seed = 0


Described = (
    Noise
    | Scale
    | Smooth
    | Sharpen
    | Interpolate
    | Path
    | Grid
    | Arithmetic
    | Motion
    | Quantise
    | Mask
    | Shuffle
)
_LISTS = {"channels", "points", "corners", "layers"}


def spelled(value: str) -> Any:
    """An edit, or a change of weights, as the command line writes it: `noise strength=0.2 seed=3`, or as a
    JSON object."""
    if value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"it is no JSON object: {error}") from None
    kind, *settings = re.split(r"\s+", value.strip())
    fields: dict[str, Any] = {"kind": kind}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not text or name in fields:
            raise ValueError(f"{setting[:40]!r} is no setting, or there twice; write it once, as name=value")
        fields[name] = text.split(",") if name in _LISTS else text
    return fields


Edit = Annotated[Described, Field(discriminator="kind")]
Spelled = Annotated[Edit, as_text(spelled)]
Edits = Annotated[
    list[Spelled],
    Field(
        max_length=EDITS,
        description="Edits of the latents, in order. On the command line: KIND NAME=VALUE ..., may be "
        'repeated, as in "noise strength=0.3 seed=7".',
        examples=[[{"kind": "noise", "strength": 0.3, "seed": 7}]],
    ),
]


def clips_of(edits: Sequence[_Described]) -> set[str]:
    """Names of the clips, besides the edited one, that a list of edits needs."""
    return {name for edit in edits for name in edit.clips()} - {OWN}
