"""The generate task's request: what a person may ask of Self-Forcing and Wan, with bounds.

Only what can be told from the request itself is checked here.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.job import fields
from app.spelling import as_text

PROMPT = 20_000  # characters; a model reads some 2,500 of them
CHANGES = 64


def _change(text: str) -> Any:
    """A change as the command line writes it: `3.5: A cat runs`."""
    match = re.match(r"\s*(\d+(?:\.\d*)?)\s*:\s*(.*)", text, re.DOTALL)
    if not match:
        raise ValueError("expected SECOND: PROMPT, such as '3: The fox stops'")
    return {"at": float(match[1]), "prompt": match[2]}


class Change(BaseModel):
    """Another prompt from a second on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    at: float = Field(gt=0, le=86_400, description="Second of the result from which on the prompt holds.")
    prompt: str = Field(min_length=1, max_length=PROMPT, description="The prompt.")


class GenerateRequest(BaseModel):
    """Make a video from a prompt with Self-Forcing or Wan 2.1, block by block."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(
        min_length=1,
        max_length=PROMPT,
        description="What the video shows: the scene, what moves, and how the camera sees it. The model "
        "reads 512 tokens.",
        examples=["A cat walks through fresh snow at sunset, close up, the camera follows it."],
    )
    changes: list[Annotated[Change, as_text(_change)]] = Field(
        default=[],
        max_length=CHANGES,
        description="Other prompts from a second on; each holds from the next block. On the command line: "
        "SECOND: PROMPT, may be repeated.",
    )
    negative_prompt: str | None = Field(
        default=None,
        max_length=PROMPT,
        description="What the video must not show; needs guidance. Unset: the one published with Wan 2.1.",
    )
    model: str | None = fields.model("generate", "self-forcing")
    use_ema: bool | None = Field(
        default=None,
        description="Whether the averaged weights (EMA) of a checkpoint are used. Unset: where it has them.",
    )
    height: int = Field(
        default=480, ge=16, le=4096, description="Height in pixels, a multiple of 16. Trained: 480."
    )
    width: int = Field(
        default=832, ge=16, le=4096, description="Width in pixels, a multiple of 16. Trained: 832."
    )
    frames: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Length in frames: 12 n - 3 (81 is what was trained), 12 n + 1 from an image, 12 n after "
        "a clip; 4 n - 3 where the clip is made at once. Unset: as long as the poses, else 81, or the next "
        "there is.",
    )
    seconds: float | None = Field(
        default=None, gt=0, le=86_400, description="Length in seconds, instead of frames; any."
    )
    rate: float = Field(
        default=16.0, ge=1, le=120, description="Frames per second. The models are made for 16."
    )
    seed: int = fields.seed()
    steps: int | None = Field(
        default=None,
        ge=1,
        le=200,
        description="Steps of each block. Unset: 4 for distilled models, 50 for others.",
    )
    guidance: float | None = Field(
        default=None,
        ge=1,
        le=20,
        description="Scale of classifier-free guidance; 1 is none and half the work. Unset: 1 for distilled "
        "models, 5 for others.",
    )
    shift: float | None = Field(
        default=None, ge=1, le=20, description="Shift of the schedule towards noise. Unset: 5."
    )
    window: int | None = Field(
        default=None,
        ge=3,
        le=1024,
        description="Latents (of four frames each) that a block sees, its own three among them. Unset: 21, "
        "as trained; longer clips roll.",
    )
    sink: int = Field(
        default=0,
        ge=0,
        le=1021,
        description="How many of the first latents stay in the window while it rolls; 3 holds long clips "
        "together.",
    )
    codec: Literal["h264", "hevc10", "h264_10", "lossless"] = Field(
        default="h264",
        description="h264: 8 bits, plays everywhere. h264_10, hevc10: 10 bits. lossless: every value kept.",
    )
    quality: int | None = fields.quality("h264, h264_10 and hevc10")
    keep_partial: bool = Field(
        default=False,
        description="Whether a job that is stopped leaves what it made so far, as a video that plays.",
    )

    @model_validator(mode="after")
    def _agree(self) -> GenerateRequest:
        if self.frames is not None and self.seconds is not None:
            raise ValueError("the length is given in more than one way; give frames or seconds")
        times = [change.at for change in self.changes]
        if times != sorted(set(times)):
            raise ValueError("the changes are not in order; give each a later second than the one before")
        if self.window is not None and self.sink > self.window - 3:
            raise ValueError(
                f"a sink of {self.sink} leaves no room for a block in a window of {self.window}; give a sink "
                f"of at most {self.window - 3}"
            )
        return self
