"""Every error a person or a caller may meet.

An error carries a stable `code` (lower_snake_case, safe to match on), a sentence for a person, and
the exit status of the process it ends. The sentence names the thing, its value, what was expected
and what to do. It never holds a secret. Nothing else leaves the program as an exception: whatever is
not a `SeedpodError` is a bug, and is reported as `InternalError`.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class SeedpodError(Exception):
    """Base of all errors; `exit_status` follows sysexits.h."""

    exit_status: ClassVar[int] = 70

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def to_dict(self) -> dict[str, str]:
        """The error as a caller of the API sees it."""
        return {"code": self.code, "message": self.message}


class UsageError(SeedpodError):
    """The command line or a parameter is wrong (64)."""

    exit_status = 64


class InputError(SeedpodError):
    """The video, image or other data given to a job is bad (65)."""

    exit_status = 65


class UnavailableError(SeedpodError):
    """A device, the network, a hub or a bucket cannot be used now (69)."""

    exit_status = 69


class JobStopped(SeedpodError):  # noqa: N818 - a caller's wish, no error of anybody's
    """A job was told to stop before it was done (69): `job_cancelled`, `job_timeout`, `worker_stopping`."""

    exit_status = 69


class InternalError(SeedpodError):
    """Our own fault (70)."""

    exit_status = 70


class FileError(SeedpodError):
    """Reading or writing failed: no room, no permission, a broken disk (74)."""

    exit_status = 74


class ConfigError(SeedpodError):
    """Settings, manifest or checkpoints are wrong (78)."""

    exit_status = 78


def is_full(error: OSError) -> bool:
    """Whether a disk, or this user's share of it, has no room left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
