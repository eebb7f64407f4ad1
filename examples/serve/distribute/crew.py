"""Many jobs on many workers: each part once, whoever is free takes the next, and what fails is done again.

A job that fails, or an endpoint that falls silent, costs a part one more try somewhere; tries are bounded.
Whatever ends the run cancels what is still under way. Knows nothing of video.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol

from app.errors import SeedpodError, UnavailableError
from examples.serve.distribute.endpoint import FINAL, JobFailedError, SilentError, failure

MISSES: Final = 8  # times in a row that an endpoint may fall silent before it is left alone
SLOWEST_POLL: Final = 2.0  # seconds between two looks at a job; fewer at its beginning
LEAVE: Final = 8.0  # seconds that cancelling may take


class Place(Protocol):
    """An endpoint, see endpoint.py."""

    name: str
    abandoned: list[str]

    def run(self, payload: Mapping[str, Any]) -> str: ...
    def status(self, job_id: str) -> Mapping[str, Any]: ...
    def cancel(self, job_id: str) -> None: ...
    def answers(self) -> bool: ...


class Task(Protocol):
    """A piece of work: `frames` of it. `payload` is a context with its job's input, until the job has ended;
    `keep` takes the job's output, and may raise JobFailedError or UnavailableError for another try."""

    @property
    def name(self) -> str: ...
    @property
    def frames(self) -> int: ...
    def payload(self) -> AbstractContextManager[Mapping[str, Any]]: ...
    def keep(self, output: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Patience:
    """How often a task is tried, and how many seconds an endpoint may be silent: before its job is given to
    another that answers (`job`), and before it is left alone (`endpoint`)."""

    tries: int = 3
    job: float = 30.0
    endpoint: float = 600.0


class _StoppedError(Exception):
    """The run is over."""


class Crew:
    """Threads that each take a task to an endpoint, until all are done. `show` is told frames that are done,
    with those of running jobs, and `say` what a person should know."""

    def __init__(
        self,
        places: Sequence[tuple[Place, int]],
        show: Callable[[float, int], None],
        say: Callable[[str], None],
        patience: Patience | None = None,
    ) -> None:
        """`places`: each endpoint, and how many jobs it gets at once."""
        self._places, self._show, self._say = places, show, say
        self._patience = patience or Patience()
        self.retried = 0
        self._waiting: deque[Task] = deque()
        self._left = 0
        self._tries: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()
        self._shares: dict[str, float] = {}  # frames of running tasks
        self._silent: set[str] = set()  # endpoints that do not answer
        self._done = 0
        self._error: BaseException | None = None
        self._over = threading.Event()
        self._changed = threading.Condition()

    def run(self, tasks: Sequence[Task]) -> None:
        """Do all tasks. Returns when they are done, and raises what makes that impossible; in any case
        nothing runs then that could be cancelled.

        Raises:
            UnavailableError: `part_failed`: a task failed as often as it may. `endpoints_gone`.
            SeedpodError: What no other try would mend.
        """
        self._waiting, self._left = deque(tasks), len(tasks)
        threads = [
            threading.Thread(target=self._work, args=(place,), name="crew", daemon=True)
            for place, at_once in self._places
            for _ in range(min(at_once, len(tasks)))
        ]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.05)  # not a join: an interrupt must come through
                self._tell()
        finally:
            self._over.set()
            with self._changed:
                self._changed.notify_all()
            end = time.monotonic() + LEAVE
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()))
        if self._error is not None:
            raise self._error
        if self._left:
            raise UnavailableError(
                "endpoints_gone",
                f"No endpoint is left that answers, and {self._left} of {len(tasks)} parts are not done; "
                "what is done is kept: run the same command again when the endpoints are back.",
            )

    # ------------------------------------------------------------------ in the threads

    def _work(self, place: Place) -> None:
        try:
            while (task := self._next()) is not None:
                try:
                    self._do(task, place)
                except SilentError as error:
                    self._give_back(task)
                    if not self._waited_for(place, str(error)):
                        return
                except JobFailedError as error:
                    self._try_again(task, str(error))
                except UnavailableError as error:
                    if error.code == "endpoint_refused":
                        self._silent.add(place.name)
                        self._give_back(task)
                        self._say(error.message)
                        return
                    self._try_again(task, error.message)
        except _StoppedError:
            return
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
            self._over.set()
        finally:
            with self._changed:
                self._changed.notify_all()

    def _next(self) -> Task | None:
        """The next task; None when all are done. One that is under way elsewhere may come back."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._left or self._over.is_set())
            if self._over.is_set():
                raise _StoppedError
            return self._waiting.popleft() if self._left else None

    def _do(self, task: Task, place: Place) -> None:
        with task.payload() as payload:
            if self._over.is_set():
                raise _StoppedError
            job_id = place.run(payload)
            with self._changed:
                self._shares[task.name] = 0.0
            output = self._followed(task, place, job_id)
        task.keep(output)
        with self._changed:
            self._misses[place.name] = 0
            self._shares.pop(task.name, None)
            self._done += task.frames
            self._left -= 1
            self._changed.notify_all()

    def _followed(self, task: Task, place: Place, job_id: str) -> Mapping[str, Any]:
        """The output of a job when it has ended."""
        begun = heard = time.monotonic()
        while True:
            now = time.monotonic()
            if self._over.wait(min(SLOWEST_POLL, 0.1 + (now - begun) / 20)):
                place.cancel(job_id)
                raise _StoppedError
            try:
                answer = place.status(job_id)
            except SilentError:
                if time.monotonic() - heard > self._patience_with(place):
                    place.abandoned.append(job_id)
                    raise
                continue
            heard = time.monotonic()
            self._silent.discard(place.name)
            if answer["status"] not in FINAL:
                told = answer.get("output")
                percent = told.get("percent") or 0 if isinstance(told, Mapping) else 0
                with self._changed:
                    self._shares[task.name] = task.frames * float(percent) / 100
            elif answer["status"] == "COMPLETED" and isinstance(answer.get("output"), Mapping):
                output: Mapping[str, Any] = answer["output"]
                return output
            else:
                raise failure(answer)

    def _patience_with(self, place: Place) -> float:
        """Seconds that a silent endpoint may keep its job: while no other answers, more likely it is us that
        cannot hear, and the jobs go on."""
        self._silent.add(place.name)
        others = any(other.name not in self._silent for other, _ in self._places)
        return self._patience.job if others else self._patience.endpoint

    def _give_back(self, task: Task) -> None:
        with self._changed:
            self.retried += 1
            self._shares.pop(task.name, None)
            self._waiting.appendleft(task)
            self._changed.notify_all()

    def _try_again(self, task: Task, why: str) -> None:
        self._tries[task.name] += 1
        tries = self._tries[task.name]
        if tries >= self._patience.tries:
            raise UnavailableError(
                "part_failed", f"{task.name} failed {tries} times, at last so: {why} What is done is kept."
            )
        self._say(f"{task.name} failed and is tried again: {why}")
        self._give_back(task)

    def _waited_for(self, place: Place, why: str) -> bool:
        """Wait until an endpoint answers again; False if it should be left alone."""
        self._silent.add(place.name)
        with self._changed:
            self._misses[place.name] += 1
            misses = self._misses[place.name]
        self._say(f"{why}; its part goes to the next that is free")
        end = time.monotonic() + self._patience.endpoint
        pause = 0.5
        while misses <= MISSES and time.monotonic() < end:
            if self._over.wait(pause):
                raise _StoppedError
            if not self._left:
                return False
            try:
                if place.answers():
                    self._silent.discard(place.name)
                    return True
            except SeedpodError as error:
                self._say(error.message)
                return False
            pause = min(2 * pause, 15.0)
        self._say(f"{place.name} is left alone")
        return False

    def _tell(self) -> None:
        with self._changed:
            self._show(self._done + sum(self._shares.values()), len(self._shares))
