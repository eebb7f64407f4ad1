"""Several processes behind one lifecycle: jobs are spread, and the death of a process loses none."""

from __future__ import annotations

import asyncio
import os
import signal
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
        pool.run, timeout=read.job_seconds, keep_seconds=60, slots=len(cards), overdue=pools.HUNG + 10,
        able=pool.able,
    )  # fmt: skip
    pool.on_lost = jobs.lose
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


@pytest.mark.parametrize("code", ["out_of_memory", "device_failed"])
def test_a_process_is_replaced_after_such_an_error(two: Two, code: str) -> None:
    pool, jobs = two
    before = {card.process for card in pool._cards}
    (record,) = done(jobs, {"fail": code})
    assert record.error is not None and record.error["code"] == code
    until(lambda: [card.state for card in pool._cards] == ["ready", "ready"], 60)
    assert len(before & {card.process for card in pool._cards}) == 1
    assert not jobs.refresh_wanted


def test_the_death_of_a_rank_is_that_of_its_process(two: Two, tmp_path: Path) -> None:
    pool, jobs = two
    once, always = done(
        jobs, {"fail": "rank_failed", "once": str(tmp_path / "died")}, {"fail": "rank_failed"}
    )
    assert output(once)
    assert always.error == {"code": "rank_failed", "message": "it was asked to fail"}
    until(lambda: pool.workers == {"ready": 2}, 60)


def test_a_rank_that_dies_while_its_process_boots_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "PAUSE", 0.01)
    with served(tmp_path, ["0"], SEEDPOD_MODELS="rank") as (_, jobs):
        assert output(done(jobs, {})[0])["card"] == "0"
    assert (tmp_path / "rank").exists()


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


def test_one_card_fails_and_no_job_waits_for_it(tmp_path: Path) -> None:
    with served(tmp_path, ["0", "1"], SEEDPOD_MODELS="broken") as (pool, jobs):
        until(lambda: pool.workers == {"failed": 1, "ready": 1}, 60)
        first, second = (jobs.submit({"steps": 10, "seconds": 0.05}).id for _ in range(2))
        until(lambda: jobs.get(first).state is State.IN_PROGRESS)  # type: ignore[union-attr]
        time.sleep(0.1)
        assert jobs.get(second).state is State.IN_QUEUE  # type: ignore[union-attr] # its time does not run yet
        assert [output(finished(jobs, job))["card"] for job in (first, second)] == ["1", "1"]


@pytest.mark.parametrize("deaths", [pools.TRIES - 1, pools.TRIES])
def test_a_process_that_dies_while_it_boots_has_other_tries(
    deaths: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "PAUSE", 0.01)
    (tmp_path / "deaths").write_text("again\n" * deaths)
    with served(tmp_path, ["0"]) as (pool, jobs):
        (record,) = done(jobs, {})
        if deaths < pools.TRIES:
            assert output(record)["card"] == "0" and pool.state == "ready"
        else:
            message = "The process of card 0 died while it booted (SIGKILL)."
            assert record.error == {"code": "boot_failed", "message": message}
            assert pool.state == "failed" and not jobs.dead  # it never ran: whoever asks is told why


def test_an_idle_process_is_killed_twice_in_a_row(two: Two) -> None:
    pool, jobs = two
    for _ in range(2):
        pool._cards[0].process.kill()  # type: ignore[union-attr]
        until(lambda: pool._cards[0].state == "booting", 10)
        until(lambda: pool.workers == {"ready": 2}, 60)
    made = [output(each)["card"] for each in done(jobs, *[{"steps": 9, "seconds": 0.05}] * 2)]
    assert sorted(made) == ["0", "1"]


@pytest.mark.parametrize("moment", [-0.02, 0.0, 0.02])
def test_a_job_is_cancelled_while_its_process_dies(two: Two, moment: float) -> None:
    pool, jobs = two
    job = jobs.submit({"steps": 1000, "seconds": 0.01}).id
    left = pool._scratch / f"job-{job}"
    left.mkdir()
    until(lambda: any(card.state == "busy" for card in pool._cards))
    (busy,) = (card.process for card in pool._cards if card.state == "busy")
    busy.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]  # else it may end the job by itself
    for act in (lambda: jobs.cancel(job), busy.kill)[:: 1 if moment < 0 else -1]:  # type: ignore[union-attr]
        act()
        time.sleep(abs(moment))
    assert finished(jobs, job).state is State.CANCELLED
    assert not left.exists()  # what the dead one wrote
    until(lambda: pool.workers == {"ready": 2}, 60)


def test_when_the_last_card_is_lost_no_job_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "PAUSE", 0.01)
    with served(tmp_path, ["0"]) as (pool, jobs):
        until(lambda: pool.state == "ready", 60)
        (tmp_path / "deaths").write_text("again\n" * pools.TRIES)
        running, waiting = (jobs.submit({"steps": 1000, "seconds": 0.01}).id for _ in range(2))
        until(lambda: pool._cards[0].state == "busy")
        pool._cards[0].process.kill()  # type: ignore[union-attr]
        codes = [(finished(jobs, job, 30).error or {})["code"] for job in (running, waiting)]
        assert codes[0] in ("worker_died", "boot_failed") and codes[1] == "worker_died"
        assert jobs.dead and jobs.refresh_wanted


def test_a_process_that_cannot_be_started_leaves_its_card_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_process(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with served(tmp_path, ["0", "1"]) as (pool, jobs):
        until(lambda: pool.workers == {"ready": 2}, 60)
        monkeypatch.setattr(pools.subprocess, "Popen", no_process)
        pool._cards[0].process.kill()  # type: ignore[union-attr]
        until(lambda: pool.workers == {"failed": 1, "ready": 1}, 10)
        assert output(done(jobs, {})[0])["card"] == "1"


def test_a_drain_waits_for_every_card(tmp_path: Path) -> None:
    with served(tmp_path, ["0", "1"]) as (pool, jobs):
        until(lambda: [card.state for card in pool._cards] == ["ready", "ready"], 60)
        ids = [jobs.submit({"steps": steps, "seconds": 0.05}).id for steps in (5, 12, 1)]
        until(lambda: jobs.counts()[State.IN_PROGRESS] == 2)
        asyncio.run(jobs.drain(30))
        states = [jobs.get(job_id).state for job_id in ids]  # type: ignore[union-attr]
        assert states == [State.COMPLETED, State.COMPLETED, State.FAILED]  # the third had not begun
