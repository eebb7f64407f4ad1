"""A job in memory: its record, who waits for news of it, and whether it should stop.

A `Live` is shared by the inference thread and any number of event loops. It does not know the queue.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from app.errors import SeedpodError
from app.serve.record import Record

PIECES: Final = 1000  # of a stream that nobody has taken, kept for a job; older ones are dropped
PIECES_BYTES: Final = 32 << 20  # of such pieces, kept for a job


class Live:
    """The mutable part of a job. `record` is replaced, never changed, so reading it needs no lock."""

    def __init__(self, record: Record, payload: Mapping[str, Any] | None = None) -> None:
        self.record = record
        self.payload = payload
        self.stop: SeedpodError | None = None
        self.nbytes = 0  # of the output and the stream, as JSON
        self._lock = threading.Lock()
        self._events = 0
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._pieces: deque[tuple[dict[str, Any], int]] = deque()
        self._emitted = 0

    def show(self, progress: Mapping[str, Any]) -> None:
        """Set the progress. Nobody is woken: who follows a job looks a few times a second."""
        with self._lock:
            if not self.record.state.final:
                self.record = replace(self.record, progress=progress)

    def add_piece(self, piece: Mapping[str, Any], nbytes: int) -> None:
        """Append to the stream and wake who follows it."""
        with self._lock:
            if self.record.state.final:
                return
            self._pieces.append(({"number": self._emitted, **piece}, nbytes))
            self._emitted += 1
            self.nbytes += nbytes
            while len(self._pieces) > PIECES or (self.nbytes > PIECES_BYTES and len(self._pieces) > 1):
                self.nbytes -= self._pieces.popleft()[1]
            self._show_pieces()
            self._wake()

    def take_pieces(self, limit: int) -> tuple[Mapping[str, Any], ...]:
        """The oldest pieces, of `limit` bytes together or just one; they are let go, and never come again."""
        taken: list[Mapping[str, Any]] = []
        with self._lock:
            while self._pieces and (not taken or self._pieces[0][1] <= limit):
                piece, nbytes = self._pieces.popleft()
                taken.append(piece)
                self.nbytes -= nbytes
                limit -= nbytes
            self._show_pieces()
        return tuple(taken)

    def _show_pieces(self) -> None:
        self.record = replace(self.record, stream=tuple(piece for piece, _ in self._pieces))

    def move(self, record: Record) -> None:
        """Go on to the next state, and wake who waits. What was shown or streamed meanwhile stays."""
        with self._lock:
            kept = self.record
            self.record = replace(record, stream=kept.stream, progress=record.progress or kept.progress)
            if record.state.final:
                self.payload = None
            self._wake()

    def _wake(self) -> None:
        self._events += 1
        waiting, self._waiting = self._waiting, []
        for loop, event in waiting:
            with suppress(RuntimeError):  # a loop that was closed waits for nothing
                loop.call_soon_threadsafe(event.set)

    def look(self) -> tuple[Record, int]:
        """The record, and the number of events so far, to give to `news`."""
        with self._lock:
            return self.record, self._events

    async def news(self, seen: int, seconds: float | None) -> None:
        """Return when there was an event after the first `seen`, or after `seconds`."""
        waiter = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            if self._events != seen:
                return
            self._waiting.append(waiter)
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(waiter[1].wait(), seconds)
        finally:
            with self._lock, suppress(ValueError):
                self._waiting.remove(waiter)

    async def ended(self, seconds: float) -> Record:
        """The record when the job has ended, or after `seconds`."""
        end = time.monotonic() + seconds
        record, seen = self.look()
        while not record.state.final and (left := end - time.monotonic()) > 0:
            await self.news(seen, left)
            record, seen = self.look()
        return record
