"""What is known of a job: its state, and what a caller may see. It does not know how a job runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Self


class State(StrEnum):
    """The states of a job, in RunPod's words."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"

    @property
    def final(self) -> bool:
        """Whether a job stays in this state."""
        return self not in (State.IN_QUEUE, State.IN_PROGRESS)


@dataclass(frozen=True)
class Record:
    """A job at one moment. Times are unix seconds.

    `error` is {"code", "message"}; `progress` is {"step", "percent", "eta_seconds"}: percent of the whole
    job, 0 to 100, that never goes back, and the estimate or None. Each piece of `stream` holds its
    `number`, from 0; old pieces are dropped beyond a bound, so a gap in the numbers is a loss, and so are
    those that were taken. `reported` is set once the platform was told of the end.
    """

    id: str
    state: State
    created: float
    started: float | None = None
    finished: float | None = None
    output: Mapping[str, Any] | None = None
    error: Mapping[str, str] | None = None
    progress: Mapping[str, Any] | None = None
    reported: bool | None = None
    stream: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)

    @property
    def delay_ms(self) -> int | None:
        """How long the job waited; None while it waits."""
        begin = self.started or self.finished
        return None if begin is None else max(0, round(1000 * (begin - self.created)))

    @property
    def execution_ms(self) -> int | None:
        """How long the job ran; None until it ended, or when it never ran."""
        if self.started is None or self.finished is None:
            return None
        return max(0, round(1000 * (self.finished - self.started)))

    def to_dict(self) -> dict[str, Any]:
        """What a journal keeps of it: all but the stream and what is None."""
        kept = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "stream"}
        return {name: value for name, value in kept.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The record that `to_dict` gave.

        Raises:
            TypeError, ValueError, KeyError: `values` are not of a record.
        """
        state = State(values["state"])
        times = [values["created"], values["finished"] if state.final else 0.0]
        if not isinstance(values["id"], str) or not all(isinstance(each, int | float) for each in times):
            raise TypeError("not a record")
        return cls(**{**values, "state": state})


@dataclass(frozen=True)
class Update:
    """News of a job: exactly one of a new progress, a piece of its stream, or its final record."""

    progress: Mapping[str, Any] | None = None
    piece: Mapping[str, Any] | None = None
    final: Record | None = None
