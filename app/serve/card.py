"""A process that does jobs on a card of its own, one at a time, for the process that serves.

`python -m app.serve.card DESCRIPTOR`: orders come and news go through the pipe at that descriptor, as tuples
that begin with a word. It ends when the pipe does. It knows nothing of queues, HTTP or RunPod.

    boot settings scratch  ->  ready or failed, reason, code
    job id payload         ->  start, advance, finish, emit ...; then output value | error kind code message
    stop id code message
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from app import logs
from app.errors import JobStopped, SeedpodError
from app.progress import Lines
from app.serve.outcome import json_bytes, of_error
from app.serve.stop import leave
from app.settings import Settings

LOOK: Final = 0.02  # seconds between two looks at whether the boot is over
EVERY: Final = 0.05  # seconds between two messages that say how far a step is
Do = Callable[[str, Mapping[str, Any], "Teller"], Mapping[str, Any]]  # (job id, payload, teller) -> output
_log = logging.getLogger(__name__)


def work(pipe: Connection, boot: Callable[[Connection, Settings, Path], Do]) -> None:
    """Boot, then do jobs. Never returns."""
    orders: queue.Queue[tuple[Any, ...]] = queue.Queue()
    stops: dict[str, JobStopped] = {}
    threading.Thread(target=_hear, args=(pipe, orders, stops), daemon=True).start()
    _, settings, scratch = orders.get()
    do = boot(pipe, settings, scratch)
    while True:
        _, job_id, payload = orders.get()
        with logs.of_job(job_id):
            try:
                output = do(job_id, payload, Teller(pipe, job_id, stops))
                json_bytes(output)
            except BaseException as error:
                pipe.send(_told(error, job_id))
            else:
                pipe.send(("output", output))
        stops.pop(job_id, None)


def boot(pipe: Connection, settings: Settings, scratch: Path) -> Do:
    """Load the models, tell how that went, and return what does jobs with them."""
    from app.serve.boot import Boot

    logs.setup(
        settings.log_format, sys.stderr, hosted=settings.runpod_jobs is not None, secrets=settings.secrets()
    )
    loading = Boot(settings, scratch, lambda: Lines(logs.LogStream("app.boot")))
    loading.start()
    while loading.state == "booting":
        time.sleep(LOOK)
    pipe.send((loading.state, loading.reason, loading.code))
    if loading.state == "failed":
        leave(70)  # which is told already, here and there
    context = loading.wait()
    from app.job.handle import handle

    return lambda job_id, payload, teller: handle(context, job_id, payload, teller, teller.check, teller.emit)


def _told(error: BaseException, job_id: str) -> tuple[str, str, str, str]:
    """An error as the process that serves can raise it again; a fault of ours goes to the log, too."""
    if isinstance(error, SeedpodError):
        return "error", type(error).__name__, error.code, error.message
    _log.error("job failed: %s", error, exc_info=error)
    coded = of_error(error, job_id).error or {}
    kind = "InternalError" if coded["code"] == "internal_error" else "UnavailableError"
    return "error", kind, coded["code"], coded["message"]


class Teller:
    """What a job is given in place of a `Reporter`: it sends what it is told to the process that serves."""

    def __init__(self, pipe: Connection, job_id: str, stops: Mapping[str, JobStopped]) -> None:
        self._pipe, self._job_id, self._stops = pipe, job_id, stops
        self._lock = threading.Lock()
        self._untold, self._told = 0.0, 0.0  # progress, and when it was sent last

    def check(self) -> None:
        """As `Reporter.check`."""
        if (stop := self._stops.get(self._job_id)) is not None:
            raise JobStopped(stop.code, stop.message)

    def emit(self, piece: Mapping[str, Any]) -> None:
        """As `Reporter.emit`."""
        with self._lock:
            self._pipe.send(("emit", piece))

    def start(self, label: str, total: float | None, unit: str) -> None:
        with self._lock:
            self._untold = 0.0
            self._pipe.send(("start", label, total, unit))

    def advance(self, amount: float) -> None:
        with self._lock:
            self._untold += amount
            if time.monotonic() - self._told > EVERY:
                self._tell()

    def finish(self, note: str = "") -> None:
        with self._lock:
            self._tell()
            self._pipe.send(("finish", note))

    def _tell(self) -> None:
        if self._untold:
            self._pipe.send(("advance", self._untold))
        self._untold, self._told = 0.0, time.monotonic()


def _hear(pipe: Connection, orders: queue.Queue[tuple[Any, ...]], stops: dict[str, JobStopped]) -> None:
    with suppress(OSError, EOFError):
        while True:
            order = pipe.recv()
            if order[0] == "stop":
                stops[order[1]] = JobStopped(*order[2:])
            else:
                orders.put(order)
    leave()


def main(descriptor: int) -> None:
    """Be the process of a card."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the process that serves decides when the work is over
    import torch  # noqa: F401 - while others verify and stage the files

    try:
        work(Connection(descriptor), boot)
    except BaseException:
        _log.exception("the process of a card ends")
        os._exit(70)


if __name__ == "__main__":
    main(int(sys.argv[1]))
