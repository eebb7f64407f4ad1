"""The stream of a job is the same wherever it runs: the official client against the local server, and against
the platform's stand-in with a real worker behind it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests
import runpod

from app.serve import kept, live
from app.serve.reporter import LARGEST, Reporter
from tests.serve.jobs import Payload, finished, made, until
from tests.serve.local_server import lifecycle, serving
from tests.serve.platform import LARGEST_PIECE, Platform
from tests.serve.worker_process import fake_run, fake_validate

PIECE = 100_000  # bytes of a piece that holds a part of a video, in base64


@pytest.fixture(params=["the local server", "the platform"])
def endpoint(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[runpod.Endpoint]:
    """An endpoint as the official client knows it."""
    with _served(request) as (url, name):
        monkeypatch.setattr(runpod, "endpoint_url_base", url)
        yield runpod.Endpoint(name, api_key="any")


@contextmanager
def _served(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    if request.param == "the local server":
        with serving(lifecycle(fake_run), validate=fake_validate) as served:
            yield f"{served.url}/v2", "local"
    else:
        platform: Platform = request.getfixturevalue("platform")
        request.getfixturevalue("start")()
        yield f"http://127.0.0.1:{platform.port}/v2", "endpoint"


def test_each_piece_comes_once_in_order_while_the_job_runs_and_then_the_result(
    endpoint: runpod.Endpoint,
) -> None:
    job = endpoint.run({"task": "fake", "steps": 30, "seconds": 0.1, "stream": True, "size": PIECE})
    seen = [(piece, job.status()) for piece in job.stream()]
    assert [piece for piece, _ in seen] == [
        {"number": number, "frame": number, "data": "x" * PIECE} for number in range(30)
    ]
    assert seen[0][1] == "IN_PROGRESS" and seen[-1][1] == "COMPLETED"
    assert job.output() == {"done": job.job_id}  # the result, not the pieces: as of a job without a stream


def test_progress_is_told_by_the_status_and_is_no_piece(endpoint: runpod.Endpoint) -> None:
    job = endpoint.run({"task": "fake", "steps": 10, "seconds": 0.1, "stream": True})
    told = []
    while (status := job._fetch_job())["status"] in ("IN_QUEUE", "IN_PROGRESS"):
        if "output" in status:
            told.append(status["output"])
        time.sleep(0.05)
    assert all(set(each) == {"step", "percent", "eta_seconds"} for each in told)
    percents = [each["percent"] for each in told]
    assert percents == sorted(percents) and len(set(percents)) > 2
    assert [set(piece) for piece in job.stream()] == [{"number", "frame", "data"}] * 10


def test_a_job_that_fails_ends_its_stream_and_tells_why(endpoint: runpod.Endpoint) -> None:
    job = endpoint.run({"task": "fake", "steps": 3, "stream": True, "fail": "coded"})
    assert [piece["frame"] for piece in job.stream()] == [0, 1, 2]
    status = job._fetch_job()
    assert status["status"] == "FAILED" and "clip_damaged" in status["error"]


def test_a_job_without_pieces_has_an_empty_stream(endpoint: runpod.Endpoint) -> None:
    job = endpoint.run({"task": "fake", "steps": 2})
    assert list(job.stream()) == []
    assert job.output() == {"done": job.job_id}


# ------------------------------------------------------------------ bounds


def test_the_largest_piece_fits_what_the_platform_takes(start: Any, platform: Platform) -> None:
    start()
    around = len('{"frame": 0, "data": ""}')
    job = platform.put({"task": "fake", "stream": True, "size": LARGEST - around})
    platform.final(job)
    (piece,) = [each for each in platform.reports[job] if each.kind == "job-stream"]
    assert LARGEST <= len(piece.body["output"]["data"]) + around < LARGEST_PIECE

    over = platform.put({"task": "fake", "stream": True, "size": LARGEST - around + 1})
    assert "internal_error" in platform.final(over)["error"]


def test_a_slow_platform_holds_up_no_job_and_loses_no_piece(start: Any, platform: Platform) -> None:
    """Sixty pieces are made ten times as fast as they are taken; then comes the result, after all of them."""
    start()
    platform.slow = 0.02
    job = platform.put({"task": "fake", "steps": 60, "seconds": 0.002, "stream": True, "size": PIECE})
    assert platform.final(job, 20) == {"output": {"done": job}}
    reports = platform.reports[job]
    assert [each.body["output"]["frame"] for each in reports if each.kind == "job-stream"] == list(range(60))
    assert reports[-1].final


def test_pieces_outlive_an_outage_of_the_platform(start: Any, platform: Platform) -> None:
    start()
    job = platform.put({"task": "fake", "steps": 20, "seconds": 0.05, "stream": True})
    platform.until(lambda: len(platform.reports.get(job, [])) > 5)
    platform.down = True
    time.sleep(1.5)
    platform.down = False
    platform.final(job)
    pieces = [each for each in platform.reports[job] if each.kind == "job-stream"]
    assert [each.body["output"]["frame"] for each in pieces] == list(range(20))


def emitting(count: int, size: int) -> Any:
    def run(job_id: str, payload: Payload, reporter: Reporter) -> Payload:
        for _ in range(count):
            reporter.emit({"data": "x" * size})
        return {}

    return run


def test_what_was_taken_is_not_kept() -> None:
    jobs = made(emitting(50, PIECE))
    jobs.submit({}, "one")
    record = finished(jobs, "one")
    assert len(record.stream) == 50
    assert [piece["number"] for piece in jobs.take_pieces("one")] == list(range(50))
    assert jobs.take_pieces("one") == ()
    record = finished(jobs, "one")
    assert record.stream == ()
    assert jobs._jobs._bytes < 100  # the result


def test_one_answer_is_bounded_and_the_rest_comes_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "TAKE_BYTES", 10 * PIECE)
    with serving(lifecycle(emitting(25, PIECE)), validate=fake_validate) as served:
        job_id = served.submit(task="fake")
        served.until(job_id, "COMPLETED")
        sizes = [len(served.get(f"/stream/{job_id}").json()["stream"]) for _ in range(4)]
    assert sizes == [9, 9, 7, 0]


def test_a_piece_that_is_larger_than_an_answer_comes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "TAKE_BYTES", 10)
    jobs = made(emitting(3, 100))
    jobs.submit({}, "one")
    finished(jobs, "one")
    assert [len(jobs.take_pieces("one")) for _ in range(4)] == [1, 1, 1, 0]


def test_a_long_stream_that_somebody_takes_is_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred pieces through a buffer that holds ten, to a client that asks again and again."""
    monkeypatch.setattr(live, "PIECES_BYTES", 10 * PIECE)

    def run(job_id: str, payload: Payload, reporter: Reporter) -> Payload:
        for _ in range(100):
            reporter.emit({"data": "x" * PIECE})
            time.sleep(0.01)
        return {}

    numbers: list[int] = []
    with serving(lifecycle(run), validate=fake_validate) as served, requests.Session() as session:
        job_id, status = served.submit(task="fake"), ""
        while True:
            answer = session.get(f"{served.url}/stream/{job_id}", timeout=10).json()
            numbers += [piece["output"]["number"] for piece in answer["stream"]]
            if answer["status"] == "COMPLETED" and not answer["stream"]:
                break
            time.sleep(0.01)
    assert numbers == list(range(100)), status


def test_streams_that_nobody_takes_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "KEEP_BYTES", 5 * PIECE)
    jobs = made(emitting(2, PIECE))
    for number in range(6):
        jobs.submit({}, str(number))
    finished(jobs, "5")
    assert [number for number in range(6) if jobs.get(str(number))] == [4, 5]


def test_what_the_platform_was_told_is_not_kept() -> None:
    jobs = made(emitting(3, PIECE))
    jobs.submit({}, "one")
    jobs.reported("one")  # not yet ended: nothing happens
    finished(jobs, "one")
    jobs.reported("one")
    record = jobs.get("one")
    assert record and record.reported and record.stream == ()


@pytest.mark.parametrize(
    "piece", [{"data": float("nan")}, {"data": b"x"}, {"data": "\ud800"}, {"data": "x" * LARGEST}]
)
def test_a_piece_that_cannot_be_sent_is_an_error_of_the_job(piece: dict[str, Any]) -> None:
    def run(job_id: str, payload: Payload, reporter: Reporter) -> Payload:
        reporter.emit(piece)
        return {}

    jobs = made(run)
    jobs.submit({}, "one")
    error = finished(jobs, "one").error
    assert error and error["code"] == "internal_error"


def test_a_follower_that_leaves_disturbs_nobody() -> None:
    async def leave(jobs: Any) -> None:
        async for update in jobs.updates("one"):
            if update.piece is not None:
                return

    jobs = made(emitting(50, 100))
    jobs.submit({}, "one")
    asyncio.run(leave(jobs))
    until(lambda: (record := jobs.get("one")) and record.state.final)
