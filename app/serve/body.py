"""The body of a request to run a job: read within a limit, and taken apart.

Every refusal is ours, with a code. What is in `input` is not looked at here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic_core import from_json

from app.errors import UsageError
from app.progress import amount_text

FIELDS: Final = ("input", "id")


@dataclass(frozen=True)
class RunRequest:
    """A job to run. `job_id` is None where the caller leaves it to the worker."""

    payload: Mapping[str, Any]
    job_id: str | None


async def read_body(chunks: AsyncIterator[bytes], limit: int) -> bytes:
    """The whole body, of at most `limit` bytes; never more is held.

    Raises:
        UsageError: `request_too_large`.
    """
    body = bytearray()
    async for chunk in chunks:
        if len(body) + len(chunk) > limit:
            raise UsageError(
                "request_too_large",
                f"The request has more than {amount_text(limit, 'B')}, the limit of this call; expected a "
                "smaller one. Give a large source as a url or a path instead of base64.",
            )
        body += chunk
    return bytes(body)


def check_type(content_type: str) -> None:
    """Only a body that says it is JSON is read. A web page cannot send one to another site unasked, so that
    no page that is open on a desk can submit jobs to its server.

    Raises:
        UsageError: `request_not_json_type`.
    """
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise UsageError(
            "request_not_json_type",
            f"Content-Type is {content_type[:80]!r}; expected application/json. Send that header with the "
            "request.",
        )


def parse_run(body: bytes) -> RunRequest:
    """The job that a body asks for.

    Raises:
        UsageError: `request_not_json` or `request_invalid`.
    """
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise UsageError(
            "request_not_json",
            f'The body is not JSON: {error}; expected {{"input": {{...}}}} in UTF-8.',
        ) from None
    if not isinstance(values, dict):
        raise _invalid(f"The body is {_kind(values)}")
    for name in values:
        if name not in FIELDS:
            raise _invalid(f"{name[:80]!r} is not a field of the body")
    if not isinstance(values.get("input"), dict):
        raise _invalid(f"input is {_kind(values['input'])}" if "input" in values else "input is missing")
    job_id = values.get("id")
    if "id" in values and not isinstance(job_id, str):
        raise _invalid(f"id is {_kind(job_id)}, which is not text")
    return RunRequest(values["input"], job_id)


def _invalid(what: str) -> UsageError:
    return UsageError(
        "request_invalid",
        f'{what}; expected {{"input": {{...}}}}, and "id" if the job\'s id is to be yours. Webhooks, '
        "policies and buckets of the caller's are not taken.",
    )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
