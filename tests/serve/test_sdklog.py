"""What the SDK prints is in our log: its job, its level, no secret."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest

from app import logs
from app.serve.sdklog import SdkLines


@pytest.fixture
def printed() -> Iterator[io.StringIO]:
    out = io.StringIO()
    logs.setup("json", out, secrets=["rpa_secret"])
    yield out
    logs.setup("human", io.StringIO())


def line(**told: object) -> str:
    return json.dumps({"requestId": None, "message": "m", "level": "INFO", **told})


def test_its_lines_become_ours(printed: io.StringIO) -> None:
    out = SdkLines()
    print("--- Starting Serverless Worker |  Version 1.12.0 ---", file=out)
    print(line(message="Started.", requestId="job-1"), file=out, flush=True)
    print(line(message="cannot reach https://h/?key=rpa_secret", level="ERROR"), file=out)
    print(line(level="WARN", message=["no", "text"]), "\n\n", file=out)
    print('{"not": "ours"}', file=out)
    print("[1, 2]", file=out, end="")
    assert "[1, 2]" not in printed.getvalue(), "the line is not over"
    print(file=out)
    told = [json.loads(each) for each in printed.getvalue().splitlines()]
    assert [(each["level"], each["message"], each.get("job")) for each in told] == [
        ("info", "--- Starting Serverless Worker |  Version 1.12.0 ---", None),
        ("info", "Started.", "job-1"),
        ("error", "cannot reach https://h/?key=**********", None),
        ("warning", "['no', 'text']", None),
        ("info", '{"not": "ours"}', None),
        ("info", "[1, 2]", None),
    ]
    assert {each["logger"] for each in told} == {"runpod"}
