"""SHA-256 of large files, computed with reading ahead and remembered, so that it is paid once.

A remembered hash stands for a file's path, size and modification time: when one of them changes it no
longer counts. There is one small JSON file per checkpoint, so workers that share a volume never
overwrite each other's, and a broken one costs a single new hash. This module does not know which hash
a file should have.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from app.boot.regular import open_regular
from app.errors import FileError
from app.progress import Progress, Silent

BLOCK: Final = 8 << 20  # bytes per read; a network volume gives its full speed from about 1 MiB on
FOLDER: Final = ".seedpod"
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


def sha256_file(path: Path, *, readers: int = 4, progress: Progress | None = None) -> str:
    """The SHA-256 of the file at `path`, in lower-case hex.

    `readers` threads read blocks of 8 MiB ahead of the hashing, and hold at most `readers` + 1 of them.
    `progress` gets the bytes done.

    Raises:
        FileError: `file_unreadable` if reading fails, `file_changed` if it changes meanwhile.
    """
    progress = progress or Silent()
    try:
        with open_regular(path) as file:
            before = os.fstat(file.fileno())
            progress.start(f"hash {path.name}", before.st_size, "B")
            digest = _hash_blocks(file.fileno(), before.st_size, readers, progress)
            after = os.fstat(file.fileno())
    except OSError as error:
        raise FileError(
            "file_unreadable",
            f"{path} cannot be read: {error.strerror or error}; expected a readable file. "
            "Check its permissions and the volume.",
        ) from None
    if digest is None or _stamp(before) != _stamp(after):
        raise FileError(
            "file_changed",
            f"{path} changed while it was hashed (from {before.st_size:,} to {after.st_size:,} bytes); "
            "expected a file that nobody writes to. Wait until copying is done and try again.",
        )
    progress.finish()
    return digest


def _hash_blocks(descriptor: int, size: int, readers: int, progress: Progress) -> str | None:
    """The digest of `size` bytes; None if the file ends before."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(readers, "hash") as pool:
        ahead = deque(pool.submit(os.pread, descriptor, BLOCK, at * BLOCK) for at in range(readers))
        for at in range(readers, -(-size // BLOCK) + readers):
            block = ahead.popleft().result()
            ahead.append(pool.submit(os.pread, descriptor, BLOCK, at * BLOCK))
            start = (at - readers) * BLOCK
            block += _rest(descriptor, start + len(block), min(BLOCK, size - start) - len(block))
            if len(block) != min(BLOCK, size - start):
                return None
            digest.update(block)
            progress.advance(len(block))
    return digest.hexdigest()


def _rest(descriptor: int, offset: int, wanted: int) -> bytes:
    """The rest of a block of which a read gave only a part, as network file systems may."""
    parts = []
    while wanted > 0 and (part := os.pread(descriptor, wanted, offset)):
        parts.append(part)
        offset, wanted = offset + len(part), wanted - len(part)
    return b"".join(parts)


def _stamp(stat: os.stat_result) -> dict[str, Any]:
    # No inode: network file systems make them up anew at every mount.
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


class HashRecord:
    """The hashes remembered in `folder`, and those that the folders `also` hold.

    A file below the folder's parent is remembered by its path from there: a volume whose record was
    written at /workspace is known at /runpod-volume too.
    """

    def __init__(self, folder: Path, also: Sequence[Path] = ()) -> None:
        self._folders = (folder, *(other for other in also if other != folder))
        self._known: dict[Path, dict[str, Any]] = {}  # also when the folder cannot be written

    def lookup(self, path: Path) -> str | None:
        """The remembered hash of `path`, if the file is still the one that was hashed."""
        real = Path(os.path.realpath(path))
        try:
            stamp = _stamp(real.stat())
        except OSError:
            return None
        for record in (self._known.get(real), *(self._read(folder, real) for folder in self._folders)):
            if record is not None and stamp.items() <= record.items():
                return str(record["sha256"])
        return None

    def remember(self, path: Path, sha256: str, stat: os.stat_result) -> bool:
        """Remember that the file at `path` has this hash, where `stat` was taken before it was computed:
        a file that changed meanwhile is then never taken for the one that was hashed. False if it could
        not be written down (no room, no permission): it then counts in this process only."""
        real, stamp = Path(os.path.realpath(path)), _stamp(stat)
        folder = self._folders[0]
        self._known[real] = {"path": _key(folder, real), **stamp, "sha256": sha256}
        return _write(_record_file(folder, real), json.dumps(self._known[real]))

    def _read(self, folder: Path, real: Path) -> dict[str, Any] | None:
        try:
            record = json.loads(_record_file(folder, real).read_bytes())
        except (OSError, ValueError):  # none yet, or broken: the file is hashed anew
            return None
        if not isinstance(record, dict) or record.get("path") != _key(folder, real):
            return None
        return record if _SHA256.fullmatch(str(record.get("sha256"))) else None


def _key(folder: Path, real: Path) -> str:
    volume = os.path.realpath(folder.parent)
    return str(real.relative_to(volume) if real.is_relative_to(volume) else real)


def _record_file(folder: Path, real: Path) -> Path:
    short = hashlib.sha256(_key(folder, real).encode(errors="surrogateescape")).hexdigest()[:16]
    return folder / "hashes" / f"{real.name[:100]}.{short}.json"


def _write(path: Path, text: str) -> bool:
    """Write `text` at once or not at all."""
    part = path.with_name(f".{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(text)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def cache_folders(cache: Path | None, roots: Sequence[Path], user_cache: Path) -> tuple[Path, ...]:
    """The folders of remembered hashes: the one to write to, then others that may be read.

    `cache` is SEEDPOD_CACHE. Without it: `.seedpod` in the first root that can be written, else
    `user_cache`. A volume that is mounted read-only may hold the record of one who could write.
    """
    own = [root / FOLDER for root in roots]
    if cache is not None:
        return (cache, *own)
    first = next((folder for folder in own if _writable(folder)), user_cache)
    return (first, *(folder for folder in own if folder != first))


def _writable(folder: Path) -> bool:
    try:
        place = folder if folder.exists() else folder.parent
        return place.is_dir() and os.access(place, os.W_OK | os.X_OK, effective_ids=True)
    except PermissionError:  # a root that may not even be looked into
        return False
