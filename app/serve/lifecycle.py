"""The lifecycle of jobs: a queue in front of inference threads, from submission to a final state.

Callers sit on event loops or other threads; whatever they do, each job ends in exactly one final state.
Knows nothing of HTTP, RunPod or video: a job is an id, a payload and a function.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from app import logs
from app.errors import InputError, JobStopped, SeedpodError, UnavailableError, UsageError
from app.progress import duration_text
from app.serve.journal import Journal
from app.serve.kept import Kept
from app.serve.live import Live
from app.serve.outcome import (
    Outcome,
    cancelled,
    died,
    of_error,
    of_output,
    stopping,
    timed_out,
)
from app.serve.record import Record, State, Update
from app.serve.reporter import DONE, SHARES, Reporter, Shares

Run = Callable[[str, Mapping[str, Any], Reporter], Mapping[str, Any]]  # (job id, payload, reporter) -> output

EVERY: Final = 0.25  # seconds between two updates of a job's progress
OVERDUE: Final = 30.0  # seconds that a job may go on after its time without asking whether it should stop
DEADLY: Final = ("device_failed",)  # errors after which this process can do no job
REFRESH: Final = ("out_of_memory", *DEADLY)  # errors after which it should be replaced
FOLDER: Final = "job-"  # what the folder of a job is called, before its id
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # safe as the name of a folder
_log = logging.getLogger(__name__)


class Lifecycle:
    """Jobs in the order of their submission, one at a time, or as many as there are slots, in threads of
    their own.

    Args:
        run: Does a job. Calls `Reporter.check` between steps. Runs in the inference thread.
        timeout: Seconds that a job may run.
        keep_seconds: How long a finished job is known; within that, its id is never run again.
        keep: Finished jobs known at most.
        max_queued: Jobs that may wait.
        journal: File for the next worker here. What was not done when a worker died is then FAILED with
            code `worker_died`, and is in `died` of the next worker, of no later one. What ended and was not
            `reported` by then is in `unreported`.
        work: Folder in which each job works in a folder of its own, named `job-` and its id; those that a
            dead worker left are removed, by its journal.
        shares: Share of each step in the progress of a job, see `reporter.SHARES`.
        slots: Jobs that run at a time.
        able: Given where `run` hands jobs to others, who replace by themselves what is broken: how many jobs
            can run now, at most `slots`. It may only ever fall.

    Raises:
        ConfigError: The journal is in use, or cannot be written.
    """

    def __init__(
        self,
        run: Run,
        *,
        timeout: float,
        keep_seconds: float,
        keep: int = 1000,
        max_queued: int = 1000,
        journal: Path | None = None,
        work: Path | None = None,
        shares: Shares = SHARES,
        overdue: float = OVERDUE,
        slots: int = 1,
        able: Callable[[], int] | None = None,
    ) -> None:
        self.refresh_wanted = False  # the worker does its work, but should be replaced
        self.dead = False  # an inference thread is gone, or does not answer: no other job can run
        self.able = able or (lambda: slots)
        self._run, self._timeout, self._overdue, self._shares = run, timeout, overdue, shares
        self._keep_seconds, self._max_queued = keep_seconds, max_queued
        self._alone = able is None
        self._jobs = Kept(keep_seconds, keep)
        self._queue: deque[Live] = deque()
        self._ended: Counter[State] = Counter()
        self._running: list[Live] = []
        self._draining = False
        self._changed = threading.Condition(threading.RLock())
        self._journal = None if journal is None else Journal.open(journal)
        self.died, self.unreported = self._recover(work)
        for _ in range(slots):
            threading.Thread(target=self._thread, name="inference", daemon=True).start()

    # -------------------------------------------------------------- for callers, from any thread

    def submit(self, payload: Mapping[str, Any], job_id: str | None = None) -> Record:
        """Queue a job. An id that is known gives its record, and no work is done again.

        Raises:
            UsageError: `job_id_invalid`. UnavailableError: `draining`, `queue_full`.
        """
        job_id = uuid.uuid4().hex if job_id is None else job_id
        if not _ID.fullmatch(job_id):
            raise UsageError(
                "job_id_invalid",
                f"The job's id is {job_id[:200]!r}; expected 1 to 128 letters, digits, dots, dashes or "
                "underscores, beginning with a letter or digit.",
            )
        with self._changed:
            self._jobs.forget()
            if (known := self._jobs.get(job_id)) is not None:
                return known.record
            if self._draining:
                raise UnavailableError(
                    "draining", "The worker is stopping and takes no new job; submit it to another one."
                )
            if len(self._queue) >= self._max_queued:
                raise UnavailableError(
                    "queue_full",
                    f"{len(self._queue)} jobs wait, as many as this worker holds; try again later.",
                )
            live = Live(Record(job_id, State.IN_QUEUE, time.time()), payload)
            self._jobs.add(live)
            self._queue.append(live)
            self._write_down(live.record)
            self._changed.notify()
            return live.record

    def get(self, job_id: str) -> Record | None:
        """The job as it is now, or None if the id is not known (any more)."""
        with self._changed:
            self._jobs.forget()
            live = self._jobs.get(job_id)
        return live.record if live else None

    def take_pieces(self, job_id: str) -> tuple[Mapping[str, Any], ...]:
        """The oldest pieces of the job's stream, 8 MiB at most; none is given twice, or kept.

        Raises:
            UsageError: `job_unknown`.
        """
        with self._changed:
            return self._jobs.take_pieces(self._known(job_id))

    def reported(self, job_id: str) -> None:
        """The platform was told how the job ended: the next worker need not, and its stream is let go."""
        with self._changed:
            live = self._jobs.get(job_id)
            if live is None or live.record.reported or not live.record.state.final:
                return
            while self._jobs.take_pieces(live):
                continue
            live.record = replace(live.record, reported=True)
            if self._journal:
                self._journal.append_reported(job_id)

    async def wait(self, job_id: str, seconds: float) -> Record:
        """The job when it has ended, or as it is after `seconds`.

        Raises:
            UsageError: `job_unknown`.
        """
        return await self._known(job_id).ended(seconds)

    async def updates(self, job_id: str) -> AsyncGenerator[Update]:
        """Follow a job: every piece of its stream from the first that is kept, progress at most 4 times a
        second and always the last, then the final record, and nothing after it.

        Raises:
            UsageError: `job_unknown`.
        """
        live = self._known(job_id)
        number, shown, due = 0, None, 0.0
        while True:
            record, seen = live.look()
            for piece in record.stream:
                if piece["number"] >= number:
                    number = piece["number"] + 1
                    yield Update(piece=piece)
            now = time.monotonic()
            if record.progress not in (None, shown) and (now >= due or record.state.final):
                shown, due = record.progress, now + EVERY
                yield Update(progress=shown)
            if record.state.final:
                yield Update(final=record)
                return
            await live.news(seen, None if record.state is State.IN_QUEUE else EVERY)

    def cancel(self, job_id: str) -> Record | None:
        """Cancel a job: at once if it waits, at its next check if it runs; one that has ended stays as it
        is. None if the id is not known."""
        with self._changed:
            live = self._jobs.get(job_id)
            if live is None:
                return None
            if live in self._queue:
                self._queue.remove(live)
                self._end_with(live, cancelled())
            elif live.stop is None:
                live.stop = cancelled()
            return live.record

    def purge(self) -> int:
        """Cancel every job that waits; returns how many."""
        with self._changed:
            waiting = [live.record.id for live in self._queue]
            for job_id in waiting:
                self.cancel(job_id)
        return len(waiting)

    def counts(self) -> Mapping[State, int]:
        """How many jobs wait, run, and have ended in each state since the worker began."""
        with self._changed:
            now = {State.IN_QUEUE: len(self._queue), State.IN_PROGRESS: len(self._running)}
            return {state: now.get(state, self._ended[state]) for state in State}

    @property
    def draining(self) -> bool:
        """Whether new jobs are refused for good."""
        return self._draining

    async def drain(self, grace: float) -> None:
        """Take no new job, fail those that wait, and give those that run `grace` seconds to end; then they
        are FAILED with code `worker_stopping`, and told to stop at their next check. Returns at once when
        idle.

        On SIGTERM: `loop.add_signal_handler(SIGTERM, lambda: loop.create_task(lifecycle.drain(grace)))`.
        """
        with self._changed:
            self._draining = True
            while self._queue:
                self._end_with(self._queue.popleft(), stopping())
            running = list(self._running)
            self._changed.notify_all()
        await asyncio.gather(*(live.ended(grace) for live in running))
        with self._changed:
            for live in running:
                self._end_with(live, live.stop or stopping())

    def lose(self) -> None:
        """Nobody is there any more to do jobs: none may wait."""
        with self._changed:
            self.dead = self.refresh_wanted = self._draining = True
            for live in (*self._running, *self._queue):
                self._end_with(live, died())
            self._queue.clear()
            self._running.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """Let the next worker have the journal; what is done after this is not written down."""
        if self._journal:
            self._journal.close()

    # -------------------------------------------------------------- the inference threads

    def _thread(self) -> None:
        try:
            self._work()
        except BaseException:  # of ours, between jobs: nobody else is there to take them
            _log.critical("the inference thread died", exc_info=True)
            self.lose()

    def _work(self) -> None:
        while (live := self._next()) is not None:
            with logs.of_job(live.record.id):
                late = threading.Timer(self._timeout + self._overdue, self._give_up, [live])
                late.daemon = True
                late.start()
                outcome = self._outcome(live)
                late.cancel()
                with self._changed:
                    if live in self._running:
                        self._running.remove(live)
                    if self._alone:
                        self.refresh_wanted |= outcome.code in REFRESH
                        self.dead |= outcome.code in DEADLY
                    self._end(live, outcome)
            del live, outcome  # nothing of a job is held while waiting for the next

    def _next(self) -> Live | None:
        """The next job, now IN_PROGRESS; None when the worker drains."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._draining or (self._queue and len(self._running) < self.able())
            )
            if not self._queue:
                return None
            live = self._queue.popleft()
            self._running.append(live)
            started = replace(live.record, state=State.IN_PROGRESS, started=time.time())
            self._write_down(started)
            live.move(started)
            return live

    def _outcome(self, live: Live) -> Outcome:
        """Run a job to its outcome; whatever it raises, the thread lives on."""
        job_id, payload = live.record.id, live.payload or {}
        reporter = Reporter(live, self._timeout, self._shares)
        try:
            reporter.check()
            _log.info("job started")
            return of_output(self._run(job_id, payload, reporter))
        except BaseException as error:
            _tell(error)
            return of_error(error, job_id)

    def _give_up(self, live: Live) -> None:
        """End a job that hangs: its thread may never come back, so the worker should be replaced."""
        with self._changed:
            if live.record.state.final:
                return
            self.refresh_wanted = self.dead = True
            self._end_with(live, timed_out(self._timeout))
        with logs.of_job(live.record.id):
            _log.error("the job does not answer: given up %.0f s after its time", self._overdue)

    # -------------------------------------------------------------- bookkeeping, with the lock held

    def _end_with(self, live: Live, stop: SeedpodError) -> None:
        """End a job from outside, and let its thread know."""
        live.stop = stop
        self._end(live, of_error(stop, live.record.id))

    def _end(self, live: Live, outcome: Outcome) -> None:
        """Give a job its final state, unless it has one. Once told to stop, it did not complete: what its
        caller was answered stays true."""
        if live.record.state.final:
            return
        if live.stop is not None:
            outcome = of_error(live.stop, live.record.id)
        final = replace(
            live.record,
            state=outcome.state,
            finished=time.time(),
            output=outcome.output,
            error=outcome.error,
            progress=DONE if outcome.state is State.COMPLETED else live.record.progress,
        )
        self._write_down(final)  # before anybody sees it: it can then not be reported twice
        live.move(final)
        self._ended[final.state] += 1
        self._jobs.end(live, outcome.nbytes)
        ran = "never ran" if final.execution_ms is None else f"ran {final.execution_ms / 1000:.3g} s"
        with logs.of_job(final.id):
            _log.info("%s, waited %.3g s, %s", final.state, (final.delay_ms or 0) / 1000, ran)

    def _known(self, job_id: str) -> Live:
        with self._changed:
            live = self._jobs.get(job_id)
        if live is None:
            raise UsageError(
                "job_unknown",
                f"Job {job_id[:200]!r} is not known here; expected one that was submitted to this worker and "
                f"ended less than {duration_text(self._keep_seconds)} ago.",
            )
        return live

    def _write_down(self, record: Record) -> None:
        if self._journal:
            if self._journal.bloated:
                self._journal.rewrite(live.record for live in self._jobs)
            self._journal.append(record)

    def _recover(self, work: Path | None) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
        """Take over from the worker before: its finished jobs are known, what it did not finish has FAILED
        (these are returned, and those that were not reported), and the folders it left are removed."""
        if self._journal is None:
            return (), ()
        undone, unreported = [], []
        for record in self._journal.read():
            if work is not None and _ID.fullmatch(record.id):
                shutil.rmtree(work / f"{FOLDER}{record.id}", ignore_errors=True)
            if not record.state.final:
                outcome = of_error(died(), record.id)
                record = replace(record, state=outcome.state, error=outcome.error, finished=time.time())
                self._ended[record.state] += 1
                undone.append(record)
            if not (record.reported or record.state is State.CANCELLED):  # who cancels a job knows
                unreported.append(record)
            live = Live(record)
            self._jobs.add(live)
            self._jobs.end(live, len(json.dumps(record.output)))
        self._journal.rewrite(live.record for live in self._jobs)
        return tuple(undone), tuple(unreported)


def _tell(error: BaseException) -> None:
    """Write a job's error to the log, with its traceback unless it is the caller's or was asked for."""
    if isinstance(error, JobStopped | UsageError | InputError):
        _log.warning("%s [%s]", error.message, error.code)
    else:
        _log.error("job failed: %s", error, exc_info=error)
