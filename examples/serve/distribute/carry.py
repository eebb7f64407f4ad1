"""How a piece reaches a worker, and its result comes back. Knows nothing of parts or endpoints."""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol

from pydantic import SecretStr

from app.errors import FileError, UnavailableError, UsageError
from app.job.bucket import Bucket, bucket_of

INLINE_BYTES: Final = 7_000_000  # of a file: base64 is a third more, and the platform takes requests of 10 MB
LINK_SECONDS: Final = 24 * 3600
TRIES: Final = 3


class Carrier(Protocol):
    """Puts a file where workers can get it."""

    def sent(self, path: Path) -> AbstractContextManager[dict[str, str]]:
        """A context with the `source` of a job; what was put anywhere is removed when it ends."""


class InlineCarrier:
    """In the request itself."""

    @contextmanager
    def sent(self, path: Path) -> Iterator[dict[str, str]]:
        size = path.stat().st_size
        if size > INLINE_BYTES:
            raise UsageError(
                "piece_too_large",
                f"A piece of the film has {size:,} bytes, and a request takes {INLINE_BYTES:,}; make pieces "
                "shorter with --part-seconds, or name a bucket (BUCKET_ENDPOINT_URL, BUCKET_ACCESS_KEY_ID, "
                "BUCKET_SECRET_ACCESS_KEY) or a folder that the workers read (--input-folder).",
            )
        yield {"base64": base64.b64encode(path.read_bytes()).decode()}


class FolderCarrier:
    """In the folder that the workers have mounted as SEEDPOD_INPUT."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def sent(self, path: Path) -> Iterator[dict[str, str]]:
        name = f"{secrets.token_hex(8)}-{path.name}"
        try:
            shutil.copyfile(path, self._root / name)
            yield {"path": name}
        finally:
            (self._root / name).unlink(missing_ok=True)


class BucketCarrier:
    """In an S3-compatible bucket, behind a signed link. boto3 comes with runpod."""

    def __init__(self, bucket: Bucket) -> None:
        config = import_module("botocore.config").Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},  # what every S3-compatible server knows
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        self._bucket = bucket
        self._client: Any = import_module("boto3").client(
            "s3",
            endpoint_url=bucket.endpoint,
            region_name=bucket.region,
            aws_access_key_id=bucket.access_key.get_secret_value(),
            aws_secret_access_key=bucket.secret_key.get_secret_value(),
            config=config,
        )

    @contextmanager
    def sent(self, path: Path) -> Iterator[dict[str, str]]:
        exceptions: Any = import_module("botocore.exceptions")
        failed = (exceptions.BotoCoreError, exceptions.ClientError)
        key = "/".join(part for part in (self._bucket.prefix, f"{secrets.token_hex(8)}-{path.name}") if part)
        where = {"Bucket": self._bucket.name, "Key": key}
        try:
            self._client.upload_file(str(path), self._bucket.name, key)
            url = self._client.generate_presigned_url("get_object", Params=where, ExpiresIn=LINK_SECONDS)
        except (*failed, import_module("boto3.exceptions").Boto3Error) as error:
            raise _not_uploaded(self._bucket, error) from None
        try:
            yield {"url": url}
        finally:
            with suppress(*failed):
                self._client.delete_object(**where)


def _not_uploaded(bucket: Bucket, error: Exception) -> UnavailableError:
    return UnavailableError(
        "piece_not_uploaded",
        f"A piece of the film cannot be uploaded to {bucket.name} at {bucket.host}: {type(error).__name__}; "
        "check the bucket, its keys and the network.",
    )


def carrier(folder: Path | None, environ: Mapping[str, str] = os.environ) -> Carrier:
    """The carrier that is asked for: a folder, else the bucket of the environment, else none but requests.

    Raises:
        ConfigError: The bucket's settings make no sense. UsageError: `input_folder_missing`.
    """
    if folder is not None:
        if not folder.is_dir():
            raise UsageError(
                "input_folder_missing",
                f"--input-folder is {folder}, which is no folder; expected the one that the workers have "
                "mounted as SEEDPOD_INPUT.",
            )
        return FolderCarrier(folder)
    key, secret = (environ.get(f"BUCKET_{name}") for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"))
    bucket = bucket_of(
        environ.get("BUCKET_ENDPOINT_URL"),
        SecretStr(key) if key else None,
        SecretStr(secret) if secret else None,
        name=environ.get("SEEDPOD_BUCKET"),
        region=environ.get("SEEDPOD_BUCKET_REGION"),
    )
    return BucketCarrier(bucket) if bucket else InlineCarrier()


def fetch_result(result: Mapping[str, Any], target: Path, output_folder: Path | None) -> None:
    """The file of a job's `result`, at `target`; whole, or not there at all.

    Raises:
        UnavailableError: `result_unreachable`, `result_damaged`. UsageError: `output_folder_unknown`.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        match result["kind"]:
            case "inline":
                partial.write_bytes(base64.b64decode(result["base64"]))
            case "bucket":
                _again(lambda: _download(result["url"], partial))
            case _:
                shutil.copyfile(_place(result["path"], output_folder), partial)
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != result["sha256"]:
            raise UnavailableError(
                "result_damaged", f"A result of {result['bytes']:,} bytes came back changed."
            )
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


def _place(path: str, output_folder: Path | None) -> Path:
    if output_folder is None:
        raise UsageError(
            "output_folder_unknown",
            "The workers leave results in their output folder; name that folder, as it is seen here, with "
            "--output-folder.",
        )
    place = output_folder / path
    if not place.resolve().is_relative_to(output_folder.resolve()) or not place.is_file():
        raise FileError(
            "result_not_found",
            f"A result should be {path} under {output_folder}, and is not; expected the folder that the "
            "workers have mounted as SEEDPOD_OUTPUT.",
        )
    return place


def _download(url: str, path: Path) -> None:
    if not url.startswith(("http://", "https://")):
        raise OSError("it is no http link")
    with urllib.request.urlopen(url, timeout=60) as answer, path.open("wb") as file:
        shutil.copyfileobj(answer, file, 1 << 20)


def _again(work: Callable[[], None]) -> None:
    for attempt in range(TRIES):
        try:
            return work()
        except OSError as error:
            if attempt + 1 == TRIES:
                why = type(error).__name__
                raise UnavailableError(
                    "result_unreachable", f"A result cannot be downloaded: {why}."
                ) from None
        time.sleep(2**attempt)
    return None
