"""Delivery without a bucket: inline, and into the mounted output folder."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from app.errors import FileError, InputError, JobStopped, SeedpodError, UsageError
from app.job import deliver as module
from app.job.deliver import DeliverySettings, check_delivery, deliver

DATA = bytes(range(256)) * 40
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def result(tmp_path: Path) -> Path:
    path = tmp_path / "result.mp4"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def refused(kind: type[SeedpodError], code: str, action: Callable[[], object], *parts: str) -> None:
    with pytest.raises(kind) as caught:
        action()
    assert caught.value.code == code, caught.value.message
    for part in parts:
        assert part in caught.value.message
    assert "/tmp" not in caught.value.message


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


# ------------------------------------------------------------------ inline


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("result.mp4", "video/mp4"),
        ("result.mkv", "video/x-matroska"),
        ("result.PNG", "image/png"),
        ("result.jpeg", "image/jpeg"),
        ("result.zip", "application/zip"),
        ("result", "application/octet-stream"),
    ],
)
def test_a_small_result_is_in_the_answer(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(DATA)
    told: list[int] = []
    answer = deliver(tmp_path / name, "job", DeliverySettings(inline_bytes=len(DATA)), told.append)
    assert base64.b64decode(answer.pop("base64")) == DATA
    assert answer == {"kind": "inline", "bytes": len(DATA), "sha256": SHA256, "content_type": kind}
    assert sum(told) == len(DATA)


def test_what_is_too_large_for_the_answer_says_what_to_do(result: Path) -> None:
    how = DeliverySettings(inline_bytes=len(DATA) - 1)
    parts = ("10,240", "10,239", "BUCKET_ENDPOINT_URL", "SEEDPOD_OUTPUT")
    refused(InputError, "deliver_too_large", lambda: deliver(result, "job", how), *parts)
    refused(InputError, "deliver_too_large", lambda: check_delivery(len(DATA), how), *parts)
    check_delivery(len(DATA) - 1, how)
    check_delivery(None, how)


def test_nothing_of_a_bucket_is_imported_without_one(result: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from app.job.deliver import *\n"
        f"deliver(Path({str(result)!r}), 'job', DeliverySettings())\n"
        "sys.exit(bool({'boto3', 'botocore', 'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2]).returncode == 0


@pytest.mark.parametrize("job_id", ["", ".", "..", "a/b", "../a", ".hidden", "a\0", "a b", "ü", "a" * 129])
def test_an_id_that_is_no_safe_name_is_refused(result: Path, out: Path, job_id: str) -> None:
    how = DeliverySettings(output_root=out)
    refused(UsageError, "deliver_job_id", lambda: deliver(result, job_id, how))
    assert files(out) == []


# ------------------------------------------------------------------ the output folder


def test_a_result_is_copied_into_the_folder_once(result: Path, out: Path) -> None:
    how = DeliverySettings(output_root=out, inline_bytes=1)
    told: list[int] = []
    answer = deliver(result, "sync-1234-u1", how, told.append)
    assert answer == {
        "kind": "path",
        "path": "sync-1234-u1/result.mp4",
        "bytes": len(DATA),
        "sha256": SHA256,
        "content_type": "video/mp4",
    }
    assert files(out) == ["sync-1234-u1/result.mp4"]
    place = out / "sync-1234-u1" / "result.mp4"
    assert place.read_bytes() == DATA and sum(told) == len(DATA)
    before = place.stat()
    assert deliver(result, "sync-1234-u1", how) == answer  # the same job again
    assert place.stat().st_mtime_ns == before.st_mtime_ns and place.stat().st_ino == before.st_ino
    assert result.exists()


def test_another_file_in_its_place_is_left_alone(result: Path, out: Path) -> None:
    how = DeliverySettings(output_root=out)
    (out / "job").mkdir()
    (out / "job" / "result.mp4").write_bytes(b"something of the user's")
    refused(FileError, "deliver_exists", lambda: deliver(result, "job", how), "job/result.mp4")
    assert (out / "job" / "result.mp4").read_bytes() == b"something of the user's"
    (out / "link").mkdir()
    (out / "link" / "result.mp4").symlink_to(result)
    refused(FileError, "deliver_exists", lambda: deliver(result, "link", how))
    assert files(out) == ["job/result.mp4", "link/result.mp4"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_not_overwritten(
    result: Path, out: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:  # as on a volume without hard links

        def hardlink_to(self: Path, target: Path) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(Path, "hardlink_to", hardlink_to)
    how = DeliverySettings(output_root=out)
    assert deliver(result, "alone", how)["kind"] == "path"

    def appear(amount: int) -> None:
        if amount:
            (out / "job" / "result.mp4").write_bytes(b"another")

    refused(FileError, "deliver_exists", lambda: deliver(result, "job", how, appear))
    assert (out / "job" / "result.mp4").read_bytes() == b"another"
    assert files(out) == ["alone/result.mp4", "job/result.mp4"]


def test_a_folder_of_the_job_that_leads_out_is_refused(result: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (out / "job").symlink_to(tmp_path / "elsewhere")
    how = DeliverySettings(output_root=out)
    refused(FileError, "deliver_failed", lambda: deliver(result, "job", how), "link")
    assert files(tmp_path / "elsewhere") == []


def test_a_full_disk_is_told_and_leaves_nothing(
    result: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    how = DeliverySettings(output_root=out)
    monkeypatch.setattr(module.os, "fsync", full)
    refused(FileError, "deliver_no_room", lambda: deliver(result, "job", how), "Make room")
    assert files(out) == []


def test_stopping_leaves_nothing(result: Path, out: Path) -> None:
    def stop(amount: int) -> None:
        if amount:
            raise JobStopped("job_cancelled", "The job was cancelled.")

    how = DeliverySettings(output_root=out)
    refused(JobStopped, "job_cancelled", lambda: deliver(result, "job", how, stop))
    assert files(out) == []


def test_a_folder_that_cannot_be_used_is_told_before_the_work(out: Path, tmp_path: Path) -> None:
    missing = DeliverySettings(output_root=tmp_path / "missing")
    refused(FileError, "deliver_no_folder", lambda: check_delivery(None, missing), "SEEDPOD_OUTPUT")
    (tmp_path / "file").touch()
    not_folder = DeliverySettings(output_root=tmp_path / "file")
    refused(FileError, "deliver_no_folder", lambda: check_delivery(None, not_folder))
    how = DeliverySettings(output_root=out)
    refused(FileError, "deliver_no_room", lambda: check_delivery(10**18, how), "free")
    check_delivery(1000, how)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_makes_belongs_to_the_owner_of_the_folder(result: Path, out: Path) -> None:
    os.chown(out, 1234, 2345)
    deliver(result, "job", DeliverySettings(output_root=out))
    for path in (out / "job", out / "job" / "result.mp4"):
        assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)
    assert (out / "job" / "result.mp4").stat().st_mode & 0o444 == 0o444
