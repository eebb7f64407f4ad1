"""An S3-compatible bucket: which one the settings mean, uploads to it, and links to what is there.

boto3 is imported when something is uploaded, as it costs a third of a second. No key, no signature and no
query of the endpoint is ever put in a message.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from pydantic import SecretStr

from app.errors import ConfigError, UnavailableError

PART: Final = 8 << 20  # bytes; larger files go up in parts of this size, several at once
PARTS_AT_ONCE: Final = 4
POLL: Final = 0.05  # seconds between two looks at a running upload
LONGEST_LINK: Final = 7 * 24 * 3600  # seconds: the protocol allows no more
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{1,62}", re.IGNORECASE)
# Hosts that begin with the name of the bucket: what comes after it.
_IN_HOST: Final = re.compile(r"(?P<bucket>[^.]+)\.(?P<rest>s3[.-].+|[a-z0-9-]+\.digitaloceanspaces\.com)")
_REGION: Final = re.compile(r"(?:^|\.)s3[.-]([a-z]+-[a-z0-9-]+)\.|^([a-z0-9]+)\.digitaloceanspaces\.com$")


@dataclass(frozen=True)
class Bucket:
    """A bucket called `name` at `endpoint`, which does not hold the name. Keys begin with `prefix`;
    links hold for `link_seconds`; a request is tried `attempts` times."""

    endpoint: str
    name: str
    region: str
    access_key: SecretStr
    secret_key: SecretStr
    prefix: str = ""
    link_seconds: int = LONGEST_LINK
    attempts: int = 5

    @property
    def host(self) -> str:
        return urlsplit(self.endpoint).netloc


def bucket_of(
    endpoint: str | None,
    access_key: SecretStr | None,
    secret_key: SecretStr | None,
    *,
    name: str | None = None,
    region: str | None = None,
    prefix: str = "",
    link_seconds: int = LONGEST_LINK,
) -> Bucket | None:
    """The bucket that the settings mean, or None if they mean none.

    Without `name`, it is taken from the endpoint: the first part of its path (https://host/bucket), or of
    its host (https://bucket.s3.region.amazonaws.com), as RunPod's own helper has it. The region is read
    from the host where it stands there.

    Raises:
        ConfigError: `deliver_bucket_incomplete`, `deliver_bucket_endpoint`, `deliver_bucket_unnamed`.
    """
    given = {
        "BUCKET_ENDPOINT_URL": endpoint,
        "BUCKET_ACCESS_KEY_ID": access_key,
        "BUCKET_SECRET_ACCESS_KEY": secret_key,
    }
    missing = [key for key, value in given.items() if not value]
    if len(missing) == len(given):
        return None
    if not endpoint or not access_key or not secret_key:
        raise ConfigError(
            "deliver_bucket_incomplete",
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set, and the rest of "
            f"{', '.join(given)} is; expected all three, or none to deliver without a bucket.",
        )
    base, found = _taken_apart(endpoint, name)
    if found is None or not _NAME.fullmatch(found):
        raise ConfigError(
            "deliver_bucket_unnamed",
            f"BUCKET_ENDPOINT_URL, at {urlsplit(base).netloc}, does not say the bucket's name (found: "
            f"{found}); expected https://host/bucket. Add it there, or set SEEDPOD_BUCKET.",
        )
    match = _REGION.search(urlsplit(base).hostname or "")
    region = region or (match[1] or match[2] if match else "us-east-1")
    return Bucket(base, found, region, access_key, secret_key, prefix.strip("/"), link_seconds)


def _taken_apart(endpoint: str, name: str | None) -> tuple[str, str | None]:
    """The endpoint without the bucket's name, and that name."""
    try:
        parts = urlsplit(endpoint.strip())
        host, path, _ = parts.hostname or "", parts.path.strip("/"), parts.port
    except ValueError:
        parts, host, path = urlsplit(""), "", ""
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc or parts.query:
        raise ConfigError(
            "deliver_bucket_endpoint",
            "BUCKET_ENDPOINT_URL is not shown, as it may hold a secret; expected https://host/bucket, "
            "without user, password and query.",
        )
    match = _IN_HOST.fullmatch(parts.netloc)
    if match is not None and name in (None, match["bucket"]):
        return f"{parts.scheme}://{match['rest']}", match["bucket"]
    top = f"{parts.scheme}://{parts.netloc}"
    if name is None:
        name, _, path = path.partition("/")
    elif path == name:
        path = ""
    return f"{top}/{path}" if path else top, name or None


def upload(
    path: Path,
    job_id: str,
    bucket: Bucket,
    content_type: str,
    sha256: str,
    on_bytes: Callable[[int], None],
) -> str:
    """Upload the file at `path`, look whether it is there, and return a link to it.

    `on_bytes` is called in this thread all along, and may raise to stop.

    Raises:
        UnavailableError: `deliver_bucket_missing`, `deliver_denied`, `deliver_unreachable`,
            `deliver_failed`. Nothing is left at the bucket then but what it itself may keep.
    """
    key = "/".join(part for part in (bucket.prefix, job_id, path.name) if part)
    size = path.stat().st_size
    errors: Any = import_module("botocore.exceptions")
    try:
        client = _client(bucket)
        extra = {"ContentType": content_type, "Metadata": {"sha256": sha256}}
        _send(client, path, bucket.name, key, extra, on_bytes)
        stored = client.head_object(Bucket=bucket.name, Key=key)["ContentLength"]
        where = {"Bucket": bucket.name, "Key": key}
        link = client.generate_presigned_url("get_object", Params=where, ExpiresIn=bucket.link_seconds)
    except errors.ClientError as error:
        raise _refused(bucket, error.response) from None
    except (errors.ConnectionError, errors.HTTPClientError) as error:
        raise _unreachable(bucket, error) from None
    except errors.BotoCoreError as error:  # its text may hold the request
        raise _failed(bucket, type(error).__name__) from None
    if stored != size:
        raise _failed(bucket, f"it holds {stored:,} bytes of the result's {size:,}")
    return str(link)


def _client(bucket: Bucket) -> Any:
    config = import_module("botocore.config").Config(
        signature_version="s3v4",
        s3={"addressing_style": "path"},  # what every S3-compatible server knows
        # Checksums of AWS's own kind are refused by others; the size is looked at, TLS does the rest.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        connect_timeout=10,
        read_timeout=60,
        retries={"total_max_attempts": bucket.attempts, "mode": "standard"},  # waits twice as long each time
        max_pool_connections=2 * PARTS_AT_ONCE,
    )
    return (
        import_module("boto3")
        .session.Session()
        .client(
            "s3",
            endpoint_url=bucket.endpoint,
            region_name=bucket.region,
            aws_access_key_id=bucket.access_key.get_secret_value(),
            aws_secret_access_key=bucket.secret_key.get_secret_value(),
            config=config,
        )
    )


def _send(
    client: Any, path: Path, bucket: str, key: str, extra: dict[str, Any], on_bytes: Callable[[int], None]
) -> None:
    """Upload in threads of the library's; leaving by an exception ends them, and removes sent parts."""
    transfer: Any = import_module("boto3.s3.transfer")
    config = transfer.TransferConfig(
        multipart_threshold=PART,
        multipart_chunksize=PART,
        max_concurrency=PARTS_AT_ONCE,
        preferred_transfer_client="classic",
    )
    sent = Sent()
    with transfer.create_transfer_manager(client, config) as manager:
        told = transfer.ProgressCallbackInvoker(sent.add)
        future = manager.upload(str(path), bucket, key, extra_args=extra, subscribers=[told])
        while not future.done():
            time.sleep(POLL)
            on_bytes(sent.news())
        future.result()
    on_bytes(sent.news())


class Sent:
    """Bytes that several threads send. A try that failed is taken back, and comes again: `news` tells
    only what is more than ever before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sent, self._told = 0, 0

    def add(self, amount: int) -> None:
        with self._lock:
            self._sent += amount

    def news(self) -> int:
        with self._lock:
            more = max(0, self._sent - self._told)
            self._told += more
            return more


# ------------------------------------------------------------------ what can go wrong


def _refused(bucket: Bucket, response: Mapping[str, Any]) -> UnavailableError:
    """The error for an answer of the bucket's, of which only code and status are repeated."""
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    said = re.sub(r"[^A-Za-z0-9]", "", str(response.get("Error", {}).get("Code", "")))[:60]
    answer = f"{bucket.host} answers {status} {said if said != str(status) else ''}".rstrip()
    if said == "NoSuchBucket" or (status == 404 and said != "NoSuchUpload"):
        return UnavailableError(
            "deliver_bucket_missing",
            f"The result cannot be uploaded: {answer} for the bucket {bucket.name}; expected one that "
            "exists. Create it, or correct SEEDPOD_BUCKET or the end of BUCKET_ENDPOINT_URL.",
        )
    if status in (401, 403):
        return UnavailableError(
            "deliver_denied",
            f"The result cannot be uploaded: {answer} for the bucket {bucket.name}; expected keys that may "
            "write and read there. Check BUCKET_ACCESS_KEY_ID, BUCKET_SECRET_ACCESS_KEY and the bucket's "
            "policy.",
        )
    return _failed(bucket, answer)


def _failed(bucket: Bucket, why: str) -> UnavailableError:
    return UnavailableError(
        "deliver_failed",
        f"The result was not delivered to the bucket {bucket.name} at {bucket.host}: {why}; expected the "
        "whole file to be there. Send the job again, and look at the bucket's own log if that repeats.",
    )


def _unreachable(bucket: Bucket, error: Exception) -> UnavailableError:
    what = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
    return UnavailableError(
        "deliver_unreachable",
        f"The result cannot be uploaded to {bucket.host}: {what}, in up to {bucket.attempts} tries; expected "
        "a server that answers. Check BUCKET_ENDPOINT_URL and the network, and send the job again.",
    )
