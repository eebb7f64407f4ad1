"""The jobs that are known: all that have not ended, and those that ended, for a time and within bounds.

Not for several threads at once: the lifecycle holds its lock. It does not know how a job runs or ends.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Final

from app.serve.live import Live

KEEP_BYTES: Final = 256 << 20  # of results and streams of jobs that have ended
TAKE_BYTES: Final = 8 << 20  # of a stream's pieces that are taken at once


class Kept:
    """Jobs by id. One that ended is known for `seconds`, as long as at most `number` others ended since."""

    def __init__(self, seconds: float, number: int) -> None:
        self._seconds, self._number = seconds, number
        self._jobs: dict[str, Live] = {}
        self._ended: deque[Live] = deque()
        self._bytes = 0

    def __iter__(self) -> Iterator[Live]:
        return iter(self._jobs.values())

    def get(self, job_id: str) -> Live | None:
        return self._jobs.get(job_id)

    def add(self, live: Live) -> None:
        """Know a job from now on."""
        self._jobs[live.record.id] = live

    def end(self, live: Live, nbytes: int) -> None:
        """A job has ended, with an output of `nbytes`."""
        live.nbytes += nbytes
        self._ended.append(live)
        self._bytes += live.nbytes
        self.forget()

    def forget(self) -> None:
        """Drop ended jobs that are too old, too many, or too large together (but for the last one)."""
        oldest = time.time() - self._seconds
        while self._ended:
            first = self._ended[0]
            too_much = len(self._ended) > 1 and self._bytes > KEEP_BYTES
            old = (first.record.finished or 0.0) < oldest
            if not (too_much or old or len(self._ended) > self._number):
                return
            self._ended.popleft()
            self._bytes -= first.nbytes
            del self._jobs[first.record.id]

    def take_pieces(self, live: Live) -> tuple[Mapping[str, Any], ...]:
        """The oldest pieces of a job's stream, which are then let go."""
        before, pieces = live.nbytes, live.take_pieces(TAKE_BYTES)
        if live.record.state.final:
            self._bytes -= before - live.nbytes
        return pieces
