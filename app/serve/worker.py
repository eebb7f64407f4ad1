"""The worker on RunPod: hands the lifecycle of jobs to `runpod.serverless`, which takes, pings and reports.

`runpod.serverless.start`, its `handler` and `register_fitness_check` are public. Three names of the SDK
that are not are replaced, since after SIGTERM its loop goes on taking a job that it then never runs:
`rp_scale.get_job` (the long poll), `rp_scale.handle_job` (running and reporting one job) and
`JobScaler.handle_shutdown` (the signal). One more is used: `rp_http.send_result`, since the public
`progress_update` sends from a thread of its own that nobody can wait for. The SDK is pinned, and
`tests/serve/test_worker.py` fails when any of these changes.

Knows nothing of models or video.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, Protocol

from app import logs
from app.errors import SeedpodError, UnavailableError
from app.serve.lifecycle import Lifecycle
from app.serve.outcome import of_error
from app.serve.record import Record, State
from app.serve.stop import Stop, leave

if TYPE_CHECKING:
    import threading

    from aiohttp import ClientSession

    from app.serve.poll import Poll

Job = Mapping[str, Any]  # as the platform gives it: {"id", "input", ...}

SDK: Final = "1.12.0"  # the version of runpod whose insides are replaced below
POLL: Final = 80.0  # seconds; the SDK drops a poll after 90, with what is on its way
BEGIN: Final = 2.0  # seconds that a job which was taken may need until it runs
REPORT: Final = 10.0  # seconds that the last report of a job may take when the worker stops
LAST_PROGRESS: Final = 5.0  # seconds that a result waits for a progress update which is on its way
GIVE_UP: Final = 0.5  # seconds that a boot has to remove its partial files
# What the SDK reads of the environment when it is imported, where the user did not set it.
SDK_SETTINGS: Final = {
    # It refuses a worker with less of its disk free, by default 10. Staging leaves 10% free itself, and what
    # else is written until the SDK looks must not fail the worker.
    "RUNPOD_MIN_DISK_PERCENT": "5",
    "RUNPOD_LOG_LEVEL": "INFO",  # DEBUG, its default, prints what jobs ask for and what they are answered
}
_SECRET: Final = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")
_log = logging.getLogger(__name__)


class Boot(Protocol):
    """What the worker must know of a boot."""

    cancel: threading.Event

    @property
    def state(self) -> str: ...  # booting, ready or failed

    @property
    def reason(self) -> str | None: ...


def serve_on_platform(
    lifecycle: Lifecycle,
    boot: Boot,
    stop: Stop,
    *,
    validate: Callable[[Any], object],
    grace: float,
    streams: Callable[[Any], bool] = lambda payload: False,
) -> None:
    """Serve the platform's jobs until the process is asked to stop. Never returns; main thread only.

    No job is taken before the boot is over: it is the last fitness check, behind the SDK's own, which run
    beside it. A boot that fails is reported to the platform with its reason, and the process exits with 1;
    the jobs wait for a worker that is whole.

    Args:
        stop: Installed since the process began.
        validate: Raises SeedpodError for a payload that is wrong.
        grace: Seconds that the running job has after SIGTERM.
        streams: Whether a job with this payload is answered piece by piece.
    """
    stop.then(lambda: give_up(boot))
    for name, value in SDK_SETTINGS.items():
        os.environ.setdefault(name, value)

    import runpod
    from runpod.serverless.modules import rp_http, rp_scale

    worker = Worker(
        lifecycle,
        stop,
        fetch=rp_scale.get_job,
        report=rp_scale.handle_job,
        send=rp_http.send_result,
        validate=validate,
        streams=streams,
        grace=grace,
        on_start=lambda: forget_secrets(os.environ),
    )
    rp_scale.get_job = worker.take
    rp_scale.handle_job = worker.work
    rp_scale.JobScaler.handle_shutdown = lambda scaler, number, frame: stop.handle(number, frame)
    runpod.serverless.register_fitness_check(boot_is_last(boot, runpod.serverless.register_fitness_check))
    runpod.serverless.start({"handler": None})  # each job brings its own, see `Worker.work`


def give_up(boot: Boot) -> None:
    """Stop before any job could be taken: cancel the boot, and leave."""
    boot.cancel.set()
    end = time.monotonic() + GIVE_UP
    while boot.state == "booting" and time.monotonic() < end:
        time.sleep(0.01)
    leave()


def boot_is_last(boot: Boot, register: Callable[[Any], Any]) -> Callable[[], None]:
    """A fitness check that registers the boot's behind all others: the SDK adds its own before it runs
    any, and looks for further ones until it has run them all."""

    async def checkpoints() -> None:
        while boot.state == "booting":
            await asyncio.sleep(0.02)
        if boot.state == "failed":
            raise UnavailableError("boot_failed", boot.reason or "The boot failed; see the log.")

    def seedpod() -> None:
        register(checkpoints)

    return seedpod


def forget_secrets(environ: MutableMapping[str, str]) -> None:
    """Drop every variable that names a secret, so that no child inherits one."""
    for name in [name for name in environ if any(word in name.upper() for word in _SECRET)]:
        del environ[name]


class Worker:
    """What replaces the SDK's insides: it takes jobs, follows them through the lifecycle, and stops."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        stop: Stop,
        *,
        fetch: Callable[[ClientSession, int], Awaitable[list[Job] | None]],
        report: Callable[[ClientSession, dict[str, Any], Job], Awaitable[None]],
        send: Callable[[ClientSession, Mapping[str, Any], Job], Awaitable[None]],
        validate: Callable[[Any], object],
        streams: Callable[[Any], bool],
        grace: float,
        on_start: Callable[[], None],
    ) -> None:
        self._lifecycle, self._stop = lifecycle, stop
        self._fetch, self._report, self._send = fetch, report, send
        self._validate, self._streams, self._grace = validate, streams, grace
        self._on_start = on_start
        self._poll: Poll | None = None
        self._reports: ClientSession | None = None
        self._taken: set[str] = set()  # until they are submitted
        self._held: set[str] = set()  # until they are reported
        self._stopping: asyncio.Task[None] | None = None

    # -------------------------------------------------------------- in place of the SDK's

    async def take(self, session: ClientSession, count: int) -> list[Job] | None:
        """One long poll. In place of `rp_scale.get_job`."""
        if self._poll is None:
            self._poll = self._begin(session)
        jobs = await self._poll(lambda own: self._fetch(own, count), POLL) or []
        self._taken |= {job["id"] for job in jobs}
        self._held |= {job["id"] for job in jobs}
        if not jobs and self._stop.asked.is_set():
            await asyncio.sleep(POLL)  # until the process ends; the SDK would ask again and again
        return jobs

    async def work(self, session: ClientSession, config: dict[str, Any], job: Job) -> None:
        """Run a job and report it. In place of `rp_scale.handle_job`, and through it."""
        assert self._reports is not None, "a job was not taken by `take`"
        mine = dict(config)

        async def pieces(job: Job) -> AsyncGenerator[dict[str, Any]]:
            async with aclosing(self._follow(session, job)) as followed:
                async for piece in followed:
                    mine["refresh_worker"] = self._lifecycle.refresh_wanted
                    yield piece

        async def answer(job: Job) -> dict[str, Any]:
            return [piece async for piece in pieces(job)][-1]

        async def refuse(job: Job) -> dict[str, Any]:
            return error_of(refused)

        refused = self._refusal(job)
        if refused is not None:
            mine["handler"] = refuse
        elif self._streams(job["input"]):
            mine |= {"handler": pieces, "return_aggregate_stream": True}
        else:
            mine["handler"] = answer
        try:
            with logs.of_job(job["id"]):
                await self._report(self._reports, mine, job)
        finally:
            self._taken.discard(job["id"])
            self._held.discard(job["id"])
        if self._lifecycle.refresh_wanted:
            _log.warning("the worker asks to be replaced")
            self._stop_now()

    # -------------------------------------------------------------- one job

    def _refusal(self, job: Job) -> Mapping[str, str] | None:
        """What is wrong with a job's payload, if anything."""
        try:
            self._validate(job["input"])
        except Exception as error:
            return _told(error, job)
        return None

    async def _follow(self, session: ClientSession, job: Job) -> AsyncGenerator[dict[str, Any]]:
        """The pieces of a job's stream, then its answer; progress is sent on the way."""
        progress = ProgressSender(lambda news: self._send(session, news, job))
        try:
            try:
                self._lifecycle.submit(job["input"], job["id"])
            finally:
                self._taken.discard(job["id"])
            async for update in self._lifecycle.updates(job["id"]):
                if update.progress is not None:
                    progress.show(update.progress)
                elif update.piece is not None:
                    yield dict(update.piece)
                elif update.final is not None:
                    await progress.finish()
                    yield answer_of(update.final)
        except asyncio.CancelledError:
            self._lifecycle.cancel(job["id"])
            raise
        except Exception as error:
            yield error_of(_told(error, job))
        finally:
            progress.cancel()

    # -------------------------------------------------------------- the end

    def _begin(self, session: ClientSession) -> Poll:
        """On the first poll, in the SDK's loop: what it needed of the environment it has read."""
        from app.serve.poll import Poll
        from app.serve.report import patient_session

        self._on_start()
        self._reports = patient_session(session)
        poll = Poll(session)
        loop = asyncio.get_running_loop()
        self._stop.then(lambda: loop.call_soon_threadsafe(self._stop_now))
        return poll

    def _stop_now(self) -> None:
        self._stop.asked.set()
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        """Hear the poll to its end, then let the running job end and be reported, then leave."""
        _log.info("stopping: no new job is taken")
        if self._poll is not None:
            await self._poll.hang_up()
        await _until(lambda: not self._taken and not self._lifecycle.counts()[State.IN_QUEUE], BEGIN)
        await self._lifecycle.drain(self._grace)
        await _until(lambda: not self._held, REPORT)
        for job_id in self._held:
            _log.error("job %s could not be reported within %.0f s", job_id, REPORT)
        leave()


class ProgressSender:
    """Sends progress one at a time, and only the newest: it is never out of order, and never waits."""

    def __init__(self, send: Callable[[Mapping[str, Any]], Awaitable[None]]) -> None:
        self._send = send
        self._next: Mapping[str, Any] | None = None
        self._sending: asyncio.Task[None] | None = None

    def show(self, progress: Mapping[str, Any]) -> None:
        """Send this, once what is on its way has arrived."""
        self._next = progress
        if self._sending is None or self._sending.done():
            self._sending = asyncio.ensure_future(self._send_all())

    async def finish(self) -> None:
        """Return when nothing is on its way any more; what was not sent yet is not sent."""
        self._next = None
        if self._sending is not None:
            await asyncio.wait({self._sending}, timeout=LAST_PROGRESS)

    def cancel(self) -> None:
        """Send nothing more."""
        self._next = None
        if self._sending is not None:
            self._sending.cancel()

    async def _send_all(self) -> None:
        while self._next is not None:
            progress, self._next = self._next, None
            try:
                await self._send({"status": "IN_PROGRESS", "output": dict(progress)})
            except Exception as error:
                _log.warning("progress could not be sent: %s", type(error).__name__)


def answer_of(record: Record) -> dict[str, Any]:
    """What the SDK sends for a job that has ended."""
    if record.state is State.COMPLETED:
        return dict(record.output or {})
    return error_of(record.error)


def _told(error: Exception, job: Job) -> Mapping[str, str] | None:
    """An error as the caller may see it; one that is our fault goes to the log."""
    if not isinstance(error, SeedpodError):
        _log.error("job %s failed", job["id"], exc_info=error)
    return of_error(error, job["id"]).error


def error_of(error: Mapping[str, str] | None) -> dict[str, Any]:
    """A failure. The platform shows the string to the caller as it is."""
    return {"error": json.dumps(error)}


async def _until(condition: Callable[[], bool], seconds: float) -> None:
    """Return when the condition holds, or after `seconds`."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        await asyncio.sleep(0.01)
