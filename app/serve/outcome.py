"""What became of a run: the final state, and the error as a caller may see it.

A caller never sees a traceback, a path of the container or a secret; the log does, but for secrets. Knows
errors by their type and code; nothing of queues.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from app.errors import JobStopped, SeedpodError
from app.serve.record import State

OUT_OF_MEMORY: Final = "out_of_memory"
_STATES: Final = {"job_cancelled": State.CANCELLED, "job_timeout": State.TIMED_OUT}
# An absolute path of at least two parts, where no URL or fraction can be: "16/9" and "https://…" stay.
_PATH: Final = re.compile(r"(?<![\w:/.])/(?:[^\s/:;,'\"()\[\]<>]+/)+([^\s/:;,'\"()\[\]<>]*)")


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `nbytes` is the size of the output as JSON."""

    state: State
    output: Mapping[str, Any] | None = None
    error: Mapping[str, str] | None = None
    nbytes: int = 0

    @property
    def out_of_memory(self) -> bool:
        return self.error is not None and self.error["code"] == OUT_OF_MEMORY


def of_output(output: Mapping[str, Any]) -> Outcome:
    """The outcome of a run that returned.

    Raises:
        TypeError, ValueError: The output cannot be written as JSON: a fault of ours, told at once, as a
            platform would swallow it.
    """
    if not isinstance(output, Mapping):
        raise TypeError(f"the output is {type(output).__name__}, expected a mapping")
    return Outcome(State.COMPLETED, output=output, nbytes=len(json.dumps(output, allow_nan=False)))


def of_error(error: BaseException, job_id: str) -> Outcome:
    """The outcome of a run that raised."""
    if isinstance(error, SeedpodError):
        state = _STATES.get(error.code, State.FAILED) if isinstance(error, JobStopped) else State.FAILED
        return Outcome(state, error={"code": error.code, "message": without_paths(error.message)})
    if _is_out_of_memory(error):
        return failed(
            OUT_OF_MEMORY,
            "The job needs more memory than this worker has; ask for a smaller size, a shorter window or "
            "fewer frames.",
        )
    return failed(
        "internal_error",
        f"The job failed by a fault of ours ({type(error).__name__}); expected a result or an error with a "
        f"code of its own. The worker's log tells more under job {job_id}: please report it.",
    )


def failed(code: str, message: str) -> Outcome:
    """A failure with a code and a sentence."""
    return Outcome(State.FAILED, error={"code": code, "message": message})


def without_paths(text: str) -> str:
    """`text` with the last part only of each absolute path: "/tmp/j1/in.mp4 is" -> "in.mp4 is"."""
    return _PATH.sub(lambda match: match[1] or "a folder", text)


def _is_out_of_memory(error: BaseException) -> bool:
    # By name, so that a worker that never loaded torch does not load it to fail.
    names = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    return bool(names & {"builtins.MemoryError", "torch.OutOfMemoryError"})
