"""Delivering a result: to a bucket if one is configured, else to the mounted output folder, else inline.

Never a result that is not where it is said to be: what cannot be delivered is an error. Knows nothing of
jobs but their id; the bucket's protocol is in bucket.py.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.filesize import decimal

from app.errors import FileError, InputError, UsageError, is_full
from app.job.bucket import Bucket, upload
from app.job.mediatype import type_of

BLOCK: Final = 4 << 20  # bytes
_JOB_ID: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")  # no slash, and not . or ..


@dataclass(frozen=True)
class DeliverySettings:
    """Where results go: the first of `bucket` and `output_root` that is set, else inline up to
    `inline_bytes` of the file (a third more in base64). RunPod takes 10 MB for run, 20 MB for runsync."""

    bucket: Bucket | None = None
    output_root: Path | None = None
    inline_bytes: int = 7_000_000


def check_delivery(expected_bytes: int | None, how: DeliverySettings) -> None:
    """Refuse before the work what could not be delivered after it. `expected_bytes` is what the result
    will have at least, where that is known.

    Raises:
        InputError: `deliver_too_large`: it does not fit inline.
        FileError: `deliver_no_folder`, `deliver_no_room`.
    """
    if how.bucket is not None:
        return
    if how.output_root is None:
        if expected_bytes is not None:
            _check_inline(expected_bytes, how.inline_bytes, "will have at least")
        return
    if not (os.access(how.output_root, os.W_OK | os.X_OK) and how.output_root.is_dir()):
        raise FileError(
            "deliver_no_folder",
            "The output folder is not there or may not be written to; expected a mounted folder that the "
            "worker's user may write to. Check SEEDPOD_OUTPUT, the mount and its owner.",
        )
    free = shutil.disk_usage(how.output_root).free
    if expected_bytes is not None and expected_bytes > free:
        raise FileError(
            "deliver_no_room",
            f"The result will have at least {decimal(expected_bytes)}, and the output folder has "
            f"{decimal(free)} free. Make room there, or ask for a smaller result.",
        )


def deliver(
    path: Path, job_id: str, how: DeliverySettings, on_bytes: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """Deliver the file at `path` as the result of `job_id`; returns where it is:

    `kind` ("bucket", "path" or "inline"), with it `url`, `path` (relative to the output folder) or
    `base64`, and `bytes`, `sha256`, `content_type`. The same file delivered again changes nothing.

    `on_bytes` is told of bytes as they leave, in the calling thread; it is called with 0 while nothing
    moves, and may raise to stop.

    Raises:
        InputError: `deliver_too_large`. UsageError: `deliver_job_id`.
        FileError: `deliver_no_folder`, `deliver_no_room`, `deliver_exists`, `deliver_failed`.
        UnavailableError: `deliver_bucket_*`, `deliver_denied`, `deliver_unreachable`, `deliver_failed`.
    """
    if not _JOB_ID.fullmatch(job_id):
        raise UsageError(
            "deliver_job_id",
            f"The job's id is {job_id[:128]!r}; expected at most 128 letters, digits, dots, hyphens and "
            "underscores, as its result is filed under it.",
        )
    size, content_type = path.stat().st_size, type_of(path.name)
    if how.bucket is None and how.output_root is None:
        _check_inline(size, how.inline_bytes, "has")
    sha256 = _sha256(path, on_bytes)
    told = {"bytes": size, "sha256": sha256, "content_type": content_type}
    if how.bucket is not None:
        url = upload(path, job_id, how.bucket, content_type, sha256, on_bytes)
        return {"kind": "bucket", "url": url, **told}
    if how.output_root is not None:
        place = _store(path, job_id, how.output_root, sha256, on_bytes)
        return {"kind": "path", "path": place, **told}
    on_bytes(size)
    return {"kind": "inline", "base64": base64.b64encode(path.read_bytes()).decode(), **told}


def _check_inline(size: int, limit: int, has: str) -> None:
    if size > limit:
        raise InputError(
            "deliver_too_large",
            f"The result {has} {size:,} bytes ({decimal(size)}), and {limit:,} ({decimal(limit)}) is the "
            "limit for a result inside the answer. Configure a bucket (BUCKET_ENDPOINT_URL, "
            "BUCKET_ACCESS_KEY_ID, BUCKET_SECRET_ACCESS_KEY) or an output folder (SEEDPOD_OUTPUT), or ask "
            "for a smaller size or lower quality.",
        )


def _sha256(path: Path, on_bytes: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            on_bytes(0)
    return digest.hexdigest()


# ------------------------------------------------------------------ output folder


def _store(path: Path, job_id: str, root: Path, sha256: str, on_bytes: Callable[[int], None]) -> str:
    """Copy `path` to `<root>/<job_id>/<name>`, whole or not at all; returns that, relative to `root`."""
    check_delivery(None, DeliverySettings(output_root=root))
    name = f"{job_id}/{path.name}"
    target = root / name
    try:
        if not target.parent.exists():
            target.parent.mkdir()
            _give(target.parent, root)
        if not target.parent.resolve().is_relative_to(root.resolve()):
            raise FileError(
                "deliver_failed",
                f"{job_id} in the output folder is a link that leaves it; expected a folder, or nothing. "
                "Remove the link.",
            )
        if not os.path.lexists(target):
            _copy(path, target, root, on_bytes)
        _check_same(target, name, sha256)
    except OSError as error:
        full = is_full(error)
        raise FileError(
            "deliver_no_room" if full else "deliver_failed",
            f"The result cannot be written to {name} in the output folder: {error.strerror or 'it failed'}. "
            f"{'Make room there' if full else 'Check the mount and its owner'}, and send the job again.",
        ) from None
    return name


def _check_same(target: Path, name: str, sha256: str) -> None:
    """What lies at `target`, from now or before, must be the result."""
    if target.is_symlink() or not target.is_file() or _sha256(target, lambda _: None) != sha256:
        raise FileError(
            "deliver_exists",
            f"{name} is in the output folder already, and is another file; it is left as it is. Move it "
            "away, or send the job under another id.",
        )


def _copy(path: Path, target: Path, root: Path, on_bytes: Callable[[int], None]) -> None:
    """A temporary name, which becomes `target` when all is on the disk, unless that name is taken."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        with path.open("rb") as source, temporary.open("xb") as file:
            while block := source.read(BLOCK):
                file.write(block)
                on_bytes(len(block))
            file.flush()
            os.fsync(file.fileno())
        _give(temporary, root)
        try:
            target.hardlink_to(temporary)
        except FileExistsError:  # another worker was faster: what it brought is compared
            return
        except OSError:  # no hard links there: this look is all there is against a race
            if not os.path.lexists(target):
                temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)


def _give(path: Path, root: Path) -> None:
    """Give what root made to the owner of the mounted folder, who could not even delete it otherwise."""
    if os.geteuid() == 0:
        owner = root.stat()
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
