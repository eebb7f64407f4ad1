"""The autoencode task's request: what a person may ask of a video autoencoder, with bounds.

Only what can be told from the request itself is checked here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.job import fields
from app.models.latents.edit_request import Edits, clips_of
from app.models.latents.weights_request import Changes, InterpolateWeights

OTHERS = ("b", "c")  # clips beside the one that is edited


class AutoencodeRequest(BaseModel):
    """Encode a clip, look at its latents, change them, decode, compare."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = fields.model("autoencode", "sd-vae-ft-mse")
    edits: Edits = []
    weights: Changes = []
    short_side: int | None = Field(
        default=None,
        ge=16,
        le=4096,
        description="Shorter side that the clip is resized to first, in pixels. Unset: as it is.",
    )
    frames: int | None = Field(
        default=None, ge=1, le=1_000_000, description="How many of the clip's first frames. Unset: all."
    )
    fit: Literal["reflect", "edge", "resize"] = Field(
        default="reflect",
        description="How sides that the codec cannot take are made to fit: mirrored or repeated beyond the "
        "edge, and cut again, or resized and resized back.",
    )
    report: bool = Field(
        default=True,
        description="Whether the latents are analysed: numbers as JSON, plots as PNG, and one HTML page.",
    )
    codec: Literal["h264", "lossless"] = Field(
        default="h264", description="h264: 8 bits, plays everywhere. lossless: every value kept."
    )
    quality: int | None = fields.quality("h264")

    @model_validator(mode="after")
    def _known_clips(self) -> AutoencodeRequest:
        if strange := clips_of(self.edits) - set(OTHERS):
            raise ValueError(
                f"an edit needs the clip {min(strange)!r}; the clips are 'a', which is edited, and "
                f"{' and '.join(map(repr, OTHERS))}"
            )
        return self


def weights_of(request: AutoencodeRequest) -> list[str]:
    """Names of models whose weights the request interpolates with."""
    named = [change.other for change in request.weights if isinstance(change, InterpolateWeights)]
    return list(dict.fromkeys(named))
