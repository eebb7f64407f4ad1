"""What a job of the API may ask for: its task, its source, the task's own fields, and the result's form.

Torch-free: a payload is checked before it is queued, and its JSON schema is published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field

from app.errors import UsageError
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


PAYLOADS: Mapping[str, type[RestorePayload]] = {"restore": RestorePayload}


def validate(payload: Any) -> RestorePayload:
    """The payload of a job, checked; nothing else is touched.

    Raises:
        UsageError: `request_invalid`, naming every field that is wrong.
    """
    if not isinstance(payload, Mapping):
        raise UsageError("request_invalid", f"input is {told(payload)}; expected an object with a task.")
    task = payload.get("task")
    if not isinstance(task, str) or task not in PAYLOADS:
        raise UsageError("request_invalid", f"task is {told(task)}; it may be {', '.join(PAYLOADS)}.")
    return parse(PAYLOADS[task], payload)
