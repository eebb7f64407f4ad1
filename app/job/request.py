"""Requests: what a person may ask of each task, with bounds. The command line's options and the JSON
schema come from these fields.

Only what can be told from the request itself is checked here; what depends on the clip or the machine is
checked where it is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby, islice, pairwise
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from app.errors import UsageError
from app.job import fields
from app.spelling import JSON

MOST = 20  # wrong fields that a message names
Codec = Literal["h264", "hevc10", "h264_10", "lossless", "png"]


class RestoreRequest(BaseModel):
    """Sharpen, clean and upscale a clip or an image with SeedVR2."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = fields.model("restore", "seedvr2-3b")
    height: int | None = Field(
        default=None, ge=16, le=8192, description="Height of the result, in pixels; alone, keeps the shape."
    )
    width: int | None = Field(
        default=None, ge=16, le=8192, description="Width of the result, in pixels; alone, keeps the shape."
    )
    scale: float | None = Field(
        default=None, gt=0, le=16, description="Factor on both sides, instead of height or width."
    )
    short_side: int | None = Field(
        default=None,
        ge=16,
        le=8192,
        description="Shorter side of the result, in pixels, instead of the others.",
    )
    seed: int = fields.seed()
    steps: int = Field(default=1, ge=1, le=100, description="Diffusion steps. The models are made for one.")
    guidance: float = Field(
        default=1.0,
        ge=0,
        le=20,
        description="Scale of classifier-free guidance; 1 is none and half the work.",
    )
    rescale: float = Field(default=0.0, ge=0, le=1, description="Guidance rescale.")
    condition_noise: float = Field(
        default=0.0, ge=0, le=1, description="Noise on the source before it is restored; more invents more."
    )
    window: int = Field(
        default=31,
        ge=5,
        le=255,
        description="Latents (of four frames each) that the transformer sees at once. Longer windows hold "
        "together better and take more memory.",
    )
    tile: int | None = Field(
        default=None,
        ge=0,
        le=8192,
        description="Pixels of the side of a tile that the autoencoder takes at once, 256 or more; 0: whole "
        "frames. Unset: whole frames where memory allows, else the largest tiles that fit.",
    )
    fit: Literal["pad", "crop"] = Field(
        default="pad",
        description="How sides are made multiples of 16: pad keeps the whole picture, crop cuts the edges "
        "as the original does.",
    )
    color: Literal["lab", "wavelet", "adain", "none"] = Field(
        default="lab", description="Colour repair against the source; lab is the closest on most material."
    )
    cuts: bool = Field(
        default=True, description="Find cuts and restore each shot on its own. Off: the clip is one shot."
    )
    rate: float | None = Field(
        default=None,
        ge=0.01,
        le=240,
        description="Frames per second of the result. Unset: the source's, exactly.",
    )
    codec: Codec = Field(
        default="h264",
        description="h264: 8 bits, plays everywhere. h264_10, hevc10: 10 bits. lossless: every value kept. "
        "png: a folder of numbered frames. Not for images.",
    )
    quality: int | None = fields.quality("h264, h264_10 and hevc10")

    @field_validator("tile")
    @classmethod
    def _tile(cls, value: int | None) -> int | None:
        if value is not None and 0 < value < 256:
            raise ValueError("a tile has 256 pixels or more, or 0 stands for whole frames")
        return value

    @model_validator(mode="after")
    def _one_size(self) -> RestoreRequest:
        given = [self.height or self.width, self.scale, self.short_side]
        if sum(way is not None for way in given) > 1:
            raise ValueError("the size is given in more than one way; give height and/or width, or scale, or "
                             "short_side")  # fmt: skip
        return self


Frame = Annotated[int, Field(ge=0, le=1_000_000_000)]


class Part(BaseModel):
    """Which part of a longer clip a source holds, and which frames the result shall hold: parts that many
    workers make are then, put together, what one worker would have made.

    Frames are numbered in the whole clip, at the rate of the result.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    source_start: Frame = Field(description="The frame of the whole clip that the source begins with.")
    start: Frame = Field(description="The first frame of the result.")
    stop: Frame = Field(description="The frame after the last one of the result.")
    shot: Frame = Field(description="Number of the shot that `start` lies in, from 0.")
    edges: list[Frame] = Field(
        min_length=2,
        max_length=100_000,
        description="The frames that this shot and each later one begin with, and last the frame after the "
        "shot that the result ends in.",
        examples=[[0, 250, 700]],
    )

    @model_validator(mode="after")
    def _in_order(self) -> Part:
        if any(b <= a for a, b in pairwise(self.edges)):
            raise ValueError("edges must rise")
        if (
            not self.edges[0] <= self.start < self.edges[1]
            or not self.edges[-2] < self.stop <= self.edges[-1]
        ):
            raise ValueError(
                f"start {self.start} must lie in the first shot of edges, and the frame before stop "
                f"{self.stop} in the last"
            )
        if not self.source_start <= self.start < self.stop:
            raise ValueError(
                f"source_start {self.source_start}, start {self.start} and stop {self.stop} must follow each "
                "other"
            )
        return self


Request = TypeVar("Request", bound=BaseModel)


def parse(request: type[Request], values: Mapping[str, Any], *, json: bool = False) -> Request:
    """The request that `values` hold. They are text, as on the command line, or `json`: then each is of the
    type that the schema says, and nothing else is taken for it.

    Raises:
        UsageError: `request_invalid`, naming every field that is wrong, its value and what it may be.
    """
    try:
        return request.model_validate(values, strict=json or None, context=JSON if json else None)
    except ValidationError as error:
        raise UsageError("request_invalid", " ".join(_sentences(request, error))) from None


def _sentences(request: type[BaseModel], error: ValidationError) -> list[str]:
    sentences = []
    problems = error.errors(include_url=False)
    for problem in problems[:MOST]:
        name = ".".join(str(part) for part, _ in groupby(problem["loc"]))  # source.url, of source.url.url
        reason = problem["msg"].removeprefix("Value error, ")
        reason = reason[:1].lower() + reason[1:]
        if problem["type"] == "extra_forbidden":
            known = f"; fields: {', '.join(request.model_fields)}" if len(problem["loc"]) == 1 else ""
            sentences.append(f"{name[:200]} is not a field of this request{known}.")
        elif not name:
            sentences.append(f"{reason[:1].upper()}{reason[1:]}.")
        else:
            field = request.model_fields.get(str(problem["loc"][0]))
            meaning = f" {name}: {field.description}" if field else ""
            sentences.append(f"{name} is {told(problem['input'])}: {reason}.{meaning}")
    if len(problems) > MOST:
        sentences.append(f"And {len(problems) - MOST:,} more.")
    return sentences


def told(value: Any) -> str:
    """A value of a request as a message may repeat it. What may be a secret, as a signed link is, or is
    long, is only described."""
    if isinstance(value, Mapping):
        return f"an object of {len(value)} ({', '.join(str(name)[:20] for name in islice(value, 8))})"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, str) and (len(value) > 80 or any(mark in value for mark in ("://", "@", "?"))):
        return f"a text of {len(value):,} characters"
    return repr(value)[:82]
