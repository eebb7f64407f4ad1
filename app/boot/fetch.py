"""Fetching: a checkpoint downloaded from the hub to its place under a root, whole and right or not there.

The download grows in `<root>/.seedpod/downloads`, survives interruptions and restarts, and moves to its
place only when its size and hash are right. A file that is there already is never touched. This module
knows nothing of HTTP (hub.py does) and of what is inside a file.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from rich.filesize import decimal

from app.boot.hashes import FOLDER, sha256_file
from app.boot.hub import Hub, InterruptedDownloadError, Remote
from app.boot.lock import only_one
from app.boot.manifest import FileEntry, Origin
from app.boot.places import folder_limit
from app.boot.regular import open_to_append
from app.errors import ConfigError, FileError, SeedpodError, UnavailableError, is_full
from app.progress import Progress

TRIES: Final = 6  # without a single byte between them; with a wait of 1 s that is half a minute
KEEP: Final = 100 << 20  # bytes of the volume that a download leaves free
POLL: Final = 0.2  # seconds between two looks at a lock that another process holds
BUFFER: Final = 4 << 20  # bytes per write: network volumes dislike small ones

_Result = TypeVar("_Result")


def fetch(
    entry: FileEntry,
    root: Path,
    *,
    endpoint: str,
    token: str | None,
    progress: Progress,
    wait: float = 1.0,
) -> Path:
    """Download `entry` to its path under `root`, unless the right file is there; returns that path.

    What an earlier try has downloaded is gone on from. A hub that fails for the moment is asked again
    after `wait` seconds, then twice as long, and so on.

    Raises:
        ConfigError: `fetch_no_origin`, `fetch_not_found`, `fetch_denied`, `fetch_size_mismatch`,
            `fetch_hash_mismatch`.
        FileError: `fetch_root_missing`, `fetch_outside`, `fetch_exists` (a wrong file is in its
            place; it is left alone), `fetch_no_room`, `fetch_write_failed`.
        UnavailableError: `fetch_unreachable`, `fetch_refused`.
    """
    target = root / entry.path
    if _is_there(entry, target, progress):
        return target
    if entry.origin is None:
        raise ConfigError(
            "fetch_no_origin",
            f"{entry.name} cannot be downloaded: the manifest gives it no repo and filename. Add them, or "
            f"put the file at {target}.",
        )
    if token and not (token.isascii() and token.isprintable()):
        raise ConfigError(
            "fetch_denied",
            "HF_TOKEN holds characters that no token has (it is not shown here); expected hf_ and letters "
            "and digits. Copy it anew from the hub's settings page.",
        )
    download = _Download(entry, root, Hub(endpoint, token), progress, wait)
    try:
        with only_one(download.open_folder(), lambda: time.sleep(POLL)):
            if not _is_there(entry, target, progress):  # another process may have brought it meanwhile
                download.run(entry.origin)
    except OSError as error:
        raise _unwritable(root, entry, error) from None
    return target


def _is_there(entry: FileEntry, target: Path, progress: Progress) -> bool:
    """Whether the right file is at `target`; a wrong one is an error."""
    if not os.path.lexists(target):
        return False
    if not target.is_file():
        wrong = "it is not a regular file"
    elif entry.size not in (None, size := target.stat().st_size):
        wrong = f"it has {size:,} bytes; expected {entry.size:,}"
    elif entry.sha256 not in (
        None,
        sha256 := sha256_file(target, progress=progress) if entry.sha256 else None,
    ):
        wrong = f"it has SHA-256 {sha256}; expected {entry.sha256}"
    else:
        return True
    raise FileError(
        "fetch_exists",
        f"{target} is in the place of {entry.name}, and is another file: {wrong}. It is left as it is; move "
        "it away and fetch again.",
    )


def _unwritable(root: Path, entry: FileEntry, error: OSError) -> FileError:
    if is_full(error):
        return FileError(
            "fetch_no_room",
            f"{root} ran full while {entry.name} was downloaded ({error.strerror}). What came is kept: make "
            "room and fetch again to go on from there.",
        )
    return FileError(
        "fetch_write_failed",
        f"{entry.name} cannot be written to {root}: {error.strerror}; expected a folder that may be written "
        "to. Mount it writable, or name another one first in SEEDPOD_ROOTS.",
    )


# ------------------------------------------------------------------ a download


@dataclass(frozen=True)
class _Download:
    entry: FileEntry
    root: Path
    hub: Hub
    progress: Progress
    wait: float

    @property
    def folder(self) -> Path:
        return self.root / FOLDER / "downloads"

    def open_folder(self) -> Path:
        """Make the folder of downloads; returns this file's lock in it."""
        if not self.root.is_dir():
            raise FileError(
                "fetch_root_missing",
                f"{self.root} is to hold {self.entry.name}, and is not a folder that exists; expected a "
                "mounted volume. Mount it, or name another folder in SEEDPOD_ROOTS.",
            )
        real = (self.root / self.entry.path).parent.resolve()
        if not real.is_relative_to(self.root.resolve()):
            raise FileError(
                "fetch_outside",
                f"{self.root / self.entry.path} leads to {real} through a link, outside of {self.root}; "
                "expected a place under the root. Remove the link, or fetch to the folder it leads to.",
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        return self._beside(str(self.entry.path), "lock")

    def run(self, origin: Origin) -> None:
        """Ask, look for room, download, check, and move to its place; the caller holds the lock."""
        remote = self._patiently(lambda: self.hub.look(origin))
        self._agree(remote)
        # The name says which bytes these are, so that those of another revision are never added to.
        identity = self.entry.sha256 or f"{origin.repo} {origin.filename} {remote.etag}"
        partial = self._beside(identity, "partial")
        self._check_room(remote, partial)
        self.progress.start(f"fetch {self.entry.name}", remote.size or self.entry.size, "B")
        try:
            with _Part(partial, self.progress) as part:
                self._patiently(lambda: self._go_on(remote, part), part)
                self._check(remote, part)
            _move(partial, self.root / self.entry.path)
        except (SeedpodError, OSError) as error:
            self.progress.finish(f"failed ({getattr(error, 'code', 'fetch_write_failed')})")
            raise
        self.progress.finish(f"whole, SHA-256 {part.sha256}")

    def _beside(self, identity: str, suffix: str) -> Path:
        short = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return self.folder / f"{self.entry.path.name[-100:]}.{short}.{suffix}"

    def _agree(self, remote: Remote) -> None:
        """Refuse before the download what would be refused after it."""
        said = f"{self.hub.name} gives {remote.origin.repo}/{remote.origin.filename}"
        advice = "Nothing was downloaded; correct the manifest or its revision."
        if remote.size is not None and self.entry.size not in (None, remote.size):
            raise ConfigError(
                "fetch_size_mismatch",
                f"{said} with {remote.size:,} bytes; the manifest expects {self.entry.size:,}. {advice}",
            )
        if remote.sha256 is not None and self.entry.sha256 not in (None, remote.sha256):
            raise ConfigError(
                "fetch_hash_mismatch",
                f"{said} with SHA-256 {remote.sha256}; the manifest expects {self.entry.sha256}. {advice}",
            )

    def _check_room(self, remote: Remote, partial: Path) -> None:
        have = partial.stat().st_size if partial.exists() else 0
        need = (remote.size or self.entry.size or 0) - have
        free = folder_limit(self.folder).free
        if need + KEEP > free:
            raise FileError(
                "fetch_no_room",
                f"{self.root} has {decimal(free)} free; {self.entry.name} needs {decimal(need)} more, and "
                f"{decimal(KEEP)} is kept free. Make room, or name another folder first in SEEDPOD_ROOTS.",
            )

    def _go_on(self, remote: Remote, part: _Part) -> None:
        """One connection: from where `part` ends to the end of the file, or to an interruption."""
        size = remote.size or self.entry.size
        if part.done == size:
            return
        with self.hub.read(remote, part.done) as (start, chunks):
            if start != part.done:  # a server without ranges: it all comes again
                part.restart()
            for chunk in chunks:
                part.append(chunk)
                if size is not None and part.done > size:
                    break
        if size is not None and part.done < size:
            raise InterruptedDownloadError(f"it closed the connection after {part.done:,} bytes")

    def _check(self, remote: Remote, part: _Part) -> None:
        """What came must be what was announced; if not, it is ours to remove."""
        size, expected = remote.size or self.entry.size, self.entry.sha256 or remote.sha256
        if size in (None, part.done) and expected in (None, part.sha256):
            return
        part.path.unlink()
        raise ConfigError(
            "fetch_hash_mismatch",
            f"What {self.hub.name} sent as {self.entry.name} has {part.done:,} bytes and SHA-256 "
            f"{part.sha256}; expected {size or part.done:,} bytes and {expected}. It was removed: fetch "
            "again, and if that repeats, look for a proxy in between or correct the manifest.",
        )

    def _patiently(self, step: Callable[[], _Result], part: _Part | None = None) -> _Result:
        """`step`, tried again when it is interrupted; a try that brought bytes does not count."""
        tries = 0
        while True:
            before = part.done if part else 0
            try:
                return step()
            except InterruptedDownloadError as error:
                tries = 1 if part and part.done > before else tries + 1
                if tries >= TRIES:
                    kept = f" {decimal(part.done)} are kept." if part and part.done else ""
                    raise UnavailableError(
                        "fetch_unreachable",
                        f"{self.entry.name} cannot be downloaded from {self.hub.name}: {error}, {tries} "
                        f"times in a row; expected a hub that answers.{kept} Check the network and "
                        "HF_ENDPOINT, and fetch again to go on.",
                    ) from None
            time.sleep(self.wait * 2 ** (tries - 1))


class _Part:
    """A file that grows, and its hash; opened where an earlier download stopped."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path, self._progress = path, progress
        self.done = 0
        self._file = open_to_append(path, BUFFER)
        self._digest = hashlib.sha256()

    def __enter__(self) -> _Part:
        with self.path.open("rb") as earlier:
            while block := earlier.read(BUFFER):
                self._count(block)
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())  # a name must never outlive a power cut without its bytes

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def append(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._count(chunk)

    def restart(self) -> None:
        """Drop everything."""
        self._file.truncate(0)
        self._progress.advance(-self.done)
        self.done, self._digest = 0, hashlib.sha256()

    def _count(self, block: bytes) -> None:
        self._digest.update(block)
        self.done += len(block)
        self._progress.advance(len(block))


def _move(partial: Path, target: Path) -> None:
    """Give the finished download its place, without ever replacing what is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(partial)
    except OSError:
        if not os.path.lexists(target):  # no hard links here: this look is all there is against a race
            partial.rename(target)
            return
        raise FileError(
            "fetch_exists",
            f"{target} appeared while its file was downloaded to {partial}; expected its place to be free. "
            "Both are left: keep the right one.",
        ) from None
    partial.unlink()
