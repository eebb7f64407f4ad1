"""Progress of long work: a bar on a terminal, a line in a log; always with a rate and an estimate.

Work reports through the `Progress` protocol and knows nothing of where it is shown.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.progress import ProgressColumn as Column
from rich.table import Column as Cell
from rich.text import Text


class Progress(Protocol):
    """A sink of progress. `done` and `total` are in the unit named at `start`."""

    def start(self, label: str, total: float | None, unit: str) -> None:
        """Begin a step; `unit` is "B" for bytes or a plural noun ("frames")."""

    def advance(self, amount: float) -> None:
        """Add to what the current step has done. May be called from several threads."""

    def finish(self, note: str = "") -> None:
        """End the current step; `note` says what came of it."""


class Silent:
    """Shows nothing."""

    def start(self, label: str, total: float | None, unit: str) -> None: ...

    def advance(self, amount: float) -> None: ...

    def finish(self, note: str = "") -> None: ...


def amount_text(amount: float, unit: str) -> str:
    """`amount` as a person reads it: 12_300_000 "B" -> "12.3 MB", 24 "frames" -> "24 frames"."""
    if unit == "B":
        return decimal(int(amount))
    return f"{amount:,.0f} {unit}" if amount >= 10 or amount == int(amount) else f"{amount:.2g} {unit}"


def duration_text(seconds: float) -> str:
    """A duration: 0.42 s, 12 s, 3:25, 1:02:03."""
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Lines:
    """A line at the start, at most one every `every` seconds, and one at the end of each step."""

    def __init__(
        self,
        out: TextIO | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out = out
        self._every = every
        self._clock = clock
        self._label = ""

    def start(self, label: str, total: float | None, unit: str) -> None:
        self._label, self._total, self._unit, self._done = label, total, unit, 0.0
        self._began = self._shown = self._clock()

    def advance(self, amount: float) -> None:
        self._done += amount
        now = self._clock()
        if now - self._shown >= self._every:
            self._shown = now
            self._print(self._status(now - self._began))

    def finish(self, note: str = "") -> None:
        seconds = self._clock() - self._began
        rate = f", {amount_text(self._done / seconds, self._unit)}/s" if self._done and seconds > 0 else ""
        done = f"{amount_text(self._done, self._unit)} in " if self._done else ""
        self._print(f"{self._label}: {done}{duration_text(seconds)}{rate}{'; ' + note if note else ''}")

    def _status(self, seconds: float) -> str:
        rate = self._done / seconds if seconds > 0 else 0.0
        text = f"{self._label}: {amount_text(self._done, self._unit)}"
        if self._total:
            left = (self._total - self._done) / rate if rate else 0.0
            text += f" of {amount_text(self._total, self._unit)}, {duration_text(max(left, 0))} left"
        return f"{text}, {amount_text(rate, self._unit)}/s"

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody listens, or no room: no reason to end the work
            print(text, file=self._out or sys.stderr, flush=True)


class _Amounts(Column):
    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        total = f" of {amount_text(task.total, unit)}" if task.total else ""
        rate = f", {amount_text(task.speed, unit)}/s" if task.speed else ""
        return Text(f"{amount_text(task.completed, unit)}{total}{rate}")


class Terminal:
    """Bars on a terminal, through rich. Use as a context manager, so that the cursor comes back."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            # On a narrow terminal a long note takes more lines; the figures stay whole.
            TextColumn("{task.description}", markup=False, table_column=Cell(overflow="fold")),
            BarColumn(bar_width=24 if console.width >= 100 else 8),
            _Amounts(table_column=Cell(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Cell(no_wrap=True)),
            console=console,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def start(self, label: str, total: float | None, unit: str) -> None:
        self._task = self._bars.add_task(label, total=total, unit=unit)

    def advance(self, amount: float) -> None:
        self._bars.advance(self._task, amount)

    def finish(self, note: str = "") -> None:
        task = next(t for t in self._bars.tasks if t.id == self._task)
        total = task.total if task.total is not None else task.completed
        suffix = f"; {note}" if note else ""
        self._bars.update(
            self._task, completed=total, total=total or 1, description=f"{task.description}{suffix}"
        )


@contextlib.contextmanager
def shown_progress() -> Iterator[Progress]:
    """Bars on a terminal, lines elsewhere; on stderr, as stdout is for results."""
    if sys.stderr is None:
        yield Silent()
    elif sys.stderr.isatty():
        with Terminal(Console(stderr=True)) as bars:
            yield bars
    else:
        yield Lines()
