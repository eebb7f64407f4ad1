"""What each step of a job took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


class Stopwatch:
    """Seconds per named step, added up over interleaved pieces of work.

    Work on a CUDA device runs behind the host's back: callers time what ends with a value on the host.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Add the time spent inside to `step`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - begin

    def around(self, step: str, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; the time that producing them takes goes to `step`."""
        while True:
            with self(step):
                item = next(items, _END)
            if item is _END:
                return
            yield item  # type: ignore[misc]


_END = object()
