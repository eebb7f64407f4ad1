"""The OpenAPI page's finishing touches: what FastAPI cannot know of requests that we read ourselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.serve.schemas import ErrorAnswer

REFERENCE: Final = "#/components/schemas/"

WHY: Final[Mapping[int, str]] = {
    400: "The body is not JSON.",
    401: "The key is missing or wrong.",
    404: "No such job, or no such endpoint.",
    413: "The body is too large.",
    415: "The body is not said to be JSON.",
    421: "The request is for a host with a public name, which needs a key.",
    422: "A field of the request is wrong; the message names every one.",
    429: "The queue is full.",
    503: "The worker did not boot, or is stopping.",
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for answers that hold an error."""
    return {status: {"model": ErrorAnswer, "description": WHY[status]} for status in statuses}


def run_body(payloads: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """`openapi_extra` of a route that takes a job: one schema for each task."""
    tasks = [{"$ref": REFERENCE + payload.__name__} for payload in payloads.values()]
    schema = {
        "title": "RunRequest",
        "type": "object",
        "properties": {
            "input": {"description": "What to do.", **(tasks[0] if len(tasks) == 1 else {"oneOf": tasks})},
            "id": {
                "type": "string",
                "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
                "description": "An id of your own. One that is known gives its job; nothing is done twice.",
            },
        },
        "required": ["input"],
        "additionalProperties": False,
    }
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI, payloads: Mapping[str, type[BaseModel]], endpoint: str) -> dict[str, Any]:
    """The app's OpenAPI document, with the payloads' schemas and the endpoint's id, and without the 422 that
    FastAPI writes to every call that takes a parameter: ours are listed where they can happen."""
    document = FastAPI.openapi(app)
    schemas = document["components"]["schemas"]
    _, ours = models_json_schema(
        [(payload, "validation") for payload in payloads.values()], ref_template=REFERENCE + "{model}"
    )
    schemas |= ours["$defs"]
    for operations in document["paths"].values():
        for operation in operations.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "endpoint_id":
                    parameter["schema"]["enum"] = [endpoint]
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    return document
