"""The worker on RunPod: hands the lifecycle of jobs to `runpod.serverless`, which takes, pings and reports.

`runpod.serverless.start`, its `handler` and `register_fitness_check` are public. Three names of the SDK
that are not are replaced, since after SIGTERM its loop goes on taking a job that it then never runs, and
since a handler of its own either streams pieces or has a result: `rp_scale.get_job` (the long poll),
`rp_scale.handle_job` (running and reporting one job) and `JobScaler.handle_shutdown` (the signal). Two more
are used: `rp_http.send_result`, as the public `progress_update` sends from a thread of its own that nobody
can wait for, and `rp_http.stream_result`. The SDK is pinned, and `tests/serve/test_worker.py` fails when any
of these changes.

Knows nothing of models or video.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, Protocol

from app import logs
from app.errors import SeedpodError, UnavailableError
from app.serve.lifecycle import Lifecycle
from app.serve.outcome import of_error
from app.serve.record import Record, State
from app.serve.sdklog import SdkLines
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
LOOK: Final = 0.5  # seconds between two looks at whether jobs can run
LAST_PROGRESS: Final = 5.0  # seconds that a result waits for a progress update which is on its way
GIVE_UP: Final = 0.5  # seconds that a boot has to remove its partial files
# What the SDK reads of the environment when it is imported, where the user did not set it.
SDK_SETTINGS: Final = {
    # It refuses a worker with less of its disk free, by default 10. Staging leaves 10% free itself, and what
    # else is written until the SDK looks must not fail the worker.
    "RUNPOD_MIN_DISK_PERCENT": "5",
    "RUNPOD_LOG_LEVEL": "INFO",  # DEBUG, its default, prints what jobs ask for and what they are answered
}
_SECRET: Final = ("KEY", "TOKEN", "SECRET", "PASS", "CREDENTIAL", "AUTH")  # in the name of a variable
_LOGIN: Final = re.compile(r"://[^/\s@]*:[^/\s@]+@")  # in its value: https://user:password@host
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
) -> None:
    """Serve the platform's jobs until the process is asked to stop. Never returns; main thread only.

    No job is taken before the boot is over: it is the last fitness check, behind the SDK's own, which run
    beside it. A boot that fails is reported to the platform with its reason, and the process exits with 1;
    the jobs wait for a worker that is whole.

    Args:
        stop: Installed since the process began.
        validate: Raises SeedpodError for a payload that is wrong.
        grace: Seconds that the running job has after SIGTERM.
    """
    stop.then(lambda: give_up(boot))
    for name, value in SDK_SETTINGS.items():
        os.environ.setdefault(name, value)
    sys.stdout = SdkLines()

    import runpod
    from runpod.serverless.modules import rp_http, rp_scale

    worker = Worker(
        lifecycle,
        stop,
        fetch=rp_scale.get_job,
        send=rp_http.send_result,
        send_piece=rp_http.stream_result,
        validate=validate,
        grace=grace,
        on_start=lambda: forget_secrets(os.environ),
    )
    rp_scale.get_job = worker.take
    rp_scale.handle_job = worker.work
    rp_scale.JobScaler.handle_shutdown = lambda scaler, number, frame: stop.handle(number, frame)
    runpod.serverless.register_fitness_check(boot_is_last(boot, runpod.serverless.register_fitness_check))
    # Nobody asks for the handler, see `Worker.work`.
    runpod.serverless.start({"handler": None, "concurrency_modifier": lambda current: lifecycle.able()})


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
    """Drop every variable that names a secret or holds a login, so that no child inherits one."""
    for name, value in list(environ.items()):
        if any(word in name.upper() for word in _SECRET) or _LOGIN.search(value):
            del environ[name]


class Send(Protocol):
    """`rp_http.send_result`: a POST with progress, or with what became of a job."""

    def __call__(
        self, session: ClientSession, body: Mapping[str, Any], job: Job, is_stream: bool = False
    ) -> Awaitable[None]: ...


class Worker:
    """What replaces the SDK's insides: it takes jobs, follows them through the lifecycle, and stops."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        stop: Stop,
        *,
        fetch: Callable[[ClientSession, int], Awaitable[list[Job] | None]],
        send: Send,
        send_piece: Callable[[ClientSession, Mapping[str, Any], Job], Awaitable[None]],
        validate: Callable[[Any], object],
        grace: float,
        on_start: Callable[[], None],
    ) -> None:
        self._lifecycle, self._stop = lifecycle, stop
        self._fetch, self._send, self._send_piece = fetch, send, send_piece
        self._validate, self._grace = validate, grace
        self._on_start = on_start
        self._poll: Poll | None = None
        self._reports: ClientSession | None = None
        self._taken: set[str] = set()  # until they are submitted
        self._held: set[str] = set()  # until they are reported
        self._catching_up: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
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
        """Run a job and report it. In place of `rp_scale.handle_job`."""
        try:
            with logs.of_job(job["id"]):
                body, streamed = await self._done(session, job)
                await self._report(job, body, streamed)
        finally:
            self._taken.discard(job["id"])
            self._held.discard(job["id"])
        if self._lifecycle.refresh_wanted:
            _log.warning("the worker asks to be replaced")
            self._stop_now()

    # -------------------------------------------------------------- one job

    async def _done(self, session: ClientSession, job: Job) -> tuple[dict[str, Any], bool]:
        """What to report of a job, once it has ended, and whether it was streamed: progress and pieces are
        sent on the way. A piece is sent when the one before has arrived."""
        progress = ProgressSender(lambda news: self._send(session, news, job))
        streamed = False
        try:
            try:
                self._validate(job["input"])
                self._lifecycle.submit(job["input"], job["id"])
            finally:
                self._taken.discard(job["id"])
            async with aclosing(self._lifecycle.updates(job["id"])) as updates:
                async for update in updates:
                    if update.progress is not None:
                        progress.show(update.progress)
                    elif update.piece is not None:
                        await self._stream(job, update.piece)
                        streamed = True
                    elif update.final is not None:
                        await progress.finish()
                        return answer_of(update.final), streamed
            raise AssertionError("the updates of a job end with its final state")
        except asyncio.CancelledError:
            self._lifecycle.cancel(job["id"])
            raise
        except Exception as error:
            self._lifecycle.cancel(job["id"])  # nobody follows it any more
            return error_of(_told(error, job)), streamed
        finally:
            progress.cancel()

    async def _stream(self, job: Job, piece: Mapping[str, Any]) -> None:
        """Send a piece of a job's stream. One that is lost shows as a gap in the numbers."""
        try:
            await self._send_piece(self._session(), {"output": dict(piece)}, job)
        except Exception as error:
            _log.warning("piece %s of the stream is lost: %s", piece["number"], type(error).__name__)

    async def _report(self, job: Job, body: dict[str, Any], streamed: bool) -> None:
        """Tell the platform how a job ended, once."""
        if self._lifecycle.refresh_wanted:
            body["stopPod"] = True
        try:
            await self._send(self._session(), body, job, is_stream=streamed)
        except Exception:
            _log.exception("job %s could not be reported", job["id"])
            return
        self._lifecycle.reported(job["id"])

    async def _catch_up(self) -> None:
        """Report what the worker before this one took, and was killed before it could report. Else the
        platform waits until its own timeout, or hands a job that kills its worker to one after the other."""
        for record in self._lifecycle.unreported:
            try:
                with logs.of_job(record.id):
                    await self._report({"id": record.id}, answer_of(record), streamed=False)
            finally:
                self._held.discard(record.id)

    def _session(self) -> ClientSession:
        assert self._reports is not None, "no job was taken by `take`"
        return self._reports

    # -------------------------------------------------------------- the end

    def _begin(self, session: ClientSession) -> Poll:
        """On the first poll, in the SDK's loop: what it needed of the environment it has read."""
        from app.serve.poll import Poll
        from app.serve.report import patient_session

        self._on_start()
        self._reports = patient_session(session)
        self._held |= {record.id for record in self._lifecycle.unreported}
        self._catching_up = asyncio.ensure_future(self._catch_up())
        self._watching = asyncio.ensure_future(self._watch())
        poll = Poll(session)
        loop = asyncio.get_running_loop()
        self._stop.then(lambda: loop.call_soon_threadsafe(self._stop_now))
        return poll

    async def _watch(self) -> None:
        """Stop when no job can run here any more: the next one is another worker's."""
        while not self._lifecycle.dead:
            await asyncio.sleep(LOOK)
        self._stop_now()

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
        self._lifecycle.close()
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
    """What the platform is told of a job that has ended."""
    if record.state is State.COMPLETED:
        return {"output": dict(record.output or {})}
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
