"""Who does what when endpoints are slow, silent or gone, and jobs fail. The endpoints are made up."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from app.errors import InputError, SeedpodError, UnavailableError
from examples.serve.distribute.crew import Crew, Patience
from examples.serve.distribute.endpoint import JobFailedError, SilentError

QUICK = Patience(tries=3, job=0.3, endpoint=3.0)


@dataclass
class FakePlace:
    """An endpoint whose jobs take `seconds` and end as `ends` says for their number, else well."""

    name: str
    seconds: float = 0.05
    ends: Callable[[int], Mapping[str, Any]] = lambda number: {"status": "COMPLETED"}
    silent: threading.Event = field(default_factory=threading.Event)
    abandoned: list[str] = field(default_factory=list)
    jobs: dict[str, tuple[float, str]] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    refuses: SeedpodError | None = None

    def run(self, payload: Mapping[str, Any]) -> str:
        self._check()
        if self.refuses is not None:
            raise self.refuses
        job_id = f"{self.name}-{len(self.jobs)}"
        self.jobs[job_id] = time.monotonic() + self.seconds, payload["name"]
        return job_id

    def status(self, job_id: str) -> Mapping[str, Any]:
        self._check()
        end, name = self.jobs[job_id]
        if time.monotonic() < end:
            return {"status": "IN_PROGRESS", "output": {"percent": 50}}
        return {"output": {"name": name}, **self.ends(int(job_id.rpartition("-")[2]))}

    def cancel(self, job_id: str) -> None:
        self.cancelled.append(job_id)

    def answers(self) -> bool:
        if not self.silent.is_set():
            while self.abandoned:
                self.cancel(self.abandoned.pop())
        return not self.silent.is_set()

    def _check(self) -> None:
        if self.silent.is_set():
            raise SilentError(f"{self.name} does not answer")


@dataclass
class FakeTask:
    name: str
    kept: Counter[str]
    frames: int = 10
    spoilt: int = 0

    @contextmanager
    def payload(self) -> Iterator[Mapping[str, Any]]:
        yield {"name": self.name}

    def keep(self, output: Mapping[str, Any]) -> None:
        if self.spoilt:
            self.spoilt -= 1
            raise JobFailedError("the result has 3 frames of 10")
        assert output["name"] == self.name
        self.kept[self.name] += 1


class Run:
    """A crew, its tasks, and what it told."""

    def __init__(
        self, *places: FakePlace, tasks: int = 12, at_once: int = 1, patience: Patience = QUICK
    ) -> None:
        self.kept: Counter[str] = Counter()
        self.tasks = [FakeTask(f"part {i}", self.kept) for i in range(tasks)]
        self.said: list[str] = []
        self.shown: list[tuple[float, int]] = []
        self.crew = Crew(
            [(place, at_once) for place in places],
            lambda done, running: self.shown.append((done, running)),
            self.said.append,
            patience,
        )

    def go(self) -> None:
        try:
            self.crew.run(self.tasks)
        finally:
            assert not [thread for thread in threading.enumerate() if thread.name == "crew"]

    @property
    def each_once(self) -> bool:
        return self.kept == Counter({task.name: 1 for task in self.tasks})


def failed(code: str) -> dict[str, str]:
    return {"status": "FAILED", "error": json.dumps({"code": code, "message": "It went wrong."})}


def test_each_task_is_done_once_by_whoever_is_free() -> None:
    slow, quick = FakePlace("slow", 0.6), FakePlace("quick", 0.1)
    run = Run(slow, quick)
    run.go()
    assert run.each_once
    assert len(quick.jobs) > 2 * len(slow.jobs) > 0
    assert len(slow.jobs) + len(quick.jobs) == 12
    assert run.said == []
    assert max(done for done, _ in run.shown) <= 120
    assert max(running for _, running in run.shown) == 2
    assert any(done % 10 == 5 for done, _ in run.shown)  # what runs counts half


def test_an_endpoint_of_many_workers_gets_many_jobs_at_once() -> None:
    place = FakePlace("many", 0.5)
    run, begun = Run(place, at_once=6), time.monotonic()
    run.go()
    assert run.each_once
    assert time.monotonic() - begun < 6 * 0.5


def test_no_task_is_no_work() -> None:
    run = Run(FakePlace("idle"), tasks=0)
    run.go()
    assert run.shown == []


@pytest.mark.parametrize(
    "end",
    [failed("worker_died"), failed("out_of_memory"), {"status": "FAILED", "error": "worker exited with 137"},
     {"status": "TIMED_OUT"}, {"status": "CANCELLED", "error": None}],
)  # fmt: skip
def test_a_job_that_fails_is_done_again(end: dict[str, Any]) -> None:
    place = FakePlace("place", ends=lambda number: end if number in (1, 2) else {"status": "COMPLETED"})
    run = Run(place)
    run.go()
    assert run.each_once
    assert run.crew.retried == 2
    assert len(run.said) == 2 and all("tried again" in text for text in run.said)


def test_a_result_that_is_not_right_is_made_again() -> None:
    run = Run(FakePlace("place"))
    run.tasks[3].spoilt = 2
    run.go()
    assert run.each_once
    assert "3 frames of 10" in run.said[0]


def test_tries_are_bounded() -> None:
    place = FakePlace("place", ends=lambda number: failed("out_of_memory"))
    run = Run(place, tasks=1)
    with pytest.raises(
        UnavailableError, match=r"part 0 failed 3 times, at last so: It went wrong\. \[out_of_"
    ):
        run.go()
    assert len(place.jobs) == 3


@pytest.mark.parametrize(
    "code", ["request_invalid", "input_damaged", "model_not_served", "part_not_in_source"]
)
def test_what_no_try_would_mend_ends_it_and_cancels_the_rest(code: str) -> None:
    wrong = FakePlace("wrong", ends=lambda number: failed(code))
    other = FakePlace("other", 60)
    with pytest.raises(InputError) as caught:
        Run(wrong, other).go()
    assert caught.value.code == code
    assert len(wrong.jobs) == 1
    assert other.cancelled == ["other-0"]


def test_an_endpoint_that_dies_loses_nothing() -> None:
    """Two of three go on; the job that it had is given to another when patience is over."""
    places = [FakePlace(name, 0.2) for name in "abc"]
    threading.Timer(0.5, places[1].silent.set).start()
    run = Run(*places, tasks=15)
    run.go()
    assert run.each_once
    assert run.crew.retried == 1
    assert any("b does not answer" in text for text in run.said)
    assert places[1].cancelled == []


def test_an_endpoint_that_comes_back_is_used_again_and_its_lost_job_cancelled() -> None:
    gone, other = FakePlace("gone", 0.3), FakePlace("other", 1.0)
    threading.Timer(0.1, gone.silent.set).start()
    threading.Timer(1.2, gone.silent.clear).start()
    run = Run(gone, other, tasks=12)
    run.go()
    assert run.each_once
    assert gone.cancelled == ["gone-0"]
    assert len(gone.jobs) > 3


def test_a_short_silence_costs_nothing() -> None:
    place = FakePlace("place", 0.4)
    threading.Timer(0.2, place.silent.set).start()
    threading.Timer(0.35, place.silent.clear).start()
    run = Run(place, tasks=2)
    run.go()
    assert run.each_once and len(place.jobs) == 2 and run.said == []


def test_when_none_is_heard_jobs_are_not_given_up() -> None:
    """It is our own network: the jobs run on, and none is done twice."""
    places = [FakePlace(name, 1.0) for name in "ab"]
    for place in places:
        threading.Timer(0.3, place.silent.set).start()
        threading.Timer(1.5, place.silent.clear).start()
    run = Run(*places, tasks=4)
    run.go()
    assert run.each_once and run.crew.retried == 0
    assert [len(place.jobs) for place in places] == [2, 2]


def test_progress_of_another_form_does_no_harm() -> None:
    place = FakePlace("place", 0.3)
    place.status = lambda job_id: (  # type: ignore[method-assign]
        {"status": "IN_PROGRESS", "output": "half"}
        if time.monotonic() < place.jobs[job_id][0]
        else {"status": "COMPLETED", "output": {"name": place.jobs[job_id][1]}}
    )
    run = Run(place, tasks=1)
    run.go()
    assert run.each_once


def test_when_every_endpoint_is_gone_it_ends() -> None:
    place = FakePlace("place")
    place.silent.set()
    with pytest.raises(UnavailableError, match="12 of 12 parts are not done") as caught:
        Run(place, patience=Patience(job=0.1, endpoint=1.0)).go()
    assert caught.value.code == "endpoints_gone"


def test_an_endpoint_that_refuses_the_key_is_left_alone() -> None:
    refusing = FakePlace("wrong", refuses=UnavailableError("endpoint_refused", "wrong answers 401."))
    run = Run(refusing, FakePlace("right"))
    run.go()
    assert run.each_once
    assert run.said == ["wrong answers 401."]


def test_an_interrupt_cancels_what_runs() -> None:
    places = [FakePlace("a", 60), FakePlace("b", 60)]
    run = Run(*places)

    def interrupt(done: float, running: int) -> None:
        if running == 2:
            raise KeyboardInterrupt

    run.crew._show = interrupt
    with pytest.raises(KeyboardInterrupt):
        run.go()
    assert [place.cancelled for place in places] == [["a-0"], ["b-0"]]
    assert all(len(place.jobs) == 1 for place in places)
