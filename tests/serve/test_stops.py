"""Cancel, timeout, purge and drain: exactly one final state, whatever callers and jobs do."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import pytest

from app.errors import JobStopped, UnavailableError
from app.serve.lifecycle import Lifecycle
from app.serve.record import Record, State
from app.serve.reporter import Reporter
from tests.serve.jobs import Payload, finished, made, running, stepping, until


def test_cancel_while_it_runs_takes_effect_at_the_next_step_and_the_thread_lives_on() -> None:
    jobs = made(stepping())
    jobs.submit({}, "long")
    jobs.submit({"steps": 1}, "next")
    running(jobs, "long")
    begin = time.monotonic()
    assert jobs.cancel("long") is not None
    record = finished(jobs, "long")
    assert time.monotonic() - begin < 1
    assert record.state is State.CANCELLED
    assert record.error and record.error["code"] == "job_cancelled"
    assert finished(jobs, "next").state is State.COMPLETED
    assert jobs.cancel("next") == jobs.get("next")
    assert finished(jobs, "next").state is State.COMPLETED


def test_cancel_while_it_waits_is_immediate_and_it_never_runs() -> None:
    runs = []
    gate = threading.Event()

    def run(job_id: str, payload: Payload, reporter: Reporter) -> Payload:
        runs.append(job_id)
        gate.wait(10)
        return {}

    jobs = made(run)
    jobs.submit({}, "first")
    running(jobs, "first")
    jobs.submit({}, "second")
    record = jobs.cancel("second")
    assert record and record.state is State.CANCELLED and record.execution_ms is None
    gate.set()
    assert finished(jobs, "first").state is State.COMPLETED
    jobs.submit({}, "third")
    finished(jobs, "third")
    assert runs == ["first", "third"]


def test_a_cancelled_job_never_completes_even_if_it_does_not_look() -> None:
    gate = threading.Event()
    jobs = made(lambda job_id, payload, reporter: {"done": gate.wait(10)})
    jobs.submit({}, "deaf")
    running(jobs, "deaf")
    jobs.cancel("deaf")
    gate.set()
    record = finished(jobs, "deaf")
    assert (record.state, record.output) == (State.CANCELLED, None)


def test_purge_cancels_what_waits() -> None:
    gate = threading.Event()
    jobs = made(lambda job_id, payload, reporter: {"done": gate.wait(10)})
    jobs.submit({}, "first")
    running(jobs, "first")
    for name in "abc":
        jobs.submit({}, name)
    assert jobs.counts()[State.IN_QUEUE] == 3
    assert jobs.purge() == 3
    assert jobs.purge() == 0
    gate.set()
    assert finished(jobs, "first").state is State.COMPLETED
    counts = jobs.counts()
    assert counts == {
        State.IN_QUEUE: 0, State.IN_PROGRESS: 0, State.COMPLETED: 1,
        State.FAILED: 0, State.CANCELLED: 3, State.TIMED_OUT: 0,
    }  # fmt: skip


def test_a_job_times_out_and_the_next_one_runs() -> None:
    jobs = made(stepping(), timeout=0.05)
    jobs.submit({}, "long")
    jobs.submit({"steps": 1}, "short")
    record = finished(jobs, "long")
    assert record.state is State.TIMED_OUT
    assert record.error and record.error["code"] == "job_timeout"
    assert record.execution_ms is not None and 50 <= record.execution_ms < 10_000
    assert finished(jobs, "short").state is State.COMPLETED
    assert not jobs.refresh_wanted


def test_a_job_that_hangs_is_given_up_and_its_late_result_counts_for_nothing() -> None:
    gate = threading.Event()
    jobs = made(lambda job_id, payload, reporter: {"done": gate.wait(10)}, timeout=0.02, overdue=0.03)
    jobs.submit({}, "hangs")
    record = finished(jobs, "hangs")
    assert record.state is State.TIMED_OUT
    assert jobs.refresh_wanted and jobs.dead
    gate.set()
    until(lambda: jobs.counts()[State.IN_PROGRESS] == 0)
    assert jobs.get("hangs") == record
    assert jobs.counts()[State.TIMED_OUT] == 1
    assert jobs.counts()[State.COMPLETED] == 0


def test_when_the_thread_dies_no_job_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    gate = threading.Event()
    jobs = made(lambda job_id, payload, reporter: {"done": gate.wait(10)})
    jobs.submit({}, "first")
    running(jobs, "first")
    jobs.submit({}, "second")
    jobs.submit({}, "third")
    monkeypatch.setattr(threading, "Timer", no_thread)
    gate.set()
    assert finished(jobs, "first").state is State.COMPLETED
    for name in ("second", "third"):
        record = finished(jobs, name)
        assert record.state is State.FAILED
        assert record.error and record.error["code"] == "worker_died"
    assert jobs.dead and jobs.refresh_wanted
    assert jobs.counts()[State.IN_QUEUE] == jobs.counts()[State.IN_PROGRESS] == 0
    with pytest.raises(UnavailableError) as caught:
        jobs.submit({}, "fourth")
    assert caught.value.code == "draining"
    asyncio.run(jobs.drain(60))


def test_drain_when_idle_returns_at_once_and_takes_nothing_more() -> None:
    jobs = made(lambda job_id, payload, reporter: {"n": 1})
    jobs.submit({}, "done")
    done = finished(jobs, "done")
    begin = time.monotonic()
    asyncio.run(jobs.drain(60))
    assert time.monotonic() - begin < 5
    with pytest.raises(UnavailableError) as caught:
        jobs.submit({}, "late")
    assert caught.value.code == "draining"
    assert jobs.get("late") is None
    assert jobs.submit({}, "done") == done


def test_drain_lets_the_running_job_finish_and_fails_what_waits() -> None:
    jobs = made(stepping(100, 0.002))
    jobs.submit({}, "runs")
    running(jobs, "runs")
    jobs.submit({}, "waits")
    asyncio.run(jobs.drain(30))
    runs, waits = jobs.get("runs"), jobs.get("waits")
    assert runs and runs.state is State.COMPLETED
    assert waits and waits.state is State.FAILED
    assert waits.error and waits.error["code"] == "worker_stopping"


@pytest.mark.parametrize("listens", [True, False])
def test_drain_reports_a_job_that_is_not_done_within_the_grace(listens: bool) -> None:
    stopped = []
    gate = threading.Event()

    def deaf(job_id: str, payload: Payload, reporter: Reporter) -> Payload:
        gate.wait(10)
        return {}

    def run(job_id: str, payload: Payload, reporter: Reporter) -> Payload:
        try:
            return stepping()(job_id, payload, reporter)
        except JobStopped as error:
            stopped.append(error.code)
            raise

    jobs = made(run if listens else deaf)
    jobs.submit({}, "long")
    running(jobs, "long")
    begin = time.monotonic()
    asyncio.run(jobs.drain(0.05))
    assert time.monotonic() - begin < 2
    record = jobs.get("long")
    assert record and record.state is State.FAILED
    assert record.error and record.error["code"] == "worker_stopping"
    gate.set()
    until(lambda: stopped or not listens)
    until(lambda: jobs.counts()[State.IN_PROGRESS] == 0)
    assert jobs.get("long") == record
    assert stopped == (["worker_stopping"] if listens else [])


def test_drain_from_a_signal_while_callers_wait() -> None:
    async def main() -> tuple[Record, Record, float]:
        jobs = made(stepping())
        loop, drained = asyncio.get_running_loop(), asyncio.Event()

        async def drain() -> None:
            await jobs.drain(0.1)
            drained.set()

        tasks = []
        loop.add_signal_handler(signal.SIGTERM, lambda: tasks.append(loop.create_task(drain())))
        try:
            jobs.submit({}, "runs")
            jobs.submit({}, "waits")
            callers = [loop.create_task(jobs.wait(name, 30)) for name in ("runs", "waits")]
            await asyncio.sleep(0.05)
            begin = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
            runs, waits = await asyncio.gather(*callers)
            await drained.wait()
            return runs, waits, time.monotonic() - begin
        finally:
            loop.remove_signal_handler(signal.SIGTERM)

    runs, waits, seconds = asyncio.run(main())
    for record in (runs, waits):
        assert record.state is State.FAILED
        assert record.error and record.error["code"] == "worker_stopping"
    assert seconds < 2


def test_a_second_drain_may_be_shorter() -> None:
    async def main(jobs: Lifecycle) -> float:
        first = asyncio.create_task(jobs.drain(60))
        await asyncio.sleep(0.01)
        begin = time.monotonic()
        await jobs.drain(0.02)
        await first
        return time.monotonic() - begin

    jobs = made(stepping())
    jobs.submit({}, "long")
    running(jobs, "long")
    assert asyncio.run(main(jobs)) < 2
    assert jobs.counts()[State.FAILED] == 1
