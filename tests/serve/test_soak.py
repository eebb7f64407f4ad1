"""500 mixed jobs from 8 clients, and a worker that is killed: no job is lost, none ends twice."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from app.serve.lifecycle import FOLDER, Lifecycle
from app.serve.record import Record
from app.serve.reporter import Reporter
from tests.serve.soak import Caller, Report, plan, resident, soak, toy, wrong

ROOT = Path(__file__).resolve().parents[2]
JOBS = plan(500, {"good": 0.7, "bad": 0.13, "cancelled": 0.15, "slow": 0.02})


def program(call: str, *arguments: Path) -> list[str]:
    """A process of its own that calls a function of this module: its memory is its own, and it can die."""
    module = __name__
    return [sys.executable, "-c", f"import sys, {module} as m; m.{call}(*sys.argv[1:])", *map(str, arguments)]


# ------------------------------------------------------------------ the soak


def soak_here(journal: str) -> None:
    """Soak a `Lifecycle` of this process; prints the report as JSON."""
    logging.disable(logging.CRITICAL)
    jobs = Lifecycle(toy, timeout=0.5, keep_seconds=600, keep=20, journal=Path(journal))
    report = asyncio.run(soak([Caller(jobs) for _ in range(8)], JOBS, resident))
    print(json.dumps(asdict(report)))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
@pytest.mark.slow
def test_500_jobs_from_8_clients(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    done = subprocess.run(program("soak_here", journal), cwd=ROOT, check=True, capture_output=True, text=True)
    report = Report(**json.loads(done.stdout))
    assert not wrong(report, JOBS)
    assert len(report.states) == 500
    ended = Counter(states[0] for states in report.states.values())
    assert set(ended) == {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}
    print(
        f"memory: {report.early / 1e6:.1f} MB after 50, {report.late / 1e6:.1f} MB after 500; {dict(ended)}"
    )
    assert report.late <= 1.05 * report.early
    finals = Counter(line["id"] for line in lines_of(journal) if "finished" in line)
    assert set(finals.values()) == {1}


def lines_of(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_bytes().split(b"\n") if line]


# ------------------------------------------------------------------ a worker that is killed


def work_here(journal: str, work: str) -> None:
    """Take job after job, some ahead; print each that died with the worker before, and each that ended."""
    logging.disable(logging.CRITICAL)
    folder = Path(work)

    def run(job_id: str, payload: Mapping[str, Any], reporter: Reporter) -> dict[str, Any]:
        own = folder / f"{FOLDER}{job_id}"
        own.mkdir()
        (own / "part").write_bytes(b"x")
        with (folder / "ran").open("a") as file:
            file.write(f"{job_id}\n")
        time.sleep(0.002)
        (own / "part").unlink()
        own.rmdir()
        return {"ran": job_id}

    def tell(word: str, record: Record) -> None:
        print(word, record.id, record.state, flush=True)

    async def take(jobs: Lifecycle) -> None:
        for number in count():
            for ahead in range(3):
                jobs.submit({}, f"j{number + ahead}")
            tell("ended", await jobs.wait(f"j{number}", 60))

    jobs = Lifecycle(run, timeout=60, keep_seconds=600, journal=Path(journal), work=folder)
    for record in jobs.died:
        tell("died", record)
    asyncio.run(take(jobs))


def test_a_killed_worker_loses_nothing_and_reports_nothing_twice(tmp_path: Path) -> None:
    journal, work = tmp_path / "journal", tmp_path / "work"
    work.mkdir()
    told: list[tuple[str, str, str]] = []
    chance = random.Random(3)
    for life in range(3):
        with subprocess.Popen(
            program("work_here", journal, work), cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout
            for line in process.stdout:
                word, job_id, state = line.split()
                told.append((word, job_id, state))
                if job_id == f"j{30 * (life + 1)}":
                    time.sleep(chance.random() * 0.01)
                    process.kill()
                    break
    states: dict[str, set[str]] = {}
    for _, job_id, state in told:
        states.setdefault(job_id, set()).add(state)
    assert all(len(each) == 1 for each in states.values())
    assert set(states) >= {f"j{number}" for number in range(91)}
    died = Counter(job_id for word, job_id, _ in told if word == "died")
    assert died and set(died.values()) == {1}
    assert all(states[job_id] == {"FAILED"} for job_id in died)
    ran = Counter((work / "ran").read_text().split())
    assert set(ran.values()) == {1}

    last = Lifecycle(toy, timeout=1, keep_seconds=600, journal=journal, work=work)
    assert not {record.id for record in last.died} & set(died)
    assert not list(work.glob(f"{FOLDER}*"))
    last.close()
    again = Lifecycle(toy, timeout=1, keep_seconds=600, journal=journal, work=work)
    assert again.died == ()
    again.close()
