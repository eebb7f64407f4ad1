"""What a running job is given: it reports its progress, streams pieces, and asks whether to go on.

Turns the progress of steps into the percent of a whole job. It does not know who listens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from app.errors import JobStopped
from app.logs import LogStream
from app.progress import Lines
from app.serve.live import Live
from app.serve.outcome import json_bytes, timed_out

# The steps of a job in their order, by how their labels begin, and the share of the whole that each takes
# on the way. What a share is wrong by shows as a bar of uneven speed, never as one that goes back.
Shares = Mapping[str | tuple[str, ...], float]  # where tasks differ: the step of each
SHARES: Final[Shares] = {"fetch": 3, "find cuts": 4, ("restore", "generate"): 90, "deliver": 3}
LARGEST: Final = 999_900  # bytes of a piece as JSON; with what is around it, the platform takes 1 MB
HIGHEST: Final = 99.9  # percent of a job that has not ended
DONE: Final[Mapping[str, Any]] = {"step": "done", "percent": 100.0, "eta_seconds": 0.0}


class Reporter:
    """The progress, stream and stop sign of one running job; implements `app.progress.Progress`.

    Steps also write lines to the log. All methods may be called from any thread of the job.
    """

    def __init__(
        self,
        live: Live,
        timeout: float,
        shares: Shares = SHARES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._live, self._timeout, self._shares, self._clock = live, timeout, shares, clock
        self._deadline = clock() + timeout
        self._lines = Lines(LogStream(__name__))
        self._lock = threading.Lock()
        self._percent = 0.0
        self._step, self._total, self._done = "", 0.0, 0.0
        self._from = self._to = 0.0
        self._began = self._deadline

    def check(self) -> None:
        """Go on, or stop; called between steps.

        Raises:
            JobStopped: The job was cancelled, ran out of time, or the worker stops.
        """
        if self._live.stop is not None:
            raise JobStopped(self._live.stop.code, self._live.stop.message)
        if self._clock() > self._deadline:
            raise timed_out(self._timeout)

    def emit(self, piece: Mapping[str, Any]) -> None:
        """Add a piece to the job's stream; it gets a `number`. Never waits for whoever takes it.

        Raises:
            TypeError, ValueError: It cannot be written as JSON, or is larger than `LARGEST`.
        """
        nbytes = json_bytes(piece)
        if nbytes > LARGEST:
            raise ValueError(f"a piece of {nbytes:,} bytes; at most {LARGEST:,} are sent as one")
        self._live.add_piece(piece, nbytes)

    def start(self, label: str, total: float | None, unit: str) -> None:
        with self._lock:
            self._lines.start(label, total, unit)
            self._step, self._total, self._done, self._began = label, total or 0.0, 0.0, self._clock()
            self._from, self._to = span(label, self._shares, self._percent)
            self._show(0.0)

    def advance(self, amount: float) -> None:
        with self._lock:
            self._lines.advance(amount)
            self._done += amount
            self._show(self._done / self._total if self._total else 0.0)

    def finish(self, note: str = "") -> None:
        with self._lock:
            self._lines.finish(note)
            self._show(1.0)

    def _show(self, fraction: float) -> None:
        """Show the current step at `fraction`; never goes back."""
        now = self._from + (self._to - self._from) * min(max(fraction, 0.0), 1.0)
        self._percent = max(self._percent, min(now, HIGHEST))
        made = now - self._from
        eta = (self._clock() - self._began) * (100.0 - now) / made if made > 0 else None
        self._live.show(
            {
                "step": self._step,
                "percent": round(self._percent, 1),
                "eta_seconds": None if eta is None else round(eta, 1),
            }
        )


def span(label: str, shares: Shares, reached: float) -> tuple[float, float]:
    """From which percent of the job to which the step `label` goes. One that is not in the table moves
    nothing: it stays where the job has come to."""
    before = 0.0
    whole = sum(shares.values())
    for name, share in shares.items():
        if label.startswith(name):
            return 100 * before / whole, 100 * (before + share) / whole
        before += share
    return reached, reached
