"""Many jobs from many clients against whatever serves them: what each ended as, and what memory did.

Made for a `Lifecycle` in this process and for servers alike: a `Client` is all that differs.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from app.errors import InputError
from app.serve.lifecycle import Lifecycle
from app.serve.reporter import Reporter

Kind = Literal["good", "bad", "cancelled", "slow"]
EXPECTED: Mapping[Kind, set[str]] = {
    "good": {"COMPLETED"},
    "bad": {"FAILED"},
    "cancelled": {"CANCELLED", "COMPLETED"},  # a cancel may come when the work is done
    "slow": {"TIMED_OUT"},
}


@dataclass(frozen=True)
class Planned:
    """A job to submit, and what is meant to become of it."""

    id: str
    kind: Kind


class Client(Protocol):
    """A caller of a server."""

    async def submit(self, job: Planned) -> None: ...

    async def cancel(self, job_id: str) -> None: ...

    async def finals(self, job_id: str) -> list[str]:
        """Wait for the end of a job; the final states it was ever said to be in, by all ways to ask."""


@dataclass
class Report:
    """Final states of each job, and bytes of memory after the first jobs and at the end."""

    states: dict[str, list[str]] = field(default_factory=dict)
    early: int = 0
    late: int = 0


def plan(count: int, weights: Mapping[Kind, float], seed: int = 0) -> list[Planned]:
    """`count` jobs, mixed in a fixed random order."""
    kinds = random.Random(seed).choices(list(weights), list(weights.values()), k=count)
    return [Planned(f"soak-{number}", kind) for number, kind in enumerate(kinds)]


async def soak(
    clients: Sequence[Client], jobs: Sequence[Planned], memory: Callable[[], int], early: int = 50
) -> Report:
    """Submit all jobs, each client one after the other; memory is measured between jobs."""
    report = Report({job.id: [] for job in jobs})
    for part in (jobs[:early], jobs[early:]):
        left = iter(part)
        await asyncio.gather(*(_work(client, left, report) for client in clients))
        gc.collect()
        report.early, report.late = report.late, memory()
    return report


async def _work(client: Client, left: Iterator[Planned], report: Report) -> None:
    chance = random.Random(1)
    for job in left:
        await client.submit(job)
        if job.kind == "cancelled":
            await asyncio.sleep(chance.random() * 0.02)  # some wait still, some run
            await client.cancel(job.id)
        report.states[job.id] = await client.finals(job.id)


def wrong(report: Report, jobs: Sequence[Planned]) -> list[tuple[Planned, list[str]]]:
    """The jobs that did not end in exactly one final state, or in another one than was meant."""
    states = report.states
    return [
        (job, states[job.id])
        for job in jobs
        if len(set(states[job.id])) != 1 or not set(states[job.id]) <= EXPECTED[job.kind]
    ]


def resident(pid: int | str = "self") -> int:
    """Bytes of memory that a process holds, on Linux."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ------------------------------------------------------------------ jobs that take milliseconds


def toy(job_id: str, payload: Mapping[str, Any], reporter: Reporter) -> Mapping[str, Any]:
    """A job with a payload, a stream and a result of some size; "slow" goes on until it is stopped."""
    reporter.start("fetch", len(payload["data"]), "B")
    reporter.advance(len(payload["data"]))
    reporter.finish()
    steps = 100_000 if payload["kind"] == "slow" else 4
    reporter.start("restore", steps, "frames")
    for step in range(steps):
        reporter.check()
        time.sleep(0.001)
        reporter.advance(1)
        if step < 4:
            reporter.emit({"frame": payload["data"][:1000]})
    if payload["kind"] == "bad":
        raise (
            InputError("input_damaged", "The video is damaged.") if job_id[-1] < "5" else RuntimeError("ours")
        )
    reporter.finish()
    return {"data": payload["data"][::-1]}


class Caller:
    """A client of a `Lifecycle` in this process; submits `size` bytes, and from a thread of its own."""

    def __init__(self, jobs: Lifecycle, size: int = 64 << 10) -> None:
        self._jobs, self._size = jobs, size

    async def submit(self, job: Planned) -> None:
        data = random.Random(job.id).randbytes(self._size // 2).hex()
        await asyncio.to_thread(self._jobs.submit, {"kind": job.kind, "data": data}, job.id)

    async def cancel(self, job_id: str) -> None:
        await asyncio.to_thread(self._jobs.cancel, job_id)

    async def finals(self, job_id: str) -> list[str]:
        told = [update.final async for update in self._jobs.updates(job_id)]
        assert told[-1], "nothing comes after the final record"
        known = [record for record in (self._jobs.get(job_id),) if record]  # None: forgotten already
        return [record.state.value for record in (*told, *known) if record]
