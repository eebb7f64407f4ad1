"""A folder as one archive: the same bytes for the same files, and no second copy of them on the way."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from app.errors import FileError, JobStopped
from app.job import archive as module
from app.job.archive import END, ENTRY, pack

FILES = {"000002.png": b"two" * 1000, "000001.png": b"one", "notes/empty.json": b"", "é.txt": b"accent"}


def made(folder: Path, order: list[str]) -> Path:
    """A folder with FILES, written in this order."""
    for name in order:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FILES[name])
    return folder


def test_the_files_are_in_it_in_the_order_of_their_names(tmp_path: Path) -> None:
    target = pack(made(tmp_path / "result", list(FILES)))
    assert target == tmp_path / "result.zip"
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == sorted(FILES)
        assert {name: archive.read(name) for name in FILES} == FILES
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
    assert [path.name for path in tmp_path.iterdir()] == ["result.zip"]


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    """In another order, at another time, with other modes and another clock's zone."""
    first = pack(made(tmp_path / "a", list(FILES)))
    again = made(tmp_path / "b", list(reversed(FILES)))
    for path in again.rglob("*.png"):
        path.chmod(0o600)
        os.utime(path, (time.time() - 9e8, time.time() - 9e8))
    script = "import sys, pathlib, app.job.archive as a; a.pack(pathlib.Path(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", script, str(again)],
        env={"TZ": "Asia/Tokyo", "PATH": os.environ["PATH"]},
        cwd=Path(__file__).resolve().parents[2],
        check=True,
    )
    assert first.read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_what_an_entry_costs(tmp_path: Path) -> None:
    size = pack(made(tmp_path / "result", list(FILES))).stat().st_size
    names = sum(len(name.encode()) for name in FILES)
    assert size == END + len(FILES) * ENTRY + 2 * names + sum(map(len, FILES.values()))


def test_no_second_copy_of_all_files_is_needed(tmp_path: Path) -> None:
    folder = tmp_path / "result"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:06d}.png").write_bytes(bytes(100_000))
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))

    pack(folder, look)
    assert most < 2_000_000 + 200_000


def test_it_can_be_stopped(tmp_path: Path) -> None:
    def stop() -> None:
        raise JobStopped("job_cancelled", "The job was cancelled by its caller.")

    with pytest.raises(JobStopped):
        pack(made(tmp_path / "result", list(FILES)), stop)


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, "archive_no_room"), (errno.EIO, "archive_failed")]
)
def test_a_disk_that_fails_is_told(
    number: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, "_pack", broken)
    with pytest.raises(FileError) as caught:
        pack(made(tmp_path / "result", list(FILES)))
    assert caught.value.code == code
