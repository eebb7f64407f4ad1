"""What a job reports: ordered, never back, not too often, and nothing after its result."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import replace

import pytest

from app.errors import InputError
from app.serve.live import Live
from app.serve.record import Record, State, Update
from app.serve.reporter import Reporter, span
from tests.serve.jobs import Payload, all_updates, finished, made, stepping


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
