"""Files that appear under their name only when they are whole.

A file is written as `.<name>.part` in the same folder and renamed, by one process at a time. What a
killed process left behind is nobody's, and the next one writes over it. This module does not know
what is in the files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.boot.lock import try_lock, unlock
from app.boot.regular import create_anew
from app.errors import FileError, UnavailableError


def part_of(target: Path) -> Path:
    """The temporary file of `target`."""
    return target.with_name(f".{target.name}.part")


@contextmanager
def locked_part(target: Path) -> Iterator[int]:
    """The temporary file of `target`, empty, and no other process's until the end. It is gone then,
    unless it was moved into place.

    Raises:
        UnavailableError: `convert_running` if another process has it.
        FileError: `folder_not_writable`, or `write_failed` for an OSError inside.
    """
    lock = target.with_name(f".{target.name}.lock")
    try:
        held = try_lock(lock)
    except OSError as error:
        raise FileError(
            "folder_not_writable",
            f"{target.parent} cannot be written to: {error.strerror}; expected room for {target.name} there. "
            "Mount the volume writable, or name another root that holds the same folders.",
        ) from error
    if held is None:
        raise UnavailableError(
            "convert_running",
            f"{target} is being written by another process, which holds {lock}: wait until it is done.",
        )
    try:
        part = create_anew(part_of(target))
        try:
            yield part
        finally:
            os.close(part)
    except OSError as error:
        raise FileError(
            "write_failed",
            f"{target} was not written: {error.strerror or error}; check its volume and repeat.",
        ) from error
    finally:
        part_of(target).unlink(missing_ok=True)
        unlock(lock, held)


def move_into_place(target: Path) -> None:
    """Give the temporary file of `target`, complete and synchronised, its name; lasting at once."""
    part_of(target).replace(target)
    folder = os.open(target.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_at_once(target: Path, text: str) -> None:
    """Write a small text file, replacing what is there.

    Raises:
        FileError: `write_failed`.
    """
    try:
        with os.fdopen(create_anew(part_of(target)), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        move_into_place(target)
    except OSError as error:
        raise FileError(
            "write_failed", f"{target} was not written: {error.strerror}; check its volume and repeat."
        ) from error
