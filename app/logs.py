"""The log: human lines on a terminal, JSON lines on RunPod; with the job's id, and never a secret.

It does not know where a secret comes from: known ones are given at `setup`.
"""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, Literal, TextIO
from urllib.parse import quote, quote_plus

from pydantic import SecretStr

MASK: Final = "**********"  # as pydantic shows a SecretStr
SHORTEST: Final = 4  # characters; to mask a shorter word wherever it occurs would garble the log
_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
_job: ContextVar[str | None] = ContextVar("job", default=None)


def setup(
    format: Literal["auto", "human", "json"],
    stream: TextIO,
    *,
    hosted: bool = False,
    secrets: Iterable[SecretStr | str | None] = (),
    level: int = logging.INFO,
) -> None:
    """Send every log record to `stream`, in place of what an earlier call set up.

    `auto` is JSON lines when `hosted` (on RunPod), else human. Values of `secrets` are masked wherever
    they occur, in tracebacks too; `SecretStr` masks itself.
    """
    mask = Mask(secrets)
    as_json = format == "json" or (format == "auto" and hosted)
    handler = logging.StreamHandler(stream)
    handler.set_name(__name__)
    handler.setFormatter(JsonLine(mask) if as_json else HumanLine(mask))
    root = logging.getLogger()
    for other in [each for each in root.handlers if each.get_name() == __name__]:
        root.removeHandler(other)
    root.addHandler(handler)
    root.setLevel(level)


@contextmanager
def of_job(job_id: str) -> Iterator[None]:
    """What is logged inside belongs to the job."""
    token = _job.set(job_id)
    try:
        yield
    finally:
        _job.reset(token)


class Mask:
    """Replaces known secrets, also as they are written in a URL, in JSON or in Python's repr."""

    def __init__(self, secrets: Iterable[SecretStr | str | None]) -> None:
        values = [each.get_secret_value() if isinstance(each, SecretStr) else each for each in secrets]
        forms = set()
        for value in values:
            if value and len(value) >= SHORTEST:
                forms |= {value, quote(value, safe=""), quote_plus(value), json.dumps(value)[1:-1]}
                forms.add(repr(value)[1:-1])
        self._forms = sorted(forms, key=len, reverse=True)  # a secret may be part of another

    def __call__(self, text: str) -> str:
        for form in self._forms:
            text = text.replace(form, MASK)
        return text

    def deep(self, value: Any) -> Any:
        """`value` as JSON can hold it, masked in every string."""
        if isinstance(value, Mapping):
            return {self(str(key)): self.deep(each) for key, each in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.deep(each) for each in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        return self(str(value))


class HumanLine(logging.Formatter):
    """`12:34:56 warning [job] message`, and the traceback below."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self._mask = mask

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()} "
        job = f"[{_job.get()}] " if _job.get() else ""
        trace = _traceback(self, record)
        return self._mask(f"{clock} {level}{job}{_message(record)}" + (f"\n{trace}" if trace else ""))


class JsonLine(logging.Formatter):
    """One JSON object a line: time, level, message, logger; job and traceback where there is one; and
    the record's `extra`."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self._mask = mask

    def format(self, record: logging.LogRecord) -> str:
        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{second}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "message": _message(record),
            "logger": record.name,
        }
        if _job.get():
            line["job"] = _job.get()
        if trace := _traceback(self, record):
            line["traceback"] = trace
        extra = {name: value for name, value in vars(record).items() if name not in _OWN}
        return json.dumps(self._mask.deep({**extra, **line}), ensure_ascii=False)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):  # logging would print the arguments as they are, unmasked
        return f"{record.msg} {record.args}"


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    trace = formatter.formatException(record.exc_info) if record.exc_info else ""
    return trace + (formatter.formatStack(record.stack_info) if record.stack_info else "")


class LogStream(io.StringIO):
    """A text stream each of whose lines is a record of the named logger."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._logger = logging.getLogger(name)

    def write(self, text: str) -> int:
        if text.strip():
            self._logger.info("%s", text.rstrip())
        return len(text)
