"""Copying and hashing in one pass: several readers, one hash, one writer, a bounded ring of buffers.

SHA-256 must see the blocks in order, so readers run ahead of it by as many blocks as there are of them.
Each block is hashed and written at the same time, from the buffer it was read into. One writer, because
a file system lets one thread at a time write to a file, and threads that wait for that burn the core
that hashes. It knows descriptors only: no paths, no places, no expected hash.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Final

from app.errors import UnavailableError
from app.progress import Progress

BLOCK: Final = 2 << 20  # bytes: enough for a network volume, and the ring stays in the processor's cache
AHEAD: Final = 3  # buffers beyond the readers': one being hashed, two waiting to be written


class SourceError(Exception):
    """Reading failed, or the source ended early; the text says which."""


def check_cancel(cancel: Event | None) -> None:
    """
    Raises:
        UnavailableError: `stage_cancelled` once `cancel` is set.
    """
    if cancel is not None and cancel.is_set():
        raise UnavailableError("stage_cancelled", "Staging was cancelled before the copy was whole.")


def copy_and_hash(
    source: int, target: int, size: int, *, readers: int, progress: Progress, cancel: Event | None = None
) -> str:
    """Copy `size` bytes from descriptor `source` to `target`; returns their SHA-256 in lower-case hex.

    At most `readers` + 3 blocks of 2 MiB are held. `progress` gets the bytes hashed, and
    has them taken back if the copy fails.

    Raises:
        SourceError: a read failed, or the source has fewer bytes.
        OSError: a write failed (ENOSPC among others).
        UnavailableError: `stage_cancelled`, looked for at each block.
    """
    digest = hashlib.sha256()
    free = [memoryview(bytearray(BLOCK)) for _ in range(readers + AHEAD)]
    reading: deque[Future[memoryview]] = deque()
    writing: deque[tuple[Future[None], memoryview]] = deque()
    begun = done = 0
    with ThreadPoolExecutor(readers, "stage-read") as read, ThreadPoolExecutor(1, "stage-write") as write:
        try:
            while done < size:
                check_cancel(cancel)
                while begun < size and len(reading) <= readers and free:
                    block = free.pop()[: min(BLOCK, size - begun)]
                    reading.append(read.submit(_read, source, block, begun))
                    begun += len(block)
                block = reading.popleft().result()
                writing.append((write.submit(_write, target, block, done), block))
                digest.update(block)
                done += len(block)
                progress.advance(len(block))
                while writing and (writing[0][0].done() or not free):
                    written, block = writing.popleft()
                    written.result()
                    free.append(memoryview(block.obj))
            for written, _ in writing:
                written.result()
        except BaseException:
            read.shutdown(cancel_futures=True)
            write.shutdown(cancel_futures=True)
            progress.advance(-done)
            raise
    return digest.hexdigest()


def _read(source: int, block: memoryview, at: int) -> memoryview:
    """Fill `block` from offset `at`; a network file system may give less than asked for at a time."""
    filled = 0
    while filled < len(block):
        try:
            count = os.preadv(source, [block[filled:]], at + filled)
        except OSError as error:
            raise SourceError(f"{error.strerror} at byte {at + filled:,}") from error
        if not count:
            raise SourceError(f"it ends at byte {at + filled:,}")
        filled += count
    return block


def _write(target: int, block: memoryview, at: int) -> None:
    written = 0
    while written < len(block):
        written += os.pwrite(target, block[written:], at + written)
