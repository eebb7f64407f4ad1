"""Hashes of large files: right, and paid once."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from app.boot.hashes import BLOCK, HashRecord, cache_folders, sha256_file
from app.errors import FileError
from app.progress import Silent
from tests.boot.volumes import open_folder, without_rights

SHA = "0123456789abcdef" * 4


class Counting(Silent):
    def __init__(self) -> None:
        self.total = 0.0
        self.done = 0.0

    def start(self, label: str, total: float | None, unit: str) -> None:
        self.total += total or 0

    def advance(self, amount: float) -> None:
        self.done += amount


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "volume" / "a" / "x.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def record(tmp_path: Path) -> HashRecord:
    return HashRecord(tmp_path / "volume" / ".seedpod")


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
@pytest.mark.parametrize("readers", [1, 2, 8])
def test_equal_to_hashlib_at_block_edges(tmp_path: Path, size: int, readers: int) -> None:
    path = tmp_path / "x"
    data = bytes(range(251)) * (size // 251 + 1)
    path.write_bytes(data[:size])
    progress = Counting()
    assert sha256_file(path, readers=readers, progress=progress) == hashlib.sha256(data[:size]).hexdigest()
    assert progress.done == progress.total == size


def test_short_reads_of_a_network_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(os.urandom(100_000))
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 30_001), at))
    assert sha256_file(path) == expected


def test_a_file_that_changes_while_it_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(1000))
    pread = os.pread

    def slow(fd: int, n: int, at: int) -> bytes:
        with path.open("ab") as file:
            file.write(b"more")
        return pread(fd, n, at)

    monkeypatch.setattr(os, "pread", slow)
    with pytest.raises(FileError, match=r"from 1,000 to 1,0\d\d bytes") as caught:
        sha256_file(path, readers=1)
    assert caught.value.code == "file_changed"


def test_a_file_that_shrinks_while_it_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(1000))
    monkeypatch.setattr(os, "pread", lambda fd, n, at: b"")
    with pytest.raises(FileError) as caught:
        sha256_file(path)
    assert caught.value.code == "file_changed"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No such file") as caught:
        sha256_file(tmp_path / "x")
    assert caught.value.code == "file_unreadable"


def test_remembered_until_the_file_changes(file: Path, record: HashRecord, tmp_path: Path) -> None:
    assert record.lookup(file) is None
    assert record.remember(file, SHA, file.stat())
    again = HashRecord(tmp_path / "volume" / ".seedpod")
    assert again.lookup(file) == record.lookup(file) == SHA

    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert again.lookup(file) is None
    assert record.remember(file, SHA, file.stat())
    stat = file.stat()
    file.write_bytes(b"weights!")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same time, another size
    assert again.lookup(file) is record.lookup(file) is None


def test_a_change_during_hashing_is_never_remembered(file: Path, record: HashRecord) -> None:
    before = file.stat()
    file.write_bytes(b"others!")
    os.utime(file, ns=(0, before.st_mtime_ns + 1_000_000))
    record.remember(file, SHA, before)
    assert record.lookup(file) is None


def test_a_link_and_its_target_are_one_file(file: Path, record: HashRecord) -> None:
    link = file.with_name("link.pth")
    link.symlink_to(file.name)
    record.remember(link, SHA, link.stat())
    assert record.lookup(file) == SHA


def test_a_volume_is_known_under_another_mount_point(file: Path, record: HashRecord, tmp_path: Path) -> None:
    """A pod mounts the volume at /workspace, a serverless worker at /runpod-volume."""
    record.remember(file, SHA, file.stat())
    (tmp_path / "volume").rename(tmp_path / "elsewhere")
    assert HashRecord(tmp_path / "elsewhere" / ".seedpod").lookup(tmp_path / "elsewhere/a/x.pth") == SHA


def test_a_record_is_not_taken_for_a_file_elsewhere(file: Path, record: HashRecord, tmp_path: Path) -> None:
    record.remember(file, SHA, file.stat())
    other = tmp_path / "volume" / "b" / "x.pth"
    other.parent.mkdir()
    file.rename(other)
    assert record.lookup(other) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"sha256": 1}', '"x"', "\xff"])
def test_a_broken_record_costs_one_hash(file: Path, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "volume" / ".seedpod"
    HashRecord(folder).remember(file, SHA, file.stat())
    (stored,) = (folder / "hashes").iterdir()
    stored.write_bytes(text.encode("latin-1"))
    record = HashRecord(folder)
    assert record.lookup(file) is None
    assert record.remember(file, SHA, file.stat())
    assert HashRecord(folder).lookup(file) == SHA


def test_a_folder_that_cannot_be_written(file: Path, tmp_path: Path) -> None:
    (tmp_path / "no").write_text("a file where a folder is needed")
    record = HashRecord(tmp_path / "no" / ".seedpod")
    assert not record.remember(file, SHA, file.stat())
    assert record.lookup(file) == SHA  # in this process


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    folder = tmp_path / ".seedpod"
    files = [tmp_path / f"{i}.pth" for i in range(40)]
    for i, path in enumerate(files):
        path.write_bytes(bytes(i))

    def work(part: list[Path]) -> None:
        record = HashRecord(folder)
        for path in part:
            record.remember(path, SHA, path.stat())

    threads = [threading.Thread(target=work, args=(files[i % 2 :: 2],)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [HashRecord(folder).lookup(path) for path in files] == [SHA] * 40
    assert len(list((folder / "hashes").iterdir())) == 40  # and nothing is left behind


def test_the_record_of_a_read_only_volume_counts(file: Path, record: HashRecord, tmp_path: Path) -> None:
    record.remember(file, SHA, file.stat())
    assert HashRecord(tmp_path / "user", [tmp_path / "volume" / ".seedpod"]).lookup(file) == SHA
    assert HashRecord(tmp_path / "user").lookup(file) is None


def test_a_root_that_may_not_be_looked_into_is_passed_over() -> None:
    with open_folder() as folder:
        closed, user = folder / "closed", folder / "user"
        closed.mkdir(mode=0o700)
        with without_rights():
            assert cache_folders(None, [closed], user)[0] == user


def test_the_cache_folder_is_on_the_first_root_that_can_be_written() -> None:
    with open_folder() as folder:
        first, second, user = folder / "first", folder / "second", folder / "user"
        first.mkdir()
        second.mkdir()
        roots = [folder / "nowhere", first, second]
        assert cache_folders(None, roots, user)[0] == first / ".seedpod"
        assert cache_folders(user / "own", roots, user)[0] == user / "own"
        assert cache_folders(None, [folder / "nowhere"], user)[0] == user
        first.chmod(0o555)
        second.chmod(0o777)
        with without_rights():
            folders = cache_folders(None, roots, user)
        assert folders[0] == second / ".seedpod"
        assert first / ".seedpod" in folders  # still read
