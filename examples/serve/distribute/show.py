"""Progress for a person: one line that changes on a terminal, a line now and then in a log. Nothing but the
standard library: the machine of a client has no more."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

EVERY = 15.0  # seconds between two lines of a log


def duration_text(seconds: float) -> str:
    """ "3 s", "12 min", "2 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class Show:
    """Tells how far something is; may be called from several threads."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream or sys.stderr, clock
        self._terminal = self._stream.isatty()
        self._lock = threading.Lock()
        self._told = -EVERY
        self._width = 0

    def line(self, text: str) -> None:
        """A line that stays."""
        with self._lock:
            self._print(text + "\n")
            self._width = 0

    def step(self, text: str, done: float, total: float, begun: float, note: str = "") -> None:
        """How far a step is, since the clock stood at `begun`; shown in place, or now and then."""
        now = self._clock()
        with self._lock:
            if now - self._told < (0.1 if self._terminal else EVERY):
                return
            self._told = now
            share = min(done / total, 1.0) if total else 0.0
            much = f" {100 * share:.0f} %" if total else ""
            left = f", {duration_text((now - begun) * (1 - share) / share)} left" if share > 0.01 else ""
            text = f"{text}{much}{left}{note}"
            self._print(text if self._terminal else text + "\n")
            self._width = len(text) if self._terminal else 0

    def close(self) -> None:
        """Leave the line that changes."""
        with self._lock:
            self._print("")
            self._width = 0

    def _print(self, text: str) -> None:
        clear = "\r" + " " * self._width + "\r" if self._width else ""
        self._stream.write(clear + text)
        self._stream.flush()
