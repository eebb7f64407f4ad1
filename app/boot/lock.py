"""A lock file that one process (or thread) at a time holds, and that a dead one cannot keep.

It knows nothing of what the lock guards.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def only_one(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock at `path`; `wait` is called between the tries, and may raise to give up.

    The kernel drops the lock of a process that dies, so whoever gets it may clear up what was left.

    Raises:
        OSError: if the file cannot be created.
    """
    while (descriptor := try_lock(path)) is None:
        wait()
    try:
        yield
    finally:
        unlock(path, descriptor)


def try_lock(path: Path) -> int | None:
    """The descriptor that holds the lock, or None if somebody else has it.

    On a file system without locks (some network volumes) everybody gets it: what is made there has to
    be checked by its hash anyway.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder before us removes its file as it lets go: a lock on a removed file guards nothing.
        held = path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino
    except OSError as error:
        held = error.errno in _NO_LOCKS
    if held:
        return descriptor
    os.close(descriptor)
    return None


def unlock(path: Path, descriptor: int) -> None:
    """Let go of a lock got from `try_lock`, and remove its file."""
    path.unlink(missing_ok=True)
    os.close(descriptor)
