"""A card's process whose jobs only count: `python -m tests.serve.card_process DESCRIPTOR`. No torch.

A payload may be {"steps", "seconds" of each, "stream", "die": in which step, "once": a file that says it has
died, "deaf": whether it never asks if it should stop, "fail": a code}. While it boots it dies as often as the
file "deaths" of the scratch folder has lines, and takes one of them away each time.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from app.errors import UnavailableError
from app.serve.card import Do, Teller, work
from app.settings import Settings


def boot(pipe: Connection, settings: Settings, scratch: Path) -> Do:
    deaths = scratch / "deaths"
    if deaths.exists() and (left := deaths.read_text().splitlines()):
        deaths.write_text("\n".join(left[1:]))
        os.kill(os.getpid(), signal.SIGKILL)
    if "broken" in (settings.models or ()) and os.environ.get("CUDA_VISIBLE_DEVICES") == "0":
        pipe.send(("failed", "this card is broken", "stage_hash_mismatch"))
    elif "rank" in (settings.models or ()) and not _done({"once": scratch / "rank"}):
        pipe.send(("failed", "a rank was killed", "rank_failed"))
    else:
        pipe.send(("ready", None, None))
    return do


def do(job_id: str, payload: Mapping[str, Any], teller: Teller) -> Mapping[str, Any]:
    steps = payload.get("steps", 1)
    teller.start("restore", steps, "frames")
    for step in range(steps):
        if not payload.get("deaf"):
            teller.check()
        time.sleep(payload.get("seconds", 0.0))
        teller.advance(1)
        if payload.get("stream"):
            teller.emit({"step": step})
        if payload.get("die") == step and not _done(payload):
            os.kill(os.getpid(), signal.SIGKILL)
    teller.finish()
    if (code := payload.get("fail")) and not _done(payload):
        raise UnavailableError(code, "it was asked to fail")
    if payload.get("bug"):
        raise RuntimeError("/srv/secret/place broke")
    return {"card": os.environ.get("CUDA_VISIBLE_DEVICES"), "process": os.getpid(), "id": job_id}


def _done(payload: Mapping[str, Any]) -> bool:
    if "once" not in payload:
        return False
    mark = Path(payload["once"])
    there = mark.exists()
    mark.touch()
    return there


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    work(Connection(int(sys.argv[1])), boot)
