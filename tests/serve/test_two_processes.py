"""The server with two processes behind one address, nano on each; what a caller sees, and who is left."""

from __future__ import annotations

import base64
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serve.test_server import REPOSITORY, Server, picture, server


def processes(pid: int) -> list[int]:
    """The processes with cards, of the server that is process `pid`."""
    children = [
        int(child)
        for tasks in Path(f"/proc/{pid}/task").glob("*/children")
        for child in tasks.read_text().split()
    ]
    return [child for child in children if b"app.serve.card" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.fixture(scope="module")
def both(nano_volume: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("both")
    with server(folder, SEEDPOD_ROOTS=nano_volume, SEEDPOD_GPUS="2", SEEDPOD_STAGE="shm") as running:
        running.until(200, seconds=300)
        end = time.monotonic() + 300
        while len(re.findall(r"card \d: ready", running.log.read_text())) < 2:
            assert time.monotonic() < end, running.log.read_text()
            time.sleep(0.1)
        yield running
        if running.process.poll() is None:
            running.stop()


def submit(running: Server, source: Path | None = None) -> str:
    if source is None:
        return str(running.run({"source": picture()}, "run")["id"])
    return str(
        running.run({"source": {"base64": base64.b64encode(source.read_bytes()).decode()}}, "run")["id"]
    )


def status(running: Server, job: str) -> str:
    return str(httpx.get(f"{running.url}/status/{job}").json()["status"])


def ended(running: Server, job: str, seconds: float = 300) -> str:
    end = time.monotonic() + seconds
    while (now := status(running, job)) in ("IN_QUEUE", "IN_PROGRESS"):
        assert time.monotonic() < end, running.log.read_text()
        time.sleep(0.05)
    return now


def test_files_are_staged_once_and_given_back(both: Server) -> None:
    log = both.log.read_text()
    assert len(re.findall(r"stage seedvr2_ema_nano.pth: .*; copied to /dev/shm", log)) == 1, log
    assert len(re.findall(r"stage seedvr2_ema_nano.pth: .*; staged already", log)) == 2
    copy = re.findall(r"copied to (/dev/shm/\S+)", log)[0]
    end = time.monotonic() + 10
    while Path(copy).exists():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_job_that_no_process_can_do_is_not_queued(both: Server) -> None:
    answer = httpx.post(f"{both.url}/run", json={"input": {"task": "generate", "prompt": "A fox"}})
    assert answer.status_code == 422 and answer.json()["error"]["code"] == "model_not_served"


def test_two_jobs_run_at_once_and_the_death_of_a_process_loses_none(both: Server) -> None:
    assert httpx.get(f"{both.url}/health").json()["workers"]["ready"] == 2
    long = REPOSITORY / "examples" / "clip.mp4"
    jobs = [submit(both, long), submit(both, long)]
    while [status(both, job) for job in jobs] != ["IN_PROGRESS"] * 2:
        time.sleep(0.02)
    waiting = submit(both)
    figures = httpx.get(f"{both.url}/metrics").text
    assert "seedpod_jobs_running 2.0" in figures and "seedpod_jobs_waiting 1.0" in figures
    before = processes(both.process.pid)
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    httpx.post(
        f"{both.url}/cancel/{jobs[1]}"
    )  # of the two one is cancelled, the other one's process may be dead
    assert ended(both, jobs[1]) == "CANCELLED"
    assert ended(both, waiting) == "COMPLETED"
    assert status(both, jobs[0]) == "IN_PROGRESS"  # on one of them, again or still
    httpx.post(f"{both.url}/cancel/{jobs[0]}")
    assert ended(both, jobs[0]) == "CANCELLED"
    assert before[1] in processes(both.process.pid)
    assert httpx.get(f"{both.url}/ping").status_code == 200


def test_a_stop_ends_every_process(both: Server) -> None:
    running = processes(both.process.pid)
    assert both.stop()[0] == 0
    assert not [pid for pid in running if Path(f"/proc/{pid}/cmdline").exists() and _is_card(pid)]


def _is_card(pid: int) -> bool:
    try:
        return b"app.serve.card" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
