"""The lifecycle of jobs: exactly one final state each, whatever callers and jobs do."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from app.errors import InputError, JobStopped, SeedpodError, UnavailableError, UsageError
from app.serve import lifecycle as module
from app.serve.lifecycle import Lifecycle, Run
from app.serve.live import Live
from app.serve.outcome import of_error, without_paths
from app.serve.record import Record, State, Update
from app.serve.reporter import Reporter, span

Payload = Mapping[str, Any]
SECRET_PATH = "/var/lib/seedpod/job-7/in.mp4"


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


# ------------------------------------------------------------------ the course of a job


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


# ------------------------------------------------------------------ progress and stream


async def all_updates(jobs: Lifecycle, job_id: str) -> list[tuple[float, Update]]:
    return [(time.monotonic(), update) async for update in jobs.updates(job_id)]


def test_progress_is_ordered_throttled_and_never_after_the_result() -> None:
    def run(job_id: str, payload: Payload, reporter: Reporter) -> Payload:
        for label in ("fetch", "find cuts", "restore"):
            reporter.start(label, 20, "pieces")
            for _ in range(20):
                time.sleep(0.01)
                reporter.advance(1)
            reporter.advance(-5)  # a copy that begins anew does that
            reporter.finish()
        reporter.start("deliver", None, "B")
        reporter.finish()
        return {}

    jobs = made(run)
    jobs.submit({}, "one")
    updates = asyncio.run(all_updates(jobs, "one"))
    progress = [update.progress for _, update in updates[:-1]]
    assert all(progress)
    percents = [each["percent"] for each in progress if each]
    assert percents == sorted(percents)
    assert percents[-1] == 100.0
    assert all(0 <= percent < 100 for percent in percents[:-1])
    final = updates[-1][1].final
    assert final and final.state is State.COMPLETED
    times = [moment for moment, _ in updates]
    gaps = [after - before for before, after in itertools.pairwise(times[:-1])]
    assert all(gap > 0.2 for gap in gaps[:-1])  # the last comes with the result, however soon
    assert len(gaps) >= 2
    assert [each["step"] for each in progress if each][-1] == "done"


def test_the_last_progress_of_a_failed_job_is_delivered() -> None:
    def run(job_id: str, payload: Payload, reporter: Reporter) -> Payload:
        reporter.start("restore", 10, "frames")
        reporter.advance(1)
        time.sleep(0.3)
        for _ in range(4):
            reporter.advance(1)
        raise InputError("input_damaged", "The video is damaged.")

    jobs = made(run)
    jobs.submit({}, "one")
    updates = [update for _, update in asyncio.run(all_updates(jobs, "one"))]
    last = updates[-2].progress
    assert last and last["percent"] == 52.0  # 7 of 100 before, and half of the 90 of "restore"
    assert updates[-1].final and updates[-1].final.progress == last


def test_eta_goes_by_the_current_step() -> None:
    now = [0.0]
    live = Live(Record("a", State.IN_PROGRESS, 0.0))
    reporter = Reporter(live, 100.0, {"fetch": 10, "restore": 90}, clock=lambda: now[0])
    reporter.start("fetch", 10, "B")
    assert live.record.progress == {"step": "fetch", "percent": 0.0, "eta_seconds": None}
    now[0] = 50.0
    reporter.finish()
    reporter.start("restore", 90, "frames")
    now[0] = 60.0
    reporter.advance(30)  # 30 percent of the job in 10 s, 60 percent to go
    assert live.record.progress == {"step": "restore", "percent": 40.0, "eta_seconds": 20.0}


def test_percent_never_goes_back_nor_to_the_end_before_it() -> None:
    live = Live(Record("a", State.IN_PROGRESS, 0.0))
    reporter = Reporter(live, 100.0, {"fetch": 20, "restore": 80})
    seen = []
    for label, amounts in (("fetch", (5, 3, -8, 4)), ("restore", (9, 9)), ("fetch", (1,)), ("deliver", (9,))):
        reporter.start(label, 10, "B")
        for amount in amounts:
            reporter.advance(amount)
            assert live.record.progress
            seen.append(live.record.progress["percent"])
    assert seen == [10, 16, 16, 16, 92, 99.9, 99.9, 99.9]


def test_pieces_do_not_make_progress_come_faster() -> None:
    def run(job_id: str, payload: Payload, reporter: Reporter) -> Payload:
        reporter.start("restore", 40, "frames")
        for frame in range(40):
            time.sleep(0.01)
            reporter.advance(1)
            reporter.emit({"frame": frame})
        return {}

    jobs = made(run)
    jobs.submit({}, "one")
    updates = asyncio.run(all_updates(jobs, "one"))
    times = [moment for moment, update in updates if update.progress]
    assert len([update for _, update in updates if update.piece]) == 40
    assert all(after - before > 0.2 for before, after in itertools.pairwise(times[:-1]))


def test_news_between_a_look_and_the_wait_for_more_is_not_missed() -> None:
    live = Live(Record("a", State.IN_PROGRESS, 0.0))
    record, seen = live.look()
    live.move(replace(record, state=State.COMPLETED))
    begin = time.monotonic()
    asyncio.run(live.news(seen, 30))
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("label", "expected"),
    [("fetch in.mp4", (0, 10)), ("find cuts", (10, 20)), ("restore", (20, 100)), ("unknown", (33, 33))],
)
def test_the_span_of_a_step(label: str, expected: tuple[float, float]) -> None:
    assert span(label, {"fetch": 2, "find cuts": 2, "restore": 16}, 33) == pytest.approx(expected)


def test_a_stream_comes_whole_and_before_the_result() -> None:
    def run(job_id: str, payload: Payload, reporter: Reporter) -> Payload:
        for frame in range(50):
            reporter.emit({"frame": frame})
            if frame % 10 == 0:
                time.sleep(0.005)
        return {}

    jobs = made(run)
    jobs.submit({}, "one")
    updates = [update for _, update in asyncio.run(all_updates(jobs, "one"))]
    pieces = [update.piece for update in updates if update.piece]
    assert pieces == [{"number": frame, "frame": frame} for frame in range(50)]
    assert updates[-1].final and updates[-1].final.stream == tuple(pieces)
    assert jobs.take_pieces("one") == tuple(pieces)
    assert jobs.take_pieces("one") == ()


def test_a_stream_nobody_takes_is_bounded_and_its_loss_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.serve.live.PIECES_BYTES", 10_000)

    def run(job_id: str, payload: Payload, reporter: Reporter) -> Payload:
        for _ in range(50):
            reporter.emit({"data": "x" * 990})
        return {}

    jobs = made(run)
    jobs.submit({}, "one")
    kept = [piece["number"] for piece in finished(jobs, "one").stream]
    assert kept == list(range(41, 50))


def test_two_followers_see_the_same() -> None:
    jobs = made(stepping(50))
    jobs.submit({}, "one")

    async def both() -> list[list[tuple[float, Update]]]:
        return await asyncio.gather(all_updates(jobs, "one"), all_updates(jobs, "one"))

    first, second = asyncio.run(both())
    assert first[-1][1] == second[-1][1]
    assert sum(1 for _, update in first if update.final) == 1


# ------------------------------------------------------------------ stops


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
    assert jobs.refresh_wanted
    gate.set()
    until(lambda: jobs.counts()[State.IN_PROGRESS] == 0)
    assert jobs.get("hangs") == record
    assert jobs.counts()[State.TIMED_OUT] == 1
    assert jobs.counts()[State.COMPLETED] == 0


# ------------------------------------------------------------------ errors


class OutOfMemoryError(RuntimeError):
    """Stands in for torch's, without loading torch."""

    __module__ = "torch"


@pytest.mark.parametrize(
    ("error", "code", "refresh"),
    [
        (InputError("input_damaged", "The video is damaged at frame 3."), "input_damaged", False),
        (UnavailableError("out_of_memory", "The result does not fit."), "out_of_memory", True),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory", True),
        (MemoryError(), "out_of_memory", True),
        (RuntimeError(f"no such file: {SECRET_PATH}"), "internal_error", False),
        (KeyError("hf_token"), "internal_error", False),
        (SystemExit(3), "internal_error", False),
        (KeyboardInterrupt(), "internal_error", False),
    ],
)
def test_what_a_job_raises(
    error: BaseException, code: str, refresh: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def run(job_id: str, payload: Payload, reporter: Reporter) -> Payload:
        if payload.get("good"):
            return {}
        raise error

    jobs = made(run)
    with caplog.at_level(logging.INFO):
        jobs.submit({}, "bad-7")
        jobs.submit({"good": True}, "next")
        record = finished(jobs, "bad-7")
        assert finished(jobs, "next").state is State.COMPLETED
    assert record.state is State.FAILED
    assert record.error is not None and set(record.error) == {"code", "message"}
    assert record.error["code"] == code
    for word in ("Traceback", "/var", "in.mp4", "hf_token", ".py"):
        assert word not in record.error["message"]
    assert jobs.refresh_wanted == refresh
    traced = [entry for entry in caplog.records if entry.exc_info]
    assert bool(traced) == (not isinstance(error, InputError))


@pytest.mark.parametrize("output", [{"frame": b"bytes"}, {"nan": float("nan")}, None, {"path": os}])
def test_an_output_that_is_not_json_fails_at_once(output: Any) -> None:
    jobs = made(lambda job_id, payload, reporter: output)
    jobs.submit({}, "odd")
    record = finished(jobs, "odd")
    assert record.state is State.FAILED
    assert record.error and record.error["code"] == "internal_error"
    assert record.output is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{SECRET_PATH} is not a video.", "in.mp4 is not a video."),
        (f"'{SECRET_PATH}': no", "'in.mp4': no"),
        (
            "See https://host/a/b.mp4 (16/9, 24/1001 frames).",
            "See https://host/a/b.mp4 (16/9, 24/1001 frames).",
        ),
        ("in /dev/shm/ there is no room", "in a folder there is no room"),
    ],
)
def test_a_caller_sees_no_path_of_the_container(text: str, expected: str) -> None:
    assert without_paths(text) == expected
    outcome = of_error(SeedpodError("any", text), "j")
    assert outcome.error == {"code": "any", "message": expected}


def test_only_what_the_lifecycle_stops_is_cancelled_or_timed_out() -> None:
    assert of_error(JobStopped("job_timeout", "Over."), "j").state is State.TIMED_OUT
    assert of_error(SeedpodError("job_timeout", "A stray code."), "j").state is State.FAILED


# ------------------------------------------------------------------ bounds


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


# ------------------------------------------------------------------ drain


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
