"""Uploads to a real S3 server, and what the settings of a bucket mean."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from urllib.request import urlopen

import pytest
from pydantic import SecretStr

from app.errors import ConfigError, JobStopped, SeedpodError, UnavailableError
from app.job.bucket import PART, Bucket, Sent, bucket_of
from app.job.deliver import DeliverySettings, check_delivery, deliver
from tests.job.s3_server import NAME, Proxy, S3Server

SECRET = "AKIA-do-not-show"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def result(tmp_path: Path) -> Path:
    path = tmp_path / "result.mp4"
    path.write_bytes(os.urandom(100_000))
    return path


def send(
    path: Path, bucket: Bucket, job_id: str = "job-1", on_bytes: Callable[[int], None] | None = None
) -> Any:
    return deliver(path, job_id, DeliverySettings(bucket=bucket), on_bytes or (lambda _: None))


def refused(code: str, action: Callable[[], object], kind: type[SeedpodError] = UnavailableError) -> str:
    with pytest.raises(kind) as caught:
        action()
    assert caught.value.code == code, caught.value.message
    assert SECRET not in caught.value.message and "Signature=" not in caught.value.message
    return caught.value.message


# ------------------------------------------------------------------ uploads


@pytest.mark.parametrize("size", [1, 100_000, 2 * PART + 12_345])
def test_a_link_to_the_same_bytes_of_the_right_type_comes_back(
    s3: S3Server, tmp_path: Path, size: int
) -> None:
    path = tmp_path / "my result ü.mp4"
    path.write_bytes(data := os.urandom(size))
    told: list[int] = []
    with Proxy(s3.port) as proxy:
        bucket = s3.bucket(endpoint=proxy.endpoint, prefix="made/here", link_seconds=600)
        answer = send(path, bucket, f"job-{size}", told.append)
        with urlopen(answer.pop("url")) as response:
            url, headers, got = response.url, response.headers, response.read()
        puts = [request for request in proxy.requests if request.startswith("PUT")]
    assert got == data
    assert headers["Content-Type"] == "video/mp4"
    assert answer == {
        "kind": "bucket",
        "bytes": size,
        "sha256": hashlib.sha256(data).hexdigest(),
        "content_type": "video/mp4",
    }
    assert urlsplit(url).path == f"/{NAME}/made/here/job-{size}/my%20result%20%C3%BC.mp4"
    assert parse_qs(urlsplit(url).query)["X-Amz-Expires"] == ["600"]
    assert sum(told) == size and min(told) >= 0
    assert len(puts) == (3 if size > PART else 1)  # in parts


def test_the_same_job_again_gives_the_same_object(s3: S3Server, result: Path) -> None:
    answers = [send(result, s3.bucket(), "again") for _ in range(2)]
    assert answers[0]["sha256"] == answers[1]["sha256"]
    held = s3.client().list_objects_v2(Bucket=NAME, Prefix="again/")["Contents"]
    assert [(item["Key"], item["Size"]) for item in held] == [("again/result.mp4", 100_000)]
    head = s3.client().head_object(Bucket=NAME, Key="again/result.mp4")
    assert head["Metadata"] == {"sha256": answers[0]["sha256"]}


@pytest.mark.parametrize("fault", [500, 503, 0])
def test_a_server_that_fails_for_a_moment_is_asked_again(s3: S3Server, tmp_path: Path, fault: int) -> None:
    path = tmp_path / "result.mp4"
    path.write_bytes(data := os.urandom(PART - 1000))
    told: list[int] = []
    with Proxy(s3.port, faults=[fault, fault], delay=0.1) as proxy:  # so that it is told of before it fails
        answer = send(path, s3.bucket(endpoint=proxy.endpoint), f"moment-{fault}", told.append)
        with urlopen(answer["url"]) as response:
            assert response.read() == data
        assert proxy.faults == []
    assert sum(told) == len(data) and min(told) >= 0  # what is sent again is not told of again


def test_bytes_taken_back_are_not_told_of_again() -> None:
    sent = Sent()
    told = []
    for amount in (100, -100, 60, 60):
        sent.add(amount)
        told.append(sent.news())
    assert told == [100, 0, 0, 20]


def test_a_server_that_keeps_failing_is_an_error_and_leaves_no_parts(s3: S3Server, tmp_path: Path) -> None:
    path = tmp_path / "result.mp4"
    path.write_bytes(os.urandom(PART + 1000))

    class OnlyParts(list[int]):
        """Every part fails; what begins and gives up the upload does not."""

        def __bool__(self) -> bool:
            return bool(proxy.requests) and "partNumber=" in proxy.requests[-1]

        def pop(self, index: Any = -1) -> int:
            return 500

    with Proxy(s3.port) as proxy:
        proxy.faults = OnlyParts()
        bucket = s3.bucket(endpoint=proxy.endpoint, attempts=2)
        message = refused("deliver_failed", lambda: send(path, bucket, "failing"))
    assert "answers 500" in message
    assert "Contents" not in s3.client().list_objects_v2(Bucket=NAME, Prefix="failing/")
    assert "Uploads" not in s3.client().list_multipart_uploads(Bucket=NAME)


def test_wrong_keys_are_told_without_being_shown(s3: S3Server, result: Path) -> None:
    with s3.checking_keys():
        for wrong in ({"access_key": SecretStr(SECRET)}, {"secret_key": SecretStr(SECRET)}):
            message = refused("deliver_denied", lambda: send(result, s3.bucket(**wrong)))  # noqa: B023
            assert "BUCKET_SECRET_ACCESS_KEY" in message
            assert s3.keys["SecretAccessKey"] not in message and s3.keys["AccessKeyId"] not in message
        assert send(result, s3.bucket(), "right-keys")["kind"] == "bucket"


def test_a_bucket_that_is_not_there_is_named(s3: S3Server, result: Path) -> None:
    message = refused("deliver_bucket_missing", lambda: send(result, s3.bucket(name="other-bucket")))
    assert "other-bucket" in message


def test_a_server_that_is_down_is_unreachable(s3: S3Server, result: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        bucket = s3.bucket(endpoint=f"http://127.0.0.1:{unused.getsockname()[1]}", attempts=2)
        message = refused("deliver_unreachable", lambda: send(result, bucket))
    assert bucket.host in message


def test_an_object_of_another_size_is_no_success(s3: S3Server, result: Path) -> None:
    """A server that takes the bytes and drops them: the answer to the look afterwards decides."""

    class Dropping(list[int]):
        def __bool__(self) -> bool:
            return proxy.requests[-1].startswith("PUT")

        def pop(self, index: Any = -1) -> int:
            return 200

    with Proxy(s3.port) as proxy:
        proxy.faults = Dropping()
        bucket = s3.bucket(endpoint=proxy.endpoint)
        s3.client().put_object(Bucket=NAME, Key="dropped/result.mp4", Body=b"short")
        message = refused("deliver_failed", lambda: send(result, bucket, "dropped"))
        assert "5 bytes of the result's 100,000" in message
        refused("deliver_bucket_missing", lambda: send(result, bucket, "dropped-too"))


def test_an_upload_can_be_stopped(s3: S3Server, tmp_path: Path) -> None:
    path = tmp_path / "result.mp4"
    path.write_bytes(os.urandom(10 * PART))
    begin = time.monotonic()

    def stop(_: int) -> None:
        if any("partNumber=" in request for request in proxy.requests):
            raise JobStopped("job_cancelled", "The job was cancelled.")

    with Proxy(s3.port, delay=0.2) as proxy:
        bucket = s3.bucket(endpoint=proxy.endpoint)
        refused("job_cancelled", lambda: send(path, bucket, "stopped", stop), JobStopped)
    assert time.monotonic() - begin < 5
    assert "Contents" not in s3.client().list_objects_v2(Bucket=NAME, Prefix="stopped/")
    assert "Uploads" not in s3.client().list_multipart_uploads(Bucket=NAME)


def test_a_bucket_takes_any_size(s3: S3Server) -> None:
    check_delivery(10**15, DeliverySettings(bucket=s3.bucket(), inline_bytes=1))


# ------------------------------------------------------------------ settings


AWS, B2 = "s3.eu-west-1.amazonaws.com", "s3.us-west-004.backblazeb2.com"
R2, SPACES = "abc.r2.cloudflarestorage.com", "ams3.digitaloceanspaces.com"


@pytest.mark.parametrize(
    ("endpoint", "name", "base", "region"),
    [
        # RunPod's documented form: the name in the host
        (f"https://clips.{AWS}", None, f"https://{AWS}", "eu-west-1"),
        (f"https://clips.{AWS}/", "clips", f"https://{AWS}", "eu-west-1"),
        (f"https://clips.{SPACES}", None, f"https://{SPACES}", "ams3"),
        # the name in the path
        (f"https://{AWS}/clips", None, f"https://{AWS}", "eu-west-1"),
        (f"https://{B2}/clips/", None, f"https://{B2}", "us-west-004"),
        (f"https://{SPACES}/clips/", None, f"https://{SPACES}", "ams3"),
        (f"https://{R2}/clips", None, f"https://{R2}", "us-east-1"),
        ("http://minio:9000/clips", None, "http://minio:9000", "us-east-1"),
        ("http://127.0.0.1:9000/clips", "clips", "http://127.0.0.1:9000", "us-east-1"),
        # the name apart
        ("http://minio:9000", "clips", "http://minio:9000", "us-east-1"),
        ("https://s3.amazonaws.com", "clips", "https://s3.amazonaws.com", "us-east-1"),
        ("https://abc.example/storage/v1/s3", "clips", "https://abc.example/storage/v1/s3", "us-east-1"),
    ],
)
def test_where_the_bucket_and_its_name_are(endpoint: str, name: str | None, base: str, region: str) -> None:
    bucket = bucket_of(endpoint, SecretStr("a"), SecretStr(SECRET), name=name, prefix="/x/")
    assert bucket is not None
    assert (bucket.endpoint, bucket.name, bucket.region) == (base, "clips", region)
    assert bucket.prefix == "x"
    assert SECRET not in repr(bucket)


def test_a_region_that_is_named_wins() -> None:
    bucket = bucket_of("http://minio:9000/clips", SecretStr("a"), SecretStr("b"), region="garage")
    assert bucket is not None and bucket.region == "garage"


@pytest.mark.parametrize(
    ("endpoint", "key", "secret", "code", "part"),
    [
        ("http://minio:9000/clips", None, "b", "deliver_bucket_incomplete", "BUCKET_ACCESS_KEY_ID is not"),
        ("http://minio:9000/clips", "a", "", "deliver_bucket_incomplete", "BUCKET_SECRET_ACCESS_KEY is"),
        (None, "a", SECRET, "deliver_bucket_incomplete", "BUCKET_ENDPOINT_URL is not"),
        ("http://minio:9000", "a", "b", "deliver_bucket_unnamed", "minio:9000"),
        ("https://s3.amazonaws.com", "a", "b", "deliver_bucket_unnamed", "SEEDPOD_BUCKET"),
        ("http://minio:9000/a", "a", "b", "deliver_bucket_unnamed", "found: a"),
        ("minio:9000/clips", "a", "b", "deliver_bucket_endpoint", "https://host/bucket"),
        (f"https://u:{SECRET}@host/clips", "a", "b", "deliver_bucket_endpoint", "https://host/bucket"),
        (f"https://host/clips?sig={SECRET}", "a", "b", "deliver_bucket_endpoint", "https://host/bucket"),
        ("https://host:port/clips", "a", "b", "deliver_bucket_endpoint", "https://host/bucket"),
        ("https://[::1/clips", "a", "b", "deliver_bucket_endpoint", "https://host/bucket"),
    ],
)
def test_half_a_bucket_is_a_mistake(
    endpoint: str | None, key: str | None, secret: str, code: str, part: str
) -> None:
    keys = (SecretStr(key) if key is not None else None, SecretStr(secret))
    assert part in refused(code, lambda: bucket_of(endpoint, *keys), ConfigError)


def test_no_bucket_is_no_mistake() -> None:
    assert bucket_of(None, None, None) is None
    assert bucket_of("", SecretStr(""), SecretStr(""), name="clips") is None
