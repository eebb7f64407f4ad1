"""The journal: what the next worker knows of the jobs of one that ended, however it ended."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.errors import ConfigError
from app.serve import journal as module
from app.serve.journal import Journal
from app.serve.lifecycle import FOLDER, Lifecycle
from app.serve.record import Record, State
from app.serve.reporter import Reporter

NOW = time.time()
DONE = Record("done", State.COMPLETED, NOW - 9, NOW - 8, NOW - 7, output={"url": "https://b/1"})
HALF = Record("half", State.IN_PROGRESS, NOW - 6, NOW - 5)
WAITED = Record("waited", State.IN_QUEUE, NOW - 4)


def echo(job_id: str, payload: Mapping[str, Any], reporter: Reporter) -> Mapping[str, Any]:
    return {"ran": job_id, **payload}


@contextmanager
def worker(path: Path, **changes: Any) -> Iterator[Lifecycle]:
    """A worker with the journal at `path`, which lets go of it at the end."""
    jobs = Lifecycle(echo, **{"timeout": 60.0, "keep_seconds": 600.0, "journal": path, **changes})
    try:
        yield jobs
    finally:
        asyncio.run(jobs.drain(10))
        jobs.close()


def written(path: Path, *records: Record) -> Path:
    """A journal that a killed worker left."""
    path.write_text("".join(f"\n{json.dumps(record.to_dict())}" for record in records))
    return path


def read(path: Path) -> list[Record]:
    journal = Journal.open(path)
    try:
        return journal.read()
    finally:
        journal.close()


def read_only(path: Path) -> list[Record]:
    """What the journal of a running worker says."""
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    return list({line["id"]: Record.from_dict(line) for line in lines}.values())


def test_what_is_appended_is_read_and_the_last_line_of_a_job_counts(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal"
    journal = Journal.open(path)
    for record in (WAITED, HALF, DONE):
        journal.append(record)
    failed = Record(
        "half", State.FAILED, HALF.created, HALF.started, NOW, error={"code": "c", "message": "m"}
    )
    journal.append(failed)
    journal.close()
    assert read(path) == [WAITED, DONE, failed]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "torn",
    [
        b'\n{"id": "next", "sta',
        b"\n\xff\xfe\x00",
        b"\n[1, 2]",
        b'\n{"id": "x"}',
        b'\n{"id": "x", "state": "DONE", "created": 1}',
        b'\n{"id": "x", "state": "COMPLETED", "created": 1}',
        b'\n{"id": "x", "state": "FAILED", "created": 1, "finished": "soon"}',
        b'\n{"id": 7, "state": "IN_QUEUE", "created": 1}',
        b'\n{"id": "x", "state": "IN_QUEUE", "created": 1, "more": 2}',
        b"\n\n\n",
        b'\n{"id": "nobody", "reported": true}',
        b'\n{"id": ["done"], "reported": true}',
    ],
)
def test_a_line_that_is_torn_or_not_ours_spoils_only_itself(torn: bytes, tmp_path: Path) -> None:
    path = written(tmp_path / "journal", DONE)
    with path.open("ab") as file:
        file.write(torn)
    journal = Journal.open(path)
    journal.append(WAITED)
    assert journal.read() == [DONE, WAITED]
    journal.close()
    with worker(path) as jobs:
        assert [record.id for record in jobs.died] == ["waited"]
        assert jobs.get("done") == DONE


def test_every_way_to_cut_the_file_off_keeps_the_lines_before(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", DONE, WAITED)
    whole = path.read_bytes()
    first = whole.index(b"\n", 1)
    for length in range(first, len(whole) + 1):
        path.write_bytes(whole[:length])
        assert read(path) == ([DONE, WAITED] if length == len(whole) else [DONE])


def test_what_was_not_done_has_failed_exactly_once_and_is_not_run(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", DONE, HALF, WAITED)
    with worker(path) as jobs:
        assert [record.id for record in jobs.died] == ["half", "waited"]
        assert jobs.counts()[State.FAILED] == 2
        for record in jobs.died:
            assert record.state is State.FAILED
            assert record.error and record.error["code"] == "worker_died"
            assert jobs.submit({}, record.id) == record
        died = jobs.died
    with worker(path) as jobs:
        assert jobs.died == ()
        assert jobs.get("half") == died[0]


def test_what_was_reported_is_told_apart_and_its_result_is_written_once(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", DONE, HALF)
    with worker(path) as jobs:
        assert [record.id for record in jobs.unreported] == ["done", "half"]
        jobs.submit({"data": "x" * 1000}, "new")
        asyncio.run(jobs.wait("new", 10))
        jobs.reported("done")
        size = path.stat().st_size
        jobs.reported("new")
        jobs.reported("new")
        jobs.reported("nobody")
        assert path.stat().st_size < size + 100
    with worker(path) as jobs:
        assert [record.id for record in jobs.unreported] == ["half"]
        known = jobs.get("new")
        assert known and known.reported and known.output == {"ran": "new", "data": "x" * 1000}
    written(path, replace(DONE, id="cancelled", state=State.CANCELLED))
    with worker(path) as jobs:
        assert jobs.unreported == (), "who cancelled a job knows of its end"


def test_a_job_is_written_down_before_its_submission_is_answered(tmp_path: Path) -> None:
    path, gate = tmp_path / "journal", threading.Event()

    def run(job_id: str, payload: Mapping[str, Any], reporter: Reporter) -> Mapping[str, Any]:
        return {"done": gate.wait(10)}

    jobs = Lifecycle(run, timeout=60, keep_seconds=60, journal=path)
    for name in "ab":
        jobs.submit({}, name)
        assert f'"id": "{name}"' in path.read_text()
    gate.set()
    asyncio.run(jobs.wait("b", 10))
    assert [record.state for record in read_only(path)] == [State.COMPLETED] * 2
    asyncio.run(jobs.drain(1))
    jobs.close()


def test_a_finished_job_is_known_with_its_output_and_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with worker(path) as jobs:
        jobs.submit({"seed": 1}, "a")
        before = asyncio.run(jobs.wait("a", 10))
    with worker(path) as jobs:
        after = jobs.submit({"seed": 2}, "a")
        assert after.output == before.output == {"ran": "a", "seed": 1}
        assert (after.state, after.created, after.finished) == (
            before.state, before.created, before.finished
        )  # fmt: skip
        assert jobs.counts()[State.COMPLETED] == 0


def test_what_is_old_is_forgotten_and_the_file_is_compacted(tmp_path: Path) -> None:
    lines = [Record(f"j{number}", State.COMPLETED, 1.0, 2.0, 3.0, output={}) for number in range(1000)]
    path = written(tmp_path / "journal", *lines, DONE)
    with worker(path) as jobs:
        assert jobs.get("j1") is None
        assert jobs.get("done") == DONE
        assert path.stat().st_size < 1000
    assert read(path) == [DONE]


def test_a_long_life_does_not_make_the_file_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLACK", 20_000)
    path = tmp_path / "journal"
    with worker(path, keep=5) as jobs:
        sizes = []
        for number in range(60):
            jobs.submit({"data": "x" * 2000}, f"j{number}")
            asyncio.run(jobs.wait(f"j{number}", 10))
            sizes.append(path.stat().st_size)
        assert max(sizes) < 60_000 < 60 * 2000
        assert any(after < before for before, after in itertools.pairwise(sizes))
    with worker(path, keep=5) as jobs:
        assert jobs.died == ()
        assert [number for number in range(60) if jobs.get(f"j{number}")] == [55, 56, 57, 58, 59]


def test_a_journal_in_use_is_refused_and_free_again_when_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with worker(path):
        with pytest.raises(ConfigError) as caught:
            Lifecycle(echo, timeout=1, keep_seconds=1, journal=path)
        assert caught.value.code == "journal_in_use"
    with worker(path) as jobs:
        assert jobs.died == ()


def test_a_journal_where_none_can_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        Journal.open(tmp_path / "file" / "journal")
    assert caught.value.code == "journal_unusable"


def test_a_full_disk_costs_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal"

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with worker(path) as jobs:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            jobs.submit({}, "a")
            record = asyncio.run(jobs.wait("a", 10))
        assert record.state is State.COMPLETED
        jobs.submit({}, "b")
        asyncio.run(jobs.wait("b", 10))
    assert "journal cannot be written" in caplog.text
    assert [record.id for record in read(path)] == ["b"]


def test_what_a_dead_worker_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    for folder in (f"{FOLDER}half", f"{FOLDER}other", "half"):
        (work / folder / "deep").mkdir(parents=True)
        (work / folder / "deep" / "in.mp4").write_bytes(b"x")
    elsewhere.mkdir()
    (elsewhere / "kept").write_bytes(b"x")
    (work / f"{FOLDER}waited").symlink_to(elsewhere)
    escape = Record("other/../../elsewhere", State.IN_QUEUE, NOW)
    with worker(written(tmp_path / "journal", HALF, WAITED, escape), work=work):
        left = sorted(path.name for path in work.iterdir())
    assert left == ["half", f"{FOLDER}other", f"{FOLDER}waited"]
    assert (elsewhere / "kept").exists()
