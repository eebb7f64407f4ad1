"""A lifecycle with toy jobs, and ways to wait for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from app.serve.lifecycle import Lifecycle, Run
from app.serve.record import Record, State, Update
from app.serve.reporter import Reporter

Payload = Mapping[str, Any]


def stepping(steps: int = 10_000, seconds: float = 0.002) -> Run:
    """A job of many short steps."""

    def run(job_id: str, payload: Payload, reporter: Reporter) -> Payload:
        reporter.start("restore", steps, "frames")
        for _ in range(payload.get("steps", steps)):
            reporter.check()
            time.sleep(seconds)
            reporter.advance(1)
        reporter.finish()
        return {"id": job_id}

    return run


def made(run: Run, **changes: Any) -> Lifecycle:
    return Lifecycle(run, **{"timeout": 60.0, "keep_seconds": 60.0, **changes})


def finished(jobs: Lifecycle, job_id: str, seconds: float = 10.0) -> Record:
    record = asyncio.run(jobs.wait(job_id, seconds))
    assert record.state.final
    return record


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def running(jobs: Lifecycle, job_id: str) -> None:
    until(lambda: (record := jobs.get(job_id)) and record.state is State.IN_PROGRESS)


async def all_updates(jobs: Lifecycle, job_id: str) -> list[tuple[float, Update]]:
    return [(time.monotonic(), update) async for update in jobs.updates(job_id)]
