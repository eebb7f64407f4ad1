"""Real worker processes for tests, with a fake job: a process that has imported the SDK forks one for each.

The import takes two seconds, a fork none. `python -m tests.serve.worker_process` is one worker, started as
the container starts it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START = 20.0  # seconds that a worker may take to its first poll, on a busy machine
QUICK = {"RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true", "RUNPOD_SKIP_GPU_CHECK": "true"}


class FakeBoot:
    """A boot that is over after `seconds`, unless it is cancelled."""

    def __init__(self, seconds: float = 0.0, reason: str | None = None) -> None:
        self.cancel = threading.Event()
        self.state, self.reason = "booting", reason
        threading.Thread(target=self._run, args=(seconds,), daemon=True).start()

    def _run(self, seconds: float) -> None:
        if self.cancel.wait(seconds):
            print("boot: partial files removed", flush=True)
        self.state = "failed" if self.reason or self.cancel.is_set() else "ready"


def fake_run(job_id: str, payload: Mapping[str, Any], reporter: Any) -> Any:
    """A job of `steps` of `seconds` each; what else the payload asks for, it does."""
    from app.errors import InputError

    steps = payload.get("steps", 1)
    reporter.start("restore", steps, "frames")
    for step in range(steps):
        reporter.check()
        time.sleep(payload.get("seconds", 0.0))
        reporter.advance(1)
        if payload.get("stream"):
            reporter.emit({"frame": step, "data": "x" * payload.get("size", 0)})
    reporter.finish()
    if payload.get("fail") == "coded":
        raise InputError("clip_damaged", "clip.mp4 ends after 3 of 9 frames; send a whole one.")
    if payload.get("fail"):
        raise RuntimeError("/srv/secret/place broke")
    if payload.get("bytes"):
        return {"clip": b"bytes"}
    if payload.get("environment"):
        shown = subprocess.run(["env"], capture_output=True, text=True, check=True).stdout
        return {"names": sorted(line.split("=")[0] for line in shown.splitlines() if "=" in line)}
    if payload.get("memory"):
        raise MemoryError
    if payload.get("no_threads"):
        threading.Timer = _no_thread  # type: ignore[misc, assignment]
    return {"done": job_id}


def _no_thread(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def fake_validate(payload: Any) -> None:
    from app.errors import UsageError

    if not isinstance(payload, Mapping) or "task" not in payload:
        raise UsageError("request_invalid", "task is missing; it may be fake.")


def work(options: Mapping[str, Any]) -> None:
    """Be a worker, as `serve` is one."""
    from app.serve.stop import Stop

    stop = Stop()
    stop.install()
    from app import logs
    from app.serve.lifecycle import Lifecycle
    from app.serve.worker import serve_on_platform

    logs.setup("auto", sys.stderr, hosted=True)  # before the SDK is imported, which else sets up its own
    boot = FakeBoot(options.get("boot", 0.0), options.get("reason"))
    journal = Path(options["journal"]) if "journal" in options else None
    slots = options.get("slots", 1)
    lifecycle = Lifecycle(fake_run, timeout=60, keep_seconds=60, journal=journal, slots=slots)
    if "lost" in options:
        threading.Timer(options["lost"], lifecycle.lose).start()
    serve_on_platform(
        lifecycle,
        boot,
        stop,
        validate=fake_validate,
        grace=options.get("grace", 5.0),
    )


# ------------------------------------------------------------------ forking


def fork_workers() -> None:
    """Fork a worker for each line of options on standard input; write its pid, then how it ended."""
    for module in ("runpod.serverless.modules.rp_scale", "app.serve.report", "app.serve.worker"):
        importlib.import_module(module)
    answers = os.dup(1)
    print("ready", flush=True)
    for line in sys.stdin:
        options = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            log = os.open(options["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.close(answers)
            sys.argv = ["entrypoint.py"]
            os.environ.update(options.get("environ", {}))
            work(options)
            os._exit(99)  # it never returns
        os.write(answers, f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        os.write(answers, f"{os.waitstatus_to_exitcode(status)} {time.monotonic()}\n".encode())


class Workers:
    """Starts workers, one after the other."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.serve.worker_process", "fork"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._line() == "ready"

    def start(self, log: Path, **options: Any) -> Running:
        """A worker with these options of `work`."""
        assert self._process.stdin is not None
        print(json.dumps({"log": str(log), **options}), file=self._process.stdin, flush=True)
        return Running(self, int(self._line()), log)

    def ended(self) -> tuple[int, float]:
        status, moment = self._line().split()
        return int(status), float(moment)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


class Running:
    """A worker process."""

    def __init__(self, workers: Workers, pid: int, log: Path) -> None:
        self._workers, self.pid, self._log = workers, pid, log
        self._ended: tuple[int, float] | None = None

    def terminate(self) -> None:
        """Send SIGTERM; `seconds` counts from here."""
        self.asked = time.monotonic()
        os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> int:
        """Its exit status, once it ended; `seconds` is then how long that took."""
        if self._ended is None:
            self._ended = self._workers.ended()
        return self._ended[0]

    @property
    def seconds(self) -> float:
        self.wait()
        assert self._ended is not None
        return self._ended[1] - self.asked

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def left(self) -> list[int]:
        """Processes of its session that live."""
        alive = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.pid and state != "Z":
                    alive.append(int(path.parent.name))
        return alive

    def kill(self) -> None:
        """End it and its heartbeat, whatever they do."""
        if self._ended is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()


if __name__ == "__main__":
    if sys.argv[1:] == ["fork"]:
        fork_workers()
    else:
        work(json.loads(sys.argv[1]))
