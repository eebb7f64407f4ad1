"""The folder of staged copies: ours alone, and nothing in it is taken for whole that is not.

In `seedpod-<uid>`, where nobody else can write:
    <identity>-<name>             a finished copy; its name says what it is a copy of
    .<identity>-<name>.json       its size, time, hash and boot, written just before the rename
    .<identity>-<name>.partial    a copy being made, by whoever holds the lock
    .<identity>-<name>.lock       held while a copy is made; the kernel frees it when its holder dies

It knows names, records and locks; it copies nothing and does not choose the place.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.boot.lock import only_one, try_lock, unlock


class UnsafeFolderError(Exception):
    """Others own the folder or may write to it: a file in it cannot be trusted."""


@dataclass(frozen=True)
class Copy:
    """A copy, finished or not, at `path`. `boot_id` names the time since the machine started."""

    path: Path
    boot_id: str

    @property
    def partial(self) -> Path:
        """Where the copy is made."""
        return self._beside("partial")

    @property
    def record(self) -> Path:
        """What a finished copy was when it was finished."""
        return self._beside("json")

    def finished(self, size: int) -> str | None:
        """The SHA-256 of the copy if it is whole, `size` bytes long and as it was made; else None."""
        try:
            record = json.loads(self.record.read_bytes())
            facts = self.path.lstat()
        except (OSError, ValueError):
            return None
        if not isinstance(record, dict) or not stat.S_ISREG(facts.st_mode) or facts.st_size != size:
            return None
        sha256 = str(record.get("sha256"))
        return sha256 if record == self._record(facts, sha256) else None

    def finish(self, sha256: str) -> None:
        """Turn the partial copy, whole and right, into the finished one. The rename is the last step."""
        self.record.write_text(json.dumps(self._record(self.partial.stat(), sha256)))
        self.partial.rename(self.path)

    def remove(self) -> None:
        """Remove the copy, finished or not."""
        for path in (self.path, self.partial, self.record):
            path.unlink(missing_ok=True)

    @contextmanager
    def locked(self, wait: Callable[[], None]) -> Iterator[None]:
        """Be the only one to make this copy; `wait` is called between the tries."""
        with only_one(self._beside("lock"), wait):
            yield

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{suffix}")

    def _record(self, facts: os.stat_result, sha256: str) -> dict[str, str | int]:
        # After a power cut a file on a disk may have its name and size but not its bytes. Instead of
        # waiting for the disk at each staging, a copy counts only until the machine restarts.
        return {"size": facts.st_size, "mtime_ns": facts.st_mtime_ns, "sha256": sha256, "boot": self.boot_id}


def folder_in(place: Path) -> Path:
    """The folder of our copies in `place`, whether it exists or not."""
    return place / f"seedpod-{os.geteuid()}"


def is_private(folder: Path) -> bool:
    """Whether it is a real folder of ours that nobody else can put files in."""
    try:
        facts = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o022


def open_folder(place: Path) -> Path:
    """The folder of our copies in `place`, made if need be, and rid of what dead processes left.

    Raises:
        UnsafeFolderError: it is a link or a file, or others own it or may write to it.
        OSError: it cannot be made or written to.
    """
    folder = folder_in(place)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if not is_private(folder):
            raise UnsafeFolderError(
                f"{folder} is no folder, or others own it or may write to it, so what it holds cannot be "
                "trusted; it has to be removed first"
            ) from None
    for partial in folder.glob(".*.partial"):
        lock = partial.with_suffix(".lock")
        if (descriptor := try_lock(lock)) is not None:
            partial.unlink(missing_ok=True)
            unlock(lock, descriptor)
    return folder
