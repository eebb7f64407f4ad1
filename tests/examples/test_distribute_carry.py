"""Pieces to workers and results back: in requests, through folders, and through a real S3 server."""

from __future__ import annotations

import base64
import hashlib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.errors import ConfigError, FileError, SeedpodError, UnavailableError, UsageError
from examples.serve.distribute import carry
from examples.serve.distribute.carry import BucketCarrier, carrier, fetch_result
from tests.job.s3_server import NAME, S3Server


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def piece(tmp_path: Path) -> Path:
    path = tmp_path / "piece.mov"
    path.write_bytes(b"a piece of a film")
    return path


def test_in_the_request(piece: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with carrier(None, {}).sent(piece) as source:
        assert base64.b64decode(source["base64"]) == piece.read_bytes()
    monkeypatch.setattr(carry, "INLINE_BYTES", 16)
    with pytest.raises(UsageError, match=r"17 bytes.*--part-seconds.*BUCKET_ENDPOINT_URL.*--input-folder"):
        carrier(None, {}).sent(piece).__enter__()


def test_through_a_folder(piece: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    with pytest.raises(UsageError, match="--input-folder"):
        carrier(shared, {})
    shared.mkdir()
    sends = carrier(shared, {"BUCKET_ENDPOINT_URL": "https://unused.example/b"})
    with sends.sent(piece) as first, sends.sent(piece) as second:
        assert first != second
        assert (shared / first["path"]).read_bytes() == piece.read_bytes()
        assert (shared / first["path"]).suffix == ".mov"
    assert list(shared.iterdir()) == []


def test_through_a_bucket(piece: Path, s3: S3Server) -> None:
    environ = {
        "BUCKET_ENDPOINT_URL": f"{s3.endpoint}/{NAME}",
        "BUCKET_ACCESS_KEY_ID": s3.keys["AccessKeyId"],
        "BUCKET_SECRET_ACCESS_KEY": s3.keys["SecretAccessKey"],
    }
    with carrier(None, environ).sent(piece) as source:
        with urllib.request.urlopen(source["url"]) as answer:
            assert answer.read() == piece.read_bytes()
        assert s3.client().list_objects_v2(Bucket=NAME)["KeyCount"] == 1
    assert s3.client().list_objects_v2(Bucket=NAME)["KeyCount"] == 0
    with pytest.raises(ConfigError, match="BUCKET_SECRET_ACCESS_KEY"):
        carrier(None, {**environ, "BUCKET_SECRET_ACCESS_KEY": ""})


def test_a_bucket_that_is_not_there(piece: Path, s3: S3Server) -> None:
    gone = BucketCarrier(s3.bucket(name="nowhere"))
    with pytest.raises(UnavailableError, match="nowhere") as caught, gone.sent(piece):
        pass
    assert caught.value.code == "piece_not_uploaded"
    assert s3.keys["SecretAccessKey"] not in str(caught.value)


# ------------------------------------------------------------------ results


RESULT = b"a part, restored"


def told(kind: str, **where: str) -> dict[str, Any]:
    return {"kind": kind, "bytes": len(RESULT), "sha256": hashlib.sha256(RESULT).hexdigest(), **where}


def test_results_from_everywhere(tmp_path: Path, s3: S3Server) -> None:
    s3.client().put_object(Bucket=NAME, Key="made.mp4", Body=RESULT)
    where = {"Bucket": NAME, "Key": "made.mp4"}
    url = s3.client().generate_presigned_url("get_object", Params=where)
    (tmp_path / "out" / "job").mkdir(parents=True)
    (tmp_path / "out" / "job" / "made.mp4").write_bytes(RESULT)
    for i, result in enumerate((
        told("inline", base64=base64.b64encode(RESULT).decode()),
        told("bucket", url=url),
        told("path", path="job/made.mp4"),
    )):  # fmt: skip
        fetch_result(result, tmp_path / f"{i}.mp4", tmp_path / "out")
        assert (tmp_path / f"{i}.mp4").read_bytes() == RESULT


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (told("inline", base64=base64.b64encode(b"another").decode()), "result_damaged"),
        (told("bucket", url="http://127.0.0.1:9/made.mp4?secret=5ec2e7"), "result_unreachable"),
        (told("bucket", url="file:///etc/passwd"), "result_unreachable"),
        (told("path", path="job/made.mp4"), "result_not_found"),
        (told("path", path="../film.mp4"), "result_not_found"),
    ],
)
def test_results_that_do_not_come(
    result: dict[str, Any], code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    (tmp_path / "out").mkdir()
    (tmp_path / "film.mp4").write_bytes(RESULT)
    with pytest.raises(SeedpodError) as caught:
        fetch_result(result, tmp_path / "made.mp4", tmp_path / "out")
    assert caught.value.code == code
    assert "5ec2e7" not in caught.value.message
    assert isinstance(caught.value, FileError | UnavailableError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mp4", "out"]


def test_results_in_a_folder_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--output-folder"):
        fetch_result(told("path", path="job/made.mp4"), tmp_path / "made.mp4", None)
