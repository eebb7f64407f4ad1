"""The example that takes a video while it is made: with the official client, against the local server."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from app.job.payload import PAYLOADS, validate
from app.serve.reporter import Reporter
from tests.serve.local_server import Served, lifecycle, serving

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "serve" / "stream.py"
KEY = "a key"
PIECES = [bytes([number]) * 1000 for number in range(5)]


def generated(job_id: str, payload: Mapping[str, Any], reporter: Reporter) -> Mapping[str, Any]:
    """A job with the form of a real one: its pieces come one by one."""
    assert payload["stream"] and payload["seconds"] == 2 and payload["model"] == "nano-wan"
    for number, piece in enumerate(PIECES):
        if payload["prompt"] == "fail" and number == 2:
            raise RuntimeError("broken")
        reporter.check()
        reporter.emit({"frames": 9 + 12 * number, "base64": base64.b64encode(piece).decode()})
        time.sleep(0.4)
    return {"result": {"kind": "inline", "base64": ""}}


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(lifecycle(generated), api_key=KEY, validate=validate, payloads=PAYLOADS) as server:
        yield server


def start(served: Served, prompt: str, output: str) -> subprocess.Popen[bytes]:
    environment = {
        "PATH": os.environ["PATH"],
        "RUNPOD_ENDPOINT_BASE_URL": f"{served.url}/v2",
        "RUNPOD_API_KEY": KEY,
    }
    command = [sys.executable, str(EXAMPLE), prompt, output, "--seconds", "2", "--model", "nano-wan"]
    # Without a buffer of ours: `communicate` would leave out what that has read ahead.
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )


def test_the_pieces_are_written_in_order_while_the_job_runs(served: Served) -> None:
    with start(served, "a fox", "-") as example:
        assert example.stdout is not None
        first = example.stdout.read(len(PIECES[0]))
        assert first == PIECES[0] and example.poll() is None  # it came before the job was done
        rest, told = example.communicate(timeout=60)
    assert first + rest == b"".join(PIECES) and example.returncode == 0, told
    assert b"57 frames" in told


def test_a_job_that_fails_tells_why(served: Served, tmp_path: Path) -> None:
    output = tmp_path / "fox.mp4"
    with start(served, "fail", str(output)) as example:
        told = example.communicate(timeout=60)[1]
    assert example.returncode == 1 and b"[internal_error]" in told
    assert output.read_bytes() == b"".join(PIECES[:2])
