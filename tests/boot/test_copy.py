import hashlib
import os
import random
import threading
from pathlib import Path

import pytest

from app.boot.copy import AHEAD, BLOCK, SourceError, copy_and_hash
from app.errors import UnavailableError
from app.progress import Silent
from tests.boot.places import Recorder


def copied(source: Path, size: int, readers: int, progress=None, cancel=None) -> str:
    with source.open("rb") as reading, source.with_suffix(".copy").open("wb") as writing:
        return copy_and_hash(
            reading.fileno(),
            writing.fileno(),
            size,
            readers=readers,
            progress=progress or Silent(),
            cancel=cancel,
        )


@pytest.mark.parametrize("readers", [1, 2, 8])
@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 17 * BLOCK + 12345])
def test_copy_and_hash_equal_to_reading_whole(tmp_path, size, readers):
    source, data = tmp_path / "source", random.Random(size).randbytes(size)
    source.write_bytes(data)
    progress = Recorder()
    assert copied(source, size, readers, progress) == hashlib.sha256(data).hexdigest()
    assert source.with_suffix(".copy").read_bytes() == data
    assert progress.done == size


def test_short_reads_are_completed(tmp_path, monkeypatch):
    source, data = tmp_path / "source", random.Random(1).randbytes(3 * BLOCK + 5)
    source.write_bytes(data)
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, blocks, at: whole(fd, [blocks[0][:700_001]], at))
    assert copied(source, len(data), 4) == hashlib.sha256(data).hexdigest()
    assert source.with_suffix(".copy").read_bytes() == data


def test_a_source_that_ends_early_is_an_error_and_progress_is_taken_back(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(bytes(5 * BLOCK))
    progress = Recorder()
    with pytest.raises(SourceError, match=f"ends at byte {5 * BLOCK:,}"):
        copied(source, 5 * BLOCK + 1, 2, progress)
    assert progress.blocks > 0 and progress.done == 0


def test_readers_run_ahead_by_no_more_than_the_ring(tmp_path, monkeypatch):
    source, size, readers = tmp_path / "source", 40 * BLOCK, 4
    source.write_bytes(bytes(size))
    begun, hashed, most = [], [], 0
    whole, guard = os.preadv, threading.Lock()

    def counting(fd, blocks, at):
        nonlocal most
        with guard:
            begun.append(at)
            most = max(most, len(begun) - len(hashed))
        return whole(fd, blocks, at)

    monkeypatch.setattr(os, "preadv", counting)
    copied(source, size, readers, Recorder(lambda done: hashed.append(done)))
    assert 2 <= most <= readers + AHEAD


def test_cancel_is_seen_within_a_block(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(bytes(20 * BLOCK))
    cancel = threading.Event()
    progress = Recorder(lambda done: cancel.set() if done >= 3 * BLOCK else None)
    with pytest.raises(UnavailableError) as caught:
        copied(source, 20 * BLOCK, 4, progress, cancel)
    assert caught.value.code == "stage_cancelled"
    assert progress.blocks == 3
