"""The local server as a process of its own, with jobs that only count: `python -m tests.serve.desk_process`.

Beside `Count`, a payload may be `{"note": "no threads"}`: then no thread can be started any more.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import Any

from app import logs
from app.serve.desk import serve_on_desk
from app.serve.local import create_app
from app.serve.reporter import Reporter
from app.serve.stop import Stop
from tests.serve.local_server import Count, FakeBoot, count, lifecycle, validate


class Boot(FakeBoot):
    cancel = threading.Event()


def run(job_id: str, payload: Mapping[str, Any], reporter: Reporter) -> Mapping[str, Any]:
    if payload.get("note") == "no threads":
        threading.Timer = _no_thread  # type: ignore[misc, assignment]
    return count(job_id, payload, reporter)


def _no_thread(*_: object) -> None:
    raise RuntimeError("can't start new thread")


if __name__ == "__main__":
    stop = Stop()
    stop.install()
    logs.setup("human", sys.stderr)
    jobs = lifecycle(run)
    app = create_app(jobs, Boot(), validate=validate, payloads={"count": Count})
    serve_on_desk(app, jobs, Boot(), stop, host="127.0.0.1", port=0, grace=5)
