#!/usr/bin/env python3
"""The container's health check: asks /ping, and waits as long as the boot takes.

Exit status 0: ready, or a command that serves nothing (a single run, RunPod's own queue). 1: the boot failed,
the worker is stopping, or nobody answers. While the worker boots this waits, so that a container whose
checkpoints take minutes is neither healthy nor unhealthy before it is known which.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from app.errors import SeedpodError
from app.settings import Settings, load_settings

ANSWER = 5.0  # seconds that one answer may take
LISTEN = 30.0  # seconds after which somebody must listen
PAUSE = 0.5


def main() -> int:
    """Ask until there is an answer that says ready or failed."""
    try:
        settings = load_settings()
    except SeedpodError as error:
        print(error.message)
        return 1
    if settings.runpod_jobs is not None or not serves(Path("/proc/1/cmdline").read_bytes()):
        print("nothing is served here")
        return 0
    began = time.monotonic()
    while True:
        try:
            status, reason = ping(settings)
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() - began > LISTEN:
                print(f"port {settings.port}: {error}")
                return 1
        else:
            if status != 204:
                print(reason)
                return 0 if status == 200 else 1
        time.sleep(PAUSE)


def serves(command_line: bytes) -> bool:
    """Whether process 1 is the server, by its command line."""
    words = command_line.rstrip(b"\0").split(b"\0")
    entry = next((place for place, word in enumerate(words) if word.endswith(b"/entrypoint.py")), None)
    return entry is not None and words[entry + 1 :] in ([], [b"serve"])


def ping(settings: Settings) -> tuple[int, str]:
    """The status of one ping, and the reason it gives."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    connection = http.client.HTTPConnection(host, settings.port, timeout=ANSWER)
    try:
        connection.request("GET", "/ping")
        answer = connection.getresponse()
        body = answer.read(10_000).decode(errors="replace")
    finally:
        connection.close()
    if answer.status in (200, 204):
        return answer.status, "ready"
    try:
        return answer.status, str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.status, f"HTTP status {answer.status}"


if __name__ == "__main__":
    sys.exit(main())
