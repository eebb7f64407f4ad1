"""The lifecycle of jobs: their course, and the bounds of what is kept."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from typing import Any

import pytest

from app.errors import UnavailableError, UsageError
from app.serve import kept as module
from app.serve.record import State
from app.serve.reporter import Reporter
from tests.serve.jobs import Payload, finished, made, running, stepping, until


def test_a_job_completes() -> None:
    jobs = made(lambda job_id, payload, reporter: {"sum": payload["a"] + 1})
    before = time.time()
    assert jobs.submit({"a": 2}, "one").state is State.IN_QUEUE
    record = finished(jobs, "one")
    assert (record.state, record.output, record.error) == (State.COMPLETED, {"sum": 3}, None)
    assert record.started is not None and record.finished is not None
    assert before <= record.created <= record.started <= record.finished <= time.time()
    assert record.progress == {"step": "done", "percent": 100.0, "eta_seconds": 0.0}
    assert record.execution_ms is not None and record.delay_ms is not None


def test_jobs_run_one_at_a_time_in_their_order() -> None:
    order, at_once = [], []
    gate = threading.Lock()

    def run(job_id: str, payload: Payload, reporter: Reporter) -> Payload:
        at_once.append(gate.acquire(blocking=False))
        order.append(job_id)
        time.sleep(0.002)
        gate.release()
        return {"thread": threading.current_thread().name}

    jobs = made(run)
    names = [jobs.submit({}).id for _ in range(10)]
    assert [finished(jobs, name).output for name in names] == [{"thread": "inference"}] * 10
    assert order == names
    assert all(at_once)


def test_an_id_is_run_once() -> None:
    runs: list[str] = []

    def run(job_id: str, payload: Payload, reporter: Reporter) -> Payload:
        runs.append(job_id)
        time.sleep(0.02)
        return {"given": payload["given"]}

    jobs = made(run)
    jobs.submit({"given": 1}, "first")
    for number in range(2, 5):  # while it waits or runs
        jobs.submit({"given": number}, "twice")
    assert finished(jobs, "twice").output == {"given": 2}
    assert jobs.submit({"given": 9}, "twice") == jobs.get("twice")
    assert finished(jobs, "twice").output == {"given": 2}
    assert runs == ["first", "twice"]


@pytest.mark.parametrize("job_id", ["", "../x", "a/b", ".hidden", "a" * 129, "a b", "a\n"])
def test_an_id_that_is_no_name_is_refused(job_id: str) -> None:
    with pytest.raises(UsageError) as caught:
        made(stepping()).submit({}, job_id)
    assert caught.value.code == "job_id_invalid"


def test_an_unknown_job() -> None:
    jobs = made(stepping())
    assert jobs.get("nobody") is None
    assert jobs.cancel("nobody") is None
    with pytest.raises(UsageError, match="nobody"):
        asyncio.run(jobs.wait("nobody", 1))


def test_wait_gives_up_after_its_time() -> None:
    jobs = made(stepping())
    jobs.submit({}, "long")
    begin = time.monotonic()
    assert not asyncio.run(jobs.wait("long", 0.05)).state.final
    assert 0.04 < time.monotonic() - begin < 2
    jobs.cancel("long")


def test_finished_jobs_are_forgotten_by_number_age_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job_id: str, payload: Payload, reporter: Reporter) -> Payload:
        return {"data": "x" * 1000}

    def kept(**changes: Any) -> list[int]:
        jobs = made(run, **changes)
        for number in range(6):
            jobs.submit({}, str(number))
        finished(jobs, "5")
        time.sleep(0.06)
        return [number for number in range(6) if jobs.get(str(number))]

    assert kept(keep=4) == [2, 3, 4, 5]
    assert kept(keep_seconds=0.05) == []
    monkeypatch.setattr(module, "KEEP_BYTES", 2500)
    assert kept() == [4, 5]
    monkeypatch.setattr(module, "KEEP_BYTES", 10)
    assert kept() == [5]


def test_the_payload_of_a_finished_job_is_let_go() -> None:
    class Large(dict[str, Any]):
        """A payload that can be watched."""

    jobs = made(lambda job_id, payload, reporter: {})
    payload = Large()
    watched = weakref.ref(payload)
    jobs.submit(payload, "one")
    del payload
    assert finished(jobs, "one").state is State.COMPLETED
    until(lambda: watched() is None)


def test_a_full_queue_refuses() -> None:
    gate = threading.Event()
    jobs = made(lambda job_id, payload, reporter: {"done": gate.wait(10)}, max_queued=2)
    jobs.submit({}, "runs")
    running(jobs, "runs")
    jobs.submit({}, "a")
    jobs.submit({}, "b")
    with pytest.raises(UnavailableError) as caught:
        jobs.submit({}, "c")
    assert caught.value.code == "queue_full"
    assert jobs.submit({}, "a").id == "a"
    gate.set()
    finished(jobs, "b")
    jobs.submit({}, "c")
    finished(jobs, "c")
