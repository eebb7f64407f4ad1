"""Opening files on a volume that others write to: neither a pipe nor a planted link does harm.

It does not know what the files are for.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """The regular file at `path`, or where its link leads, to read.

    Raises:
        OSError: it cannot be opened, or is a folder, pipe, socket or device: a read of those may never
            return.
    """
    return os.fdopen(open_descriptor(path), "rb")


def open_descriptor(path: Path) -> int:
    """`open_regular`, as a descriptor that the caller closes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is a device, pipe or socket, not a file", str(path))


def create_anew(path: Path) -> int:
    """The descriptor of a new, empty file at `path`, to write and read. What has the name already is
    removed, never written through: it may be a link to a file of someone else's.

    Raises:
        OSError: `path` cannot be removed or created.
    """
    path.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def open_to_append(path: Path, buffer: int) -> BinaryIO:
    """The file at `path`, made if need be, to append to, `buffer` bytes at once. A link there is removed,
    as by `create_anew`.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    if path.is_symlink():
        path.unlink()
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is a device, pipe or socket, not a file", str(path))
    return os.fdopen(descriptor, "ab", buffering=buffer)
