"""The journal: which jobs a worker took and how they ended, kept in a file for the next worker here.

JSON lines, each the record of a job; the last of a job counts. A line is in the kernel's hands once it is
appended, so it outlives a killed process (not a machine that loses power). It does not know what runs.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Self

from app.boot.lock import try_lock, unlock
from app.errors import ConfigError
from app.serve.record import Record

SLACK: Final = 8 << 20  # bytes of outdated lines before the file is written anew
_log = logging.getLogger(__name__)


class Journal:
    """An open journal, held by one process. A journal that cannot be written costs a warning, no job."""

    def __init__(self, path: Path, lock: int) -> None:
        self._path, self._lock = path, lock
        self._file: int | None = _open(path)
        self._whole = self._size = path.stat().st_size

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open or create the journal at `path`.

        Raises:
            ConfigError: `journal_in_use` if another process holds it, `journal_unusable` if it cannot be
                written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = try_lock(_lock_path(path))
            if lock is not None:
                return cls(path, lock)
        except OSError as error:
            raise ConfigError(
                "journal_unusable",
                f"The journal {path} cannot be written: {error.strerror or error}; expected a file in a "
                "writable folder.",
            ) from None
        raise ConfigError(
            "journal_in_use",
            f"The journal {path} is held by another worker; expected one worker for each. Stop the other, or "
            "give each a folder of its own in SEEDPOD_SCRATCH, also where they share a volume.",
        )

    def read(self) -> list[Record]:
        """The last record of each job, oldest first. Lines that are torn or not ours are left out."""
        records: dict[str, Record] = {}
        torn = 0
        with self._path.open("rb") as file:
            for line in filter(bytes.strip, file):
                try:
                    record = _understood(json.loads(line), records)
                except (ValueError, TypeError, KeyError):
                    torn += 1
                else:
                    records.pop(record.id, None)
                    records[record.id] = record
        if torn:
            _log.warning("%d of the journal's lines cannot be read (a write was cut off): left out", torn)
        return list(records.values())

    def append(self, record: Record) -> None:
        """Write down where a job stands."""
        self._append(record.to_dict())

    def append_reported(self, job_id: str) -> None:
        """Write down that the platform was told of a job's end; its result is not written again."""
        self._append({"id": job_id, "reported": True})

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._size += _write(self._file, [line])
        except OSError as error:
            _log.warning("the journal cannot be written: %s", error.strerror or error)

    @property
    def bloated(self) -> bool:
        """Whether most of the file is outdated."""
        return self._size > 2 * self._whole + SLACK

    def rewrite(self, records: Iterable[Record]) -> None:
        """Let the file hold these records only; at once or not at all."""
        if self._file is None:
            return
        part = self._path.with_name(f".{self._path.name}.part")
        try:
            part.unlink(missing_ok=True)
            new = _open(part)
            try:
                size = _write(new, (record.to_dict() for record in records))
                part.replace(self._path)
            except OSError:
                os.close(new)
                raise
        except OSError as error:
            _log.warning("the journal cannot be written anew: %s", error.strerror or error)
            return
        os.close(self._file)
        self._file, self._whole, self._size = new, size, size

    def close(self) -> None:
        """Let the next worker have it. Closing twice does nothing more."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            unlock(_lock_path(self._path), self._lock)


def _open(path: Path) -> int:
    # For its owner only: results may hold presigned links.
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _understood(line: Mapping[str, Any], before: Mapping[str, Record]) -> Record:
    """The record that a line stands for, after those `before` it.

    Raises:
        TypeError, ValueError, KeyError: It is no line of ours.
    """
    if set(line) == {"id", "reported"}:
        return replace(before[line["id"]], reported=True)
    return Record.from_dict(line)


def _write(descriptor: int, lines: Iterable[Mapping[str, Any]]) -> int:
    """Append the lines; returns the bytes. They begin with the line feed: one that was cut off then spoils
    only itself."""
    size = 0
    for each in lines:
        line = b"\n" + json.dumps(each).encode()
        size += len(line)
        while line:
            line = line[os.write(descriptor, line) :]
    return size


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")
