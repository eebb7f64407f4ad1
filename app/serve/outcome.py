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

from app.errors import InternalError, JobStopped, SeedpodError, UnavailableError
from app.progress import duration_text
from app.serve.record import State

_STATES: Final = {"job_cancelled": State.CANCELLED, "job_timeout": State.TIMED_OUT}
# An absolute path of at least two parts, where neither a URL nor a fraction is: "16/9" and "https://…" stay.
_PATH: Final = re.compile(r"(?<![\w:/.])/(?:[^\s/:;,'\"()\[\]<>]+/)+([^\s/:;,'\"()\[\]<>]*)")


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `nbytes` is the size of the output as JSON."""

    state: State
    output: Mapping[str, Any] | None = None
    error: Mapping[str, str] | None = None
    nbytes: int = 0

    @property
    def code(self) -> str | None:
        """The error's, None where there is none."""
        return None if self.error is None else self.error["code"]


def of_output(output: Mapping[str, Any]) -> Outcome:
    """The outcome of a run that returned.

    Raises:
        TypeError, ValueError: The output cannot be written as JSON in UTF-8: a fault of ours, told at once,
            as a platform would swallow it and wait.
    """
    if not isinstance(output, Mapping):
        raise TypeError(f"the output is {type(output).__name__}, expected a mapping")
    return Outcome(State.COMPLETED, output=output, nbytes=json_bytes(output))


def json_bytes(value: Any) -> int:
    """The size of a value as JSON in UTF-8.

    Raises:
        TypeError, ValueError: It cannot be written so.
    """
    return len(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())


def of_error(error: BaseException, job_id: str) -> Outcome:
    """The outcome of a run that raised."""
    coded = _coded(error, job_id)
    state = _STATES.get(coded.code, State.FAILED) if isinstance(coded, JobStopped) else State.FAILED
    return Outcome(state, error={"code": coded.code, "message": without_paths(coded.message)})


def _coded(error: BaseException, job_id: str) -> SeedpodError:
    if isinstance(error, SeedpodError):
        return error
    # By name, so that a worker that never loaded torch does not load it to fail.
    names = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    if names & {"builtins.MemoryError", "torch.OutOfMemoryError"}:
        return UnavailableError(
            "out_of_memory",
            "The job needs more memory than this worker has; ask for a smaller size, a shorter window or "
            "fewer frames.",
        )
    if "torch.AcceleratorError" in names:  # CUDA's: every later call of the process fails with it
        return UnavailableError(
            "device_failed",
            "The card failed while the job ran, which may be a fault of its own or of ours; the worker's log "
            f"tells more under job {job_id}. Submit the job again: it runs in a new process.",
        )
    return InternalError(
        "internal_error",
        f"The job failed by a fault of ours ({type(error).__name__}); expected a result, or an error with a "
        f"code of its own. The worker's log tells more under job {job_id}: please report it.",
    )


def without_paths(text: str) -> str:
    """`text` with only the last part of each absolute path: "/tmp/j1/in.mp4 is" -> "in.mp4 is"."""
    return _PATH.sub(lambda match: match[1] or "a folder", text)


def cancelled() -> JobStopped:
    """Its caller does not want the job any more."""
    return JobStopped("job_cancelled", "The job was cancelled by its caller.")


def timed_out(seconds: float) -> JobStopped:
    """The job ran longer than it may."""
    return JobStopped(
        "job_timeout",
        f"The job ran longer than {duration_text(seconds)}, the limit of this worker; ask for a smaller or "
        "shorter result, send the video in parts, or raise the limit.",
    )


def stopping() -> JobStopped:
    """The worker stops, and the job was not done within the grace period."""
    return JobStopped(
        "worker_stopping",
        "The worker was told to stop before the job was done; submit it again, and another one takes it.",
    )


def died() -> UnavailableError:
    """The worker before this one was killed while it had the job."""
    return UnavailableError(
        "worker_died",
        "The worker died before the job was done (killed, or out of memory); submit it again under a new "
        "id, smaller if that happens again.",
    )
