"""Several processes behind one lifecycle: jobs are spread, and the death of a process loses none."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from app.progress import Silent
from app.serve import pool as pools
from app.serve.lifecycle import Lifecycle
from app.serve.pool import Pool
from app.serve.record import Record, State
from app.settings import load_settings
from tests.serve.jobs import finished, until


class FakePool(Pool):
    """Its processes only count, and there are no files."""

    module = "tests.serve.card_process"

    def _verified(self) -> Any:
        return None

    @contextmanager
    def _staged(self, files: Any) -> Iterator[None]:
        yield

    def kill(self) -> None:
        self.cancel.set()
        for card in self._cards:
            if card.process is not None:
                card.process.kill()
                card.process.wait()


@contextmanager
def served(tmp_path: Path, cards: list[str | None], **settings: str) -> Iterator[tuple[FakePool, Lifecycle]]:
    read = load_settings(settings)
    pool = FakePool(read, tmp_path, cards, Silent, os.environ)
    pool.start()
    jobs = Lifecycle(
        pool.run, timeout=read.job_seconds, keep_seconds=60, slots=len(cards), overdue=pools.HUNG + 10
    )
    try:
        yield pool, jobs
    finally:
        pool.kill()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakePool, Lifecycle]]:
    with served(tmp_path_factory.mktemp("pool"), ["0", "1"]) as made:
        until(lambda: [card.state for card in made[0]._cards] == ["ready", "ready"], 60)
        yield made


Two = tuple[FakePool, Lifecycle]


def done(jobs: Lifecycle, *payloads: dict[str, Any]) -> list[Record]:
    ids = [jobs.submit(payload).id for payload in payloads]
    return [finished(jobs, job_id, 60) for job_id in ids]


def output(record: Record) -> Any:
    assert record.state is State.COMPLETED, record
    return record.output


def test_jobs_are_spread_over_the_cards_and_run_at_once(two: Two) -> None:
    pool, jobs = two
    ids = [jobs.submit({"steps": 20, "seconds": 0.05}).id for _ in range(3)]
    until(lambda: jobs.counts()[State.IN_PROGRESS] == 2)
    assert jobs.counts()[State.IN_QUEUE] == 1
    outputs = [output(finished(jobs, job_id, 60)) for job_id in ids]
    assert {made["card"] for made in outputs} == {"0", "1"}
    assert len({made["process"] for made in outputs}) == 2
    assert pool.state == "ready"


def test_progress_and_pieces_come_through_in_order(two: Two) -> None:
    _, jobs = two
    job = jobs.submit({"steps": 10, "seconds": 0.06, "stream": True}).id
    percents = []
    while not (record := jobs.get(job)).state.final:  # type: ignore[union-attr]
        percents.append((record.progress or {}).get("percent", 0.0))  # type: ignore[union-attr]
        time.sleep(0.02)
    assert percents == sorted(percents) and len(set(percents)) > 3
    assert [piece["step"] for piece in jobs.take_pieces(job)] == list(range(10))


def test_a_job_is_cancelled_and_its_process_lives(two: Two) -> None:
    _, jobs = two
    processes = {output(each)["process"] for each in done(jobs, *[{"steps": 5, "seconds": 0.05}] * 2)}
    job = jobs.submit({"steps": 1000, "seconds": 0.02}).id
    until(lambda: jobs.get(job).state is State.IN_PROGRESS)  # type: ignore[union-attr]
    jobs.cancel(job)
    assert finished(jobs, job).state is State.CANCELLED
    after = {output(each)["process"] for each in done(jobs, *[{"steps": 5, "seconds": 0.05}] * 2)}
    assert after == processes


def test_errors_keep_their_code_and_show_no_path(two: Two) -> None:
    _, jobs = two
    coded, bug = done(jobs, {"fail": "device_memory"}, {"bug": True})
    assert coded.error == {"code": "device_memory", "message": "it was asked to fail"}
    assert bug.error is not None and bug.error["code"] == "internal_error"
    assert "secret" not in bug.error["message"]


def test_the_death_of_a_process_loses_no_job(two: Two, tmp_path: Path) -> None:
    pool, jobs = two
    left = pool._scratch / "job-lost"
    left.mkdir()
    dying = jobs.submit({"steps": 4, "seconds": 0.05, "die": 2, "once": str(tmp_path / "died")}, "lost").id
    others = done(jobs, *[{"steps": 2, "seconds": 0.05}] * 4)
    made = output(finished(jobs, dying, 60))
    assert (tmp_path / "died").exists() and made["id"] == "lost"
    assert not left.exists()  # what the dead one wrote is gone before another begins
    assert all(each.state is State.COMPLETED for each in others)
    until(lambda: [card.state for card in pool._cards] == ["ready", "ready"], 60)  # it was started again
    assert {output(each)["card"] for each in done(jobs, *[{"steps": 9, "seconds": 0.05}] * 2)} == {"0", "1"}


def test_a_job_that_kills_its_processes_ends(two: Two) -> None:
    pool, jobs = two
    (record,) = done(jobs, {"die": 0})
    assert record.error is not None and record.error["code"] == "worker_died"
    assert not jobs.dead and not jobs.refresh_wanted
    assert output(done(jobs, {})[0])["card"] in ("0", "1")
    until(lambda: [card.state for card in pool._cards] == ["ready", "ready"], 60)


def test_a_stream_that_is_out_is_not_made_again(two: Two, tmp_path: Path) -> None:
    pool, jobs = two
    mark = tmp_path / "died"
    (record,) = done(jobs, {"steps": 4, "stream": True, "die": 2, "once": str(mark)})
    assert record.error is not None and record.error["code"] == "worker_died"
    assert [piece["step"] for piece in record.stream] == [0, 1, 2]
    until(lambda: [card.state for card in pool._cards] == ["ready", "ready"], 60)


@pytest.mark.parametrize("code", pools.BROKEN)
def test_a_process_is_replaced_after_such_an_error(two: Two, code: str) -> None:
    pool, jobs = two
    before = {card.process for card in pool._cards}
    (record,) = done(jobs, {"fail": code})
    assert record.error is not None and record.error["code"] == code
    until(lambda: [card.state for card in pool._cards] == ["ready", "ready"], 60)
    assert len(before & {card.process for card in pool._cards}) == 1
    assert not jobs.refresh_wanted


def test_a_job_that_hears_nothing_is_killed_after_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "HUNG", 1.0)
    with served(tmp_path, [None], SEEDPOD_JOB_SECONDS="1") as (pool, jobs):
        until(lambda: pool.state == "ready", 60)
        (record,) = done(jobs, {"deaf": True, "steps": 1000, "seconds": 0.1})
        assert record.state is State.TIMED_OUT
        assert not jobs.dead
        until(lambda: pool.state == "ready", 60)
        assert output(done(jobs, {})[0])["card"] is None


def test_a_card_that_does_not_boot_leaves_the_others(tmp_path: Path) -> None:
    with served(tmp_path, ["0", "1"], SEEDPOD_MODELS="broken") as (pool, jobs):
        made = [output(each) for each in done(jobs, {}, {}, {})]
        assert {each["card"] for each in made} == {"1"}
        assert pool.state == "ready"
        until(lambda: pool.reason == "this card is broken", 60)
    with served(tmp_path, ["0"], SEEDPOD_MODELS="broken") as (pool, jobs):
        (record,) = done(jobs, {})
        assert record.error == {"code": "boot_failed", "message": "this card is broken"}
        assert pool.state == "failed"


def test_a_drain_waits_for_every_card(tmp_path: Path) -> None:
    with served(tmp_path, ["0", "1"]) as (pool, jobs):
        until(lambda: [card.state for card in pool._cards] == ["ready", "ready"], 60)
        ids = [jobs.submit({"steps": steps, "seconds": 0.05}).id for steps in (5, 12, 1)]
        until(lambda: jobs.counts()[State.IN_PROGRESS] == 2)
        asyncio.run(jobs.drain(30))
        states = [jobs.get(job_id).state for job_id in ids]  # type: ignore[union-attr]
        assert states == [State.COMPLETED, State.COMPLETED, State.FAILED]  # the third had not begun
