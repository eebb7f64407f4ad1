"""What the endpoint's API answers, in RunPod's words: models for the OpenAPI page, made from records.

In JSON, names are in camelCase, as the platform's own are. Knows nothing of HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from app.serve.record import Record, State

JobId = Annotated[str, Field(description="The job's id.", examples=["4f1c7a0c6f0d4b0f9d5a3c1b2e8f7a60"])]
JobState = Annotated[
    State, Field(description="The last four are final: a job that has come to one of them stays there.")
]


class Answer(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=to_camel, validate_by_name=True, serialize_by_alias=True
    )


class ErrorDetail(Answer):
    """What went wrong."""

    code: str = Field(description="Stable, to match on.", examples=["request_invalid"])
    message: str = Field(description="For a person: the thing, its value, what was expected, what to do.")


class ErrorAnswer(Answer):
    """The body of every answer that is not 2xx."""

    error: ErrorDetail


class JobAnswer(Answer):
    """A job and where it stands."""

    id: JobId
    status: JobState


class StatusAnswer(JobAnswer):
    """All that is known of a job. What is not known (yet) is left out."""

    output: dict[str, Any] | None = Field(
        default=None,
        description="COMPLETED: the result. IN_PROGRESS: how far it is, as step, percent and eta_seconds.",
    )
    error: str | None = Field(
        default=None,
        description="FAILED, CANCELLED, TIMED_OUT: why, as the JSON text of an object with code and message. "
        "The platform hands on no more than text.",
        examples=['{"code": "job_timeout", "message": "The job ran longer than 10:00, the limit..."}'],
    )
    delay_time: int | None = Field(default=None, description="Milliseconds that the job waited.")
    execution_time: int | None = Field(
        default=None, description="Milliseconds that the job ran, once it has ended."
    )


class Piece(Answer):
    output: dict[str, Any] = Field(description="A piece of the job's output; its number counts from 0.")


class StreamAnswer(Answer):
    """The pieces of the job's output that no earlier call was given."""

    status: JobState
    stream: list[Piece]


class PurgeAnswer(Answer):
    removed: int = Field(description="Jobs that waited, and are cancelled.")
    status: Literal["completed"] = "completed"


class JobCounts(Answer):
    """Jobs since the worker began."""

    completed: int
    failed: int = Field(description="FAILED and TIMED_OUT.")
    in_progress: int
    in_queue: int
    retried: int = Field(description="Always 0: a job runs once here.")


class WorkerCounts(Answer):
    """The workers, one for each job that can run at a time, by what they do. One that is idle or running is
    ready, too."""

    idle: int
    initializing: int
    ready: int
    running: int
    throttled: int
    unhealthy: int


class HealthAnswer(Answer):
    jobs: JobCounts
    workers: WorkerCounts


class ReadyAnswer(Answer):
    state: Literal["ready"] = "ready"
    seconds: float = Field(description="How long the boot took.")


def job_answer(record: Record) -> JobAnswer:
    return JobAnswer(id=record.id, status=record.state)


def status_answer(record: Record) -> StatusAnswer:
    """As on the platform, the output of a job in progress is its progress."""
    output = record.progress if record.state is State.IN_PROGRESS else record.output
    return StatusAnswer(
        id=record.id,
        status=record.state,
        output=None if output is None else dict(output),
        error=None if record.error is None else json.dumps(record.error),
        delay_time=record.delay_ms,
        execution_time=record.execution_ms,
    )


def stream_answer(record: Record, pieces: tuple[Mapping[str, Any], ...]) -> StreamAnswer:
    return StreamAnswer(status=record.state, stream=[Piece(output=dict(piece)) for piece in pieces])


def health_answer(counts: Mapping[State, int], workers: Mapping[str, int]) -> HealthAnswer:
    """`workers` are how many are booting, ready or failed."""
    ready = workers.get("ready", 0)
    running = min(ready, counts[State.IN_PROGRESS])
    return HealthAnswer(
        jobs=JobCounts(
            completed=counts[State.COMPLETED],
            failed=counts[State.FAILED] + counts[State.TIMED_OUT],
            in_progress=counts[State.IN_PROGRESS],
            in_queue=counts[State.IN_QUEUE],
            retried=0,
        ),
        workers=WorkerCounts(
            idle=ready - running,
            initializing=workers.get("booting", 0),
            ready=ready,
            running=running,
            throttled=0,
            unhealthy=workers.get("failed", 0),
        ),
    )
