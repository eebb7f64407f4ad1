"""A server with nano models, and queues of jobs that it is given at once.

Time is from the first request to the end of the last job; memory is the peak of the server's process in all,
models and libraries included.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.growing.jobs import Point, source

ROOT = Path(__file__).resolve().parents[2]
HEIGHT, WIDTH, FRAMES = 32, 48, 9
LIMIT = 600.0  # seconds for anything
SOURCE = {"source": {"path": f"{FRAMES}x{HEIGHT}x{WIDTH}.mp4"}}
INPUTS: dict[str, dict[str, Any]] = {
    "restore": {"task": "restore", "model": "nano", "scale": 1, **SOURCE},
    "generate": {
        "task": "generate", "model": "nano-wan", "prompt": "a cat",
        "frames": FRAMES, "height": HEIGHT, "width": WIDTH,
    },
    "autoencode": {"task": "autoencode", "model": "nano-wan-vae", "report": False, **SOURCE},
}  # fmt: skip


def points(task: str, counts: Sequence[int], folder: Path) -> list[Point]:
    """So many jobs of a task, on a server of its own."""
    with server(folder) as (pid, port):
        queue(port, task, 1)
        found = []
        for count in counts:
            Path(f"/proc/{pid}/clear_refs").write_text("5")
            core, begin = cores(pid), time.perf_counter()
            queue(port, task, count)
            took = time.perf_counter() - begin
            found.append(Point(count, took, cores(pid) - core, peak(pid)))
        return found


@contextmanager
def server(folder: Path) -> Iterator[tuple[int, int]]:
    """A server that is ready; its process and port. `folder` gets its models and source."""
    if not (folder / "nano").exists():
        maker = [sys.executable, "tools/make_nano.py", str(folder), "seedvr2", "wan"]
        subprocess.run(maker, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    source(folder, FRAMES, HEIGHT, WIDTH)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"ROOTS": folder, "CACHE": folder / "cache", "SCRATCH": folder / "scratch", "INPUT": folder,
                "MODELS": "nano,nano-wan,nano-wan-vae", "HOST": "127.0.0.1", "PORT": port}  # fmt: skip
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SEEDPOD_")}
    environ = kept | {f"SEEDPOD_{key}": str(value) for key, value in settings.items()}
    log = folder / "server.log"
    with log.open("w") as told:
        process = subprocess.Popen(
            [sys.executable, "entrypoint.py", "serve"], cwd=ROOT, env=environ, stdout=told, stderr=told
        )
    try:
        end = time.perf_counter() + LIMIT
        while not ready(port):
            if process.poll() is not None or time.perf_counter() > end:
                raise RuntimeError(f"the server did not get ready:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield process.pid, port
    finally:
        process.terminate()
        process.wait()


def queue(port: int, task: str, count: int) -> None:
    """Submit jobs at once, each with a seed of its own, and wait for the last."""
    ids = [call(port, "run", {"input": seeded(task, number)})["id"] for number in range(count)]
    end = time.perf_counter() + LIMIT
    for job in ids:
        while (answer := call(port, f"status/{job}"))["status"] in ("IN_QUEUE", "IN_PROGRESS"):
            if time.perf_counter() > end:
                raise RuntimeError(f"{task}: a job of {count} did not end")
            time.sleep(0.02)
        if answer["status"] != "COMPLETED":
            raise RuntimeError(f"{task}: {answer}")


def seeded(task: str, number: int) -> dict[str, Any]:
    return INPUTS[task] | ({"seed": number} if task != "autoencode" else {})


def call(port: int, path: str, body: object = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/{path}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def peak(pid: int) -> int:
    """The most bytes of memory that the process held since its peak was last reset."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def cores(pid: int) -> float:
    """Seconds of processors that the process and its ended children took."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
