"""The place of an output: whether it can be written, its hidden temporary name, and what the system refuses.

Knows nothing of what is written.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.errors import FileError, UsageError, is_full


def check_suffix(path: Path, suffixes: tuple[str, ...], what: str) -> None:
    if path.suffix.lower() not in suffixes:
        raise UsageError(
            "output_suffix",
            f"{path.name} {f'ends in {path.suffix!r}' if path.suffix else 'has no suffix'}; {what} is "
            f"written as one of {', '.join(suffixes)}: change the name or the codec.",
        )


def check_place(path: Path, *, folder: bool = False) -> None:
    """Whether `path` can be written, before any work is done."""
    parent = path.parent
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null
        raise FileError(
            "output_unwritable",
            f"{path.name[:80]!r} cannot be written: {getattr(error, 'strerror', None) or error}; choose "
            "another name.",
        ) from None
    if not parent.is_dir():
        raise FileError(
            "output_folder_missing",
            f"The folder {parent.name!r} for {path.name} does not exist: make it, or choose another.",
        )
    if folder and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileError(
            "output_exists", f"{path.name} exists and is not an empty folder: remove it, or choose another."
        )
    if not folder and path.is_dir():
        raise FileError("output_is_folder", f"{path.name} is a folder; expected a file's name: add one.")
    where = path if folder and path.is_dir() else parent
    if not os.access(where, os.W_OK | os.X_OK):
        raise FileError(
            "output_unwritable",
            f"The folder {where.name!r} for {path.name} may not be written by this user: choose another.",
        )


@contextmanager
def failures_of(path: Path) -> Iterator[None]:
    """What the system refuses, in our words."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise no_space(path) from error
        raise FileError(
            "output_failed", f"{path.name} could not be written: {error.strerror or error}."
        ) from error


def temporary(path: Path) -> Path:
    return path.with_name(f".{secrets.token_hex(6)}.partial")


def no_space(path: Path) -> FileError:
    free = shutil.disk_usage(path.parent).free
    return FileError(
        "output_no_space",
        f"No room is left for {path.name} ({free / 1e6:.0f} MB free): make room and run again.",
    )
