"""What a job's end looks like to its caller: a code and a sentence, and never more."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest

from app.errors import InputError, JobStopped, SeedpodError, UnavailableError
from app.serve.outcome import of_error, without_paths
from app.serve.record import State
from app.serve.reporter import Reporter
from tests.serve.jobs import Payload, finished, made

SECRET_PATH = "/var/lib/seedpod/job-7/in.mp4"


class OutOfMemoryError(RuntimeError):
    """Stands in for torch's, without loading torch."""

    __module__ = "torch"


class AcceleratorError(RuntimeError):
    """As above."""

    __module__ = "torch"


@pytest.mark.parametrize(
    ("error", "code", "refresh"),
    [
        (InputError("input_damaged", "The video is damaged at frame 3."), "input_damaged", False),
        (UnavailableError("out_of_memory", "The result does not fit."), "out_of_memory", True),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory", True),
        (MemoryError(), "out_of_memory", True),
        (AcceleratorError("CUDA error: an illegal memory access was encountered"), "device_failed", True),
        (RuntimeError(f"no such file: {SECRET_PATH}"), "internal_error", False),
        (KeyError("hf_token"), "internal_error", False),
        (SystemExit(3), "internal_error", False),
        (KeyboardInterrupt(), "internal_error", False),
    ],
)
def test_what_a_job_raises(
    error: BaseException, code: str, refresh: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def run(job_id: str, payload: Payload, reporter: Reporter) -> Payload:
        if payload.get("good"):
            return {}
        raise error

    jobs = made(run)
    with caplog.at_level(logging.INFO):
        jobs.submit({}, "bad-7")
        jobs.submit({"good": True}, "next")
        record = finished(jobs, "bad-7")
        assert finished(jobs, "next").state is State.COMPLETED
    assert record.state is State.FAILED
    assert record.error is not None and set(record.error) == {"code", "message"}
    assert record.error["code"] == code
    for word in ("Traceback", "/var", "in.mp4", "hf_token", ".py"):
        assert word not in record.error["message"]
    assert jobs.refresh_wanted == refresh
    assert jobs.dead == (code == "device_failed")
    traced = [entry for entry in caplog.records if entry.exc_info]
    assert bool(traced) == (not isinstance(error, InputError))


@pytest.mark.parametrize("output", [{"frame": b"bytes"}, {"nan": float("nan")}, None, {"path": os}])
def test_an_output_that_is_not_json_fails_at_once(output: Any) -> None:
    jobs = made(lambda job_id, payload, reporter: output)
    jobs.submit({}, "odd")
    record = finished(jobs, "odd")
    assert record.state is State.FAILED
    assert record.error and record.error["code"] == "internal_error"
    assert record.output is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{SECRET_PATH} is not a video.", "in.mp4 is not a video."),
        (f"'{SECRET_PATH}': no", "'in.mp4': no"),
        (
            "See https://host/a/b.mp4 (16/9, 24/1001 frames).",
            "See https://host/a/b.mp4 (16/9, 24/1001 frames).",
        ),
        ("in /dev/shm/ there is no room", "in a folder there is no room"),
    ],
)
def test_a_caller_sees_no_path_of_the_container(text: str, expected: str) -> None:
    assert without_paths(text) == expected
    outcome = of_error(SeedpodError("any", text), "j")
    assert outcome.error == {"code": "any", "message": expected}


def test_only_what_the_lifecycle_stops_is_cancelled_or_timed_out() -> None:
    assert of_error(JobStopped("job_timeout", "Over."), "j").state is State.TIMED_OUT
    assert of_error(SeedpodError("job_timeout", "A stray code."), "j").state is State.FAILED
