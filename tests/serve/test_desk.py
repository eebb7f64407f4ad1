"""The local server's process: it ends when it is asked to, whatever connections are open, and by itself when
no job can run any more."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

ROOT = Path(__file__).resolve().parents[2]


class Desk:
    """A server that runs."""

    def __init__(self, log: Path) -> None:
        self._log = log
        with log.open("wb") as file:
            command = [sys.executable, "-m", "tests.serve.desk_process"]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        end = time.monotonic() + 30
        while not (found := re.findall(r"listening on http://127.0.0.1:(\d+)", self.log())):
            assert time.monotonic() < end and self.process.poll() is None, self.log()
            time.sleep(0.02)
        self.port = int(found[0])
        self.url = f"http://127.0.0.1:{self.port}"
        requests.get(f"{self.url}/ping", timeout=10)

    def log(self) -> str:
        return self._log.read_text()

    def stop(self) -> float:
        """Seconds that it took to end."""
        begin = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(20) == 0
        return time.monotonic() - begin


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    running = Desk(tmp_path / "log")
    yield running
    running.process.kill()
    running.process.wait()


def kept_alive(desk: Desk) -> Any:
    session = requests.Session()
    session.get(f"{desk.url}/ping", timeout=10)
    return session


def connected(sent: bytes) -> Callable[[Desk], Any]:
    def connect(desk: Desk) -> Any:
        client = socket.create_connection(("127.0.0.1", desk.port))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(sent)
        return client

    return connect


@pytest.mark.parametrize(
    ("connect", "seconds"),
    [
        (kept_alive, 1.0),
        (connected(b""), 1.0),
        (connected(b"POST /run HTTP/1.1\r\nHost: x\r\n"), 1.0),
        # Whoever is in the middle of a request or an answer has two seconds.
        (connected(b"POST /run HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                   b"Content-Length: 99\r\n\r\n{"), 3.5),
        (connected(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 400), 3.5),
    ],
    ids=["kept alive", "silent", "half a head", "half a body", "not read"],
)  # fmt: skip
def test_open_connections_do_not_keep_an_idle_server(
    desk: Desk, connect: Callable[[Desk], Any], seconds: float
) -> None:
    held = connect(desk)
    time.sleep(0.2)
    assert desk.stop() < seconds
    assert "Traceback" not in desk.log()
    held.close()


def test_who_waits_for_the_running_job_gets_its_result(desk: Desk) -> None:
    answers: list[dict[str, Any]] = []

    def ask(steps: int) -> None:
        answer = requests.post(f"{desk.url}/runsync", json={"input": {"steps": steps}}, timeout=20)
        answers.append(answer.json())

    callers = [threading.Thread(target=ask, args=(300,)), threading.Thread(target=ask, args=(1,))]
    for caller in callers:
        caller.start()
        time.sleep(0.15)
    desk.stop()
    for caller in callers:
        caller.join()
    assert sorted(answer["status"] for answer in answers) == ["COMPLETED", "FAILED"]
    assert "worker_stopping" in str(answers)


def test_a_second_ctrl_c_does_not_wait_for_the_running_job(desk: Desk) -> None:
    requests.post(f"{desk.url}/run", json={"input": {"steps": 5000}}, timeout=10)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        assert desk.process.poll() is None, "a second SIGTERM changes nothing"
        desk.process.send_signal(number)
        time.sleep(0.3)
    assert desk.process.wait(1) == 130


def test_when_no_job_can_run_it_ends_and_says_so(desk: Desk) -> None:
    requests.post(f"{desk.url}/runsync", json={"input": {"note": "no threads"}}, timeout=10)
    answer = requests.post(f"{desk.url}/runsync", json={"input": {}}, timeout=10).json()
    assert "worker_died" in answer["error"]
    assert desk.process.wait(10) == 70
    assert "no job can run here any more" in desk.log()
