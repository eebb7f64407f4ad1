"""Staging: a checkpoint copied to fast local storage, hashed in the same pass, whole or not there.

`stage` decides first (is the source local already, has somebody staged it, is there room), then copies
under a hidden name, and renames when the copy is whole and right. It knows nothing of models, of the
manifest, or of what is inside a file.
"""

from __future__ import annotations

import hashlib
import os
import stat as modes
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Final, Literal

from rich.filesize import decimal

from app.boot.copies import Copy, UnsafeFolderError, folder_in, is_private, open_folder
from app.boot.copy import SourceError, check_cancel, copy_and_hash
from app.boot.places import Place, Places, default_places
from app.errors import ConfigError, FileError, SeedpodError, is_full
from app.progress import Progress

Mode = Literal["auto", "shm", "tmp", "off"]

POLL: Final = 0.1  # seconds between two looks at a lock that another process holds


@dataclass(frozen=True)
class Staged:
    """Where to read `source` from, and why there.

    `sha256` is what the bytes at `path` were found to have as they were copied; None in place, where
    nothing was read and the caller still has to verify. `seconds` and `nbytes` are of this call's own
    copying: zero in place, and for a copy that was there already.
    """

    source: Path
    path: Path
    staged: bool
    reason: str
    sha256: str | None = None
    seconds: float = 0.0
    nbytes: int = 0

    @property
    def gigabytes_per_second(self) -> float:
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0


def stage(
    source: Path,
    *,
    sha256: str | None,
    mode: Mode,
    readers: int,
    progress: Progress,
    places: Places | None = None,
    cancel: Event | None = None,
) -> Staged:
    """Make `source` quick to read, and say where to read it from.

    auto: in place if it lies on a local file system, else in the first of `places` that can take it,
    else in place. shm, tmp: in that folder or not at all. off: in place. `sha256` (lower-case hex) is
    what the bytes must have, None if that is not known. The source is only ever read. It may run in a
    thread beside other work; `cancel` is looked at for each block. The progress's closing note tells
    what was decided and why.

    Raises:
        FileError: `stage_source_unreadable`, `stage_source_changed`; in the modes shm and tmp also
            `stage_no_room`, `stage_folder_unsafe`, `stage_write_failed`.
        ConfigError: `stage_hash_mismatch`, with both hashes.
        UnavailableError: `stage_cancelled`.
        Whatever is raised, nothing half-written is left.
    """
    original = _look(source, sha256)
    progress.start(f"stage {source.name}", original.size, "B")
    try:
        task = _Task(original, readers, progress, places or default_places(), cancel)
        staged = _decide(task, mode)
    except SeedpodError as error:
        progress.finish(f"failed ({error.code})")
        raise
    rate = f" at {staged.gigabytes_per_second:.2f} GB/s" if staged.nbytes else ""
    progress.finish(staged.reason + rate)
    return staged


def unstage(staged: Staged) -> None:
    """Remove a copy that `stage` gave, to free its room; in place, nothing happens. A process that has
    the copy open keeps it; one that shares it and has yet to open it has to stage again."""
    if staged.staged:
        Copy(staged.path, boot_id="").remove()


# ------------------------------------------------------------------ the source


@dataclass(frozen=True)
class _Source:
    """A file to stage, as it was when it was first looked at."""

    path: Path
    real: Path
    facts: os.stat_result
    sha256: str | None

    @property
    def size(self) -> int:
        return self.facts.st_size

    @property
    def copy_name(self) -> str:
        """Its hash where that is known; else what tells this state of this file from any other."""
        facts = self.facts
        state = f"{facts.st_dev} {facts.st_ino} {facts.st_size} {facts.st_mtime_ns} {self.real}"
        identity = self.sha256 or f"state-{hashlib.sha256(os.fsencode(state)).hexdigest()[:32]}"
        return f"{identity}-{self.path.name[-120:]}"

    def change(self) -> str | None:
        """What is different now."""
        try:
            now = self.real.stat()
        except OSError as error:
            return f"it cannot be looked at any more ({error.strerror})"
        if now.st_size != self.size:
            return f"it had {self.size:,} bytes and now has {now.st_size:,}"
        if (now.st_mtime_ns, now.st_ino) != (self.facts.st_mtime_ns, self.facts.st_ino):
            return "it was written to or replaced"
        return None


def _look(path: Path, sha256: str | None) -> _Source:
    try:
        source = _Source(path, path.resolve(), path.stat(), sha256)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    if not modes.S_ISREG(source.facts.st_mode):
        raise _unreadable(path, "it is not a regular file")
    return source


def _unreadable(path: Path, reason: str) -> FileError:
    return FileError(
        "stage_source_unreadable",
        f"{path} cannot be staged: {reason}; expected a readable file. Check the volume and run again.",
    )


def _changed(path: Path, change: str) -> FileError:
    return FileError(
        "stage_source_changed",
        f"{path} changed while it was copied: {change}; expected a file that nobody writes to. Wait "
        "until its writer is done and run again.",
    )


# ------------------------------------------------------------------ the decision


@dataclass(frozen=True)
class _Task:
    source: _Source
    readers: int
    progress: Progress
    places: Places
    cancel: Event | None

    def wait(self) -> None:
        """Let another process that holds the lock get on."""
        check_cancel(self.cancel)
        time.sleep(POLL)


class _PlaceError(Exception):
    """A place cannot take the file; in `auto` the next one is tried."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def _decide(task: _Task, mode: Mode) -> Staged:
    source, places = task.source, task.places
    allowed = [place for place in places.order if mode in ("auto", place.name)]
    if reason := _in_place_because(source, mode, allowed, places):
        return Staged(source.path, source.path, False, f"in place: {reason}")
    for place in allowed:
        folder = folder_in(place.folder)
        if is_private(folder) and (
            staged := _finished(Copy(folder / source.copy_name, places.boot_id()), source)
        ):
            return staged
    refusals = []
    for place in allowed:
        try:
            return _stage_in(place, task)
        except _PlaceError as refusal:
            if mode != "auto":
                raise FileError(
                    refusal.code,
                    f"{source.path} ({decimal(source.size)}) cannot be staged in {place.folder}: {refusal}. "
                    f"SEEDPOD_STAGE={mode} allows no other place: make room there, or set it to auto.",
                ) from None
            refusals.append(f"{place.folder}: {refusal}")
    return Staged(source.path, source.path, False, f"in place: {'; '.join(refusals)}")


def _in_place_because(source: _Source, mode: Mode, allowed: list[Place], places: Places) -> str | None:
    """Why a copy is not wanted or would gain nothing."""
    if mode == "off":
        return "staging is off"
    for place in allowed:
        if source.real.is_relative_to(place.folder.resolve()):
            return f"it is in {place.folder} already"
    holds = places.filesystem(source.real)
    return f"it is local already ({holds})" if mode == "auto" and holds.local else None


def _finished(copy: Copy, source: _Source) -> Staged | None:
    """The copy, if somebody has made it whole."""
    if (sha256 := copy.finished(source.size)) is None:
        return None
    return Staged(source.path, copy.path, True, f"staged already at {copy.path}", sha256)


# ------------------------------------------------------------------ the copy


def _stage_in(place: Place, task: _Task) -> Staged:
    """The copy in `place`: made here, or by another process that is making it just now."""
    try:
        copy = Copy(open_folder(place.folder) / task.source.copy_name, task.places.boot_id())
        with copy.locked(task.wait):
            # The other one first: the copy that it makes takes the very room that is looked for here.
            if staged := _finished(copy, task.source):
                return staged
            copy.remove()  # what is left of it is not whole, or from before the machine restarted
            if shortage := task.places.shortage(place, task.source.size):
                raise _PlaceError("stage_no_room", shortage)
            return _make(copy, task)
    except UnsafeFolderError as error:
        raise _PlaceError("stage_folder_unsafe", str(error)) from None
    except OSError as error:
        full = is_full(error)
        reason = f"writing failed ({error.strerror})"
        raise _PlaceError("stage_no_room" if full else "stage_write_failed", reason) from None


def _make(copy: Copy, task: _Task) -> Staged:
    """Copy, check, finish; the caller holds the lock of `copy`."""
    source, began = task.source, time.monotonic()
    try:
        sha256 = _copy(copy.partial, task)
        if change := source.change():
            raise _changed(source.path, change)
        if source.sha256 not in (None, sha256):
            raise ConfigError(
                "stage_hash_mismatch",
                f"{source.path} has SHA-256 {sha256}; expected {source.sha256}. Download the file again, "
                "or correct its sha256 in the manifest.",
            )
        copy.finish(sha256)
    except BaseException:
        copy.remove()
        raise
    reason = f"copied to {copy.path} from {task.places.filesystem(source.real)}"
    return Staged(source.path, copy.path, True, reason, sha256, time.monotonic() - began, source.size)


def _copy(partial: Path, task: _Task) -> str:
    """Copy into the new file `partial`; the SHA-256 of what was copied."""
    source = task.source
    try:
        reading = os.open(source.real, os.O_RDONLY)
    except OSError as error:
        raise _unreadable(source.path, error.strerror or str(error)) from None
    try:
        writing = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
        try:
            return copy_and_hash(
                reading,
                writing,
                source.size,
                readers=task.readers,
                progress=task.progress,
                cancel=task.cancel,
            )
        finally:
            os.close(writing)
    except SourceError as error:
        if change := source.change():
            raise _changed(source.path, change) from None
        raise _unreadable(source.path, str(error)) from None
    finally:
        os.close(reading)
