"""What a job of the API may ask for: its task, its source, the task's own fields, and the result's form.

Torch-free: a payload is checked before it is queued, and its JSON schema is published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from app.errors import UsageError
from app.job.autoencode_request import AutoencodeRequest
from app.job.generate_request import GenerateRequest
from app.job.request import Part, RestoreRequest, parse, told
from app.job.source import Media


class RestorePayload(RestoreRequest):
    """Restore a clip or an image: a job's `input`."""

    # JSON says what is a number; text is read as one only on the command line, which has nothing else.
    model_config = ConfigDict(strict=True)

    task: Literal["restore"] = Field(description="The task.")
    source: Media = Field(
        description="The clip or image: one of url, base64, or path under the mounted input folder.",
        examples=[{"url": "https://example.com/clip.mp4"}],
    )
    container: Literal["mp4", "mov", "mkv"] = Field(default="mp4", description="Container of a clip.")
    picture: Literal["png", "jpg", "webp"] = Field(default="png", description="Format of an image.")
    part: Part | None = Field(
        default=None,
        description="Set where the source is a part of a longer clip, so that parts that many workers make "
        "join without a seam. `cuts` then means nothing, and there is no sound.",
    )


class GeneratePayload(GenerateRequest):
    """Make a video from a prompt: a job's `input`."""

    model_config = ConfigDict(strict=True)

    task: Literal["generate"] = Field(description="The task.")
    start: Media | None = Field(
        default=None,
        description="An image that the video begins with, or a clip that it goes on from: one of url, "
        "base64, or path under the mounted input folder.",
        examples=[{"url": "https://example.com/start.png"}],
    )
    pose: Media | None = Field(
        default=None, description="A clip of rendered poses, one for each frame of the result."
    )
    pose_reference: Media | None = Field(
        default=None, description="The rendered pose of the image, for image-conditioned models with poses."
    )
    container: Literal["mp4", "mov", "mkv"] = Field(default="mp4", description="Container of the video.")
    stream: bool = Field(
        default=False,
        description="Whether the job's stream gives the video while it is made, in pieces of fragmented MP4 "
        "that play as they arrive. Needs container mp4 and codec h264.",
    )

    @model_validator(mode="after")
    def _streamable(self) -> GeneratePayload:
        if self.stream and (self.container != "mp4" or self.codec != "h264"):
            raise ValueError("a stream is of container mp4 and codec h264; leave both as they are")
        return self


class AutoencodePayload(AutoencodeRequest):
    """Take a clip through a video autoencoder: a job's `input`. The result is an archive of files."""

    model_config = ConfigDict(strict=True)

    task: Literal["autoencode"] = Field(description="The task.")
    source: Media = Field(
        description="The clip or image: one of url, base64, or path under the mounted input folder.",
        examples=[{"url": "https://example.com/clip.mp4"}],
    )
    b: Media | None = Field(default=None, description='The clip that edits call "b".')
    c: Media | None = Field(default=None, description='The clip that edits call "c".')


Payload = RestorePayload | GeneratePayload | AutoencodePayload
PAYLOADS: Mapping[str, type[Payload]] = {
    "restore": RestorePayload,
    "generate": GeneratePayload,
    "autoencode": AutoencodePayload,
}


def validate(payload: Any) -> Payload:
    """The payload of a job, checked; nothing else is touched.

    Raises:
        UsageError: `request_invalid`, naming every field that is wrong.
    """
    if not isinstance(payload, Mapping):
        raise UsageError("request_invalid", f"input is {told(payload)}; expected an object with a task.")
    task = payload.get("task")
    if not isinstance(task, str) or task not in PAYLOADS:
        raise UsageError("request_invalid", f"task is {told(task)}; it may be {', '.join(PAYLOADS)}.")
    return parse(PAYLOADS[task], payload, json=True)
