"""A local server on loopback with jobs that only count, for tests of its API."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import requests
import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.errors import UsageError
from app.serve.lifecycle import Lifecycle
from app.serve.local import create_app
from app.serve.reporter import Reporter

SECRET_PATH = "/var/lib/seedpod/job-7/in.mp4"


class Count(BaseModel):
    """Count to `steps`, two milliseconds each."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(default=1, ge=0, le=100_000)
    pieces: int = Field(default=0, ge=0, le=100, description="Pieces to stream, one after each step.")
    fail: bool = False
    note: str = ""


def validate(payload: Mapping[str, Any]) -> Count:
    try:
        return Count.model_validate(payload)
    except ValidationError as error:
        raise UsageError("request_invalid", f"{error.errors()[0]['loc']} is wrong.") from None


def count(job_id: str, payload: Mapping[str, Any], reporter: Reporter) -> Mapping[str, Any]:
    asked = Count(**payload)
    reporter.start("restore", asked.steps, "frames")
    for step in range(asked.steps):
        reporter.check()
        time.sleep(0.002)
        reporter.advance(1)
        if step < asked.pieces:
            reporter.emit({"step": step})
    if asked.fail:
        raise RuntimeError(f"cannot read {SECRET_PATH}")
    return {"counted": asked.steps, "nothing": None}


@dataclass
class FakeBoot:
    state: Literal["booting", "ready", "failed"] = "ready"
    reason: str | None = None
    seconds: float = 1.5

    @property
    def workers(self) -> Mapping[str, int]:
        return {self.state: 1}


@dataclass
class Served:
    """A server that runs: its address, and what is behind it."""

    url: str
    jobs: Lifecycle
    boot: FakeBoot

    def get(self, path: str, **options: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=10, **options)

    def post(self, path: str, **options: Any) -> requests.Response:
        return requests.post(self.url + path, timeout=10, **options)

    def submit(self, **payload: Any) -> str:
        return str(self.post("/run", json={"input": payload}).json()["id"])

    def status(self, job_id: str) -> dict[str, Any]:
        return dict(self.get(f"/status/{job_id}").json())

    def until(self, job_id: str, *states: str) -> dict[str, Any]:
        end = time.monotonic() + 10
        while (status := self.status(job_id))["status"] not in states:
            assert time.monotonic() < end, status
            time.sleep(0.005)
        return status


def lifecycle(run: Any = count, **changes: Any) -> Lifecycle:
    return Lifecycle(run, **{"timeout": 60.0, "keep_seconds": 60.0, **changes})


@contextmanager
def serving(jobs: Lifecycle | None = None, boot: FakeBoot | None = None, **options: Any) -> Iterator[Served]:
    """A server in a thread, on a free port; it ends with the block."""
    jobs, boot = jobs or lifecycle(), boot or FakeBoot()
    options = {"validate": validate, "payloads": {"count": Count}, **options}
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(create_app(jobs, boot, **options), lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", jobs, boot)
        finally:
            server.should_exit = True
            thread.join()
