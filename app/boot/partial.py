"""Files that appear under their name only when they are whole.

A file is written as `.<name>.part` in the same folder and renamed. It is locked while it is written;
the lock ends with its process, so what a killed one left behind is known to be nobody's and is written
over. This module does not know what is in the files.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from app.errors import FileError, UnavailableError


def part_of(target: Path) -> Path:
    """The temporary file of `target`."""
    return target.with_name(f".{target.name}.part")


@contextmanager
def locked_part(target: Path) -> Iterator[int]:
    """The temporary file of `target`, empty and locked; gone at the end unless it was renamed.

    The lock lasts as long as its process: a file that one left behind is free to be taken over.
    """
    part = part_of(target)
    try:
        descriptor = _open_locked(part)
    except BlockingIOError:
        raise UnavailableError(
            "convert_running",
            f"{target} is being written by another process, which holds {part}: wait until it is done.",
        ) from None
    except OSError as error:
        raise FileError(
            "folder_not_writable",
            f"{part} cannot be created and locked: {error.strerror}; expected a folder to write to. "
            "Mount the volume writable, or name another root that holds the same folders.",
        ) from error
    try:
        os.ftruncate(descriptor, 0)
        yield descriptor
    except OSError as error:
        raise FileError(
            "write_failed",
            f"{target} was not written: {error.strerror or error}; check its volume and repeat.",
        ) from error
    finally:
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), part.stat()):
                part.unlink()
        os.close(descriptor)


def _open_locked(part: Path) -> int:
    """A descriptor of the file that is at `part` once the lock is held: its last holder may just have
    renamed or removed the one that was opened."""
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), part.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


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
        with part_of(target).open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        move_into_place(target)
    except OSError as error:
        raise FileError(
            "write_failed", f"{target} was not written: {error.strerror}; check its volume and repeat."
        ) from error
