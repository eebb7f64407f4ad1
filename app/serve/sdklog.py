"""What the SDK prints, as records of our log: in its form, with its job's id, and masked as all others.

The SDK prints JSON lines of a form of its own, and one line that is none. It does not know who reads it.
"""

from __future__ import annotations

import io
import json
import logging
from contextlib import nullcontext
from typing import Final

from app import logs

LEVELS: Final = {
    "TRACE": logging.DEBUG,
    "DEBUG": logging.DEBUG,
    "WARN": logging.WARNING,
    "ERROR": logging.ERROR,
}
_log = logging.getLogger("runpod")


class SdkLines(io.TextIOBase):
    """In place of `sys.stdout`: each line that is written is logged."""

    def __init__(self) -> None:
        super().__init__()
        self._begun = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip():
                _tell(line)
        return len(text)


def _tell(line: str) -> None:
    """Log a line: what the SDK's JSON says, or the line as it is."""
    try:
        told = json.loads(line)
        level, message, job = LEVELS.get(told["level"], logging.INFO), told["message"], told["requestId"]
    except (ValueError, TypeError, KeyError):
        level, message, job = logging.INFO, line, None
    with logs.of_job(job) if isinstance(job, str) else nullcontext():
        _log.log(level, "%s", message)
