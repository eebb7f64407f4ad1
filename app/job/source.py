"""The source of a job: a URL, base64 or a path under the mounted input folder, made a local file.

A message names what the caller gave, never a folder of the container. What is in the file is not looked
at here: app/video/probe.py does that.
"""

from __future__ import annotations

import binascii
import errno
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from app.errors import FileError, InputError
from app.job.download import Network, check_size, download, new_source, not_stored
from app.job.download import SourceLimits as SourceLimits
from app.job.mediatype import may_be_media, plain_type, safe_suffix

_BLOCK: Final = 1 << 20  # characters of base64 decoded at once; a multiple of four


class MediaUrl(BaseModel):
    """A clip or image that anyone with the link can download."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(
        min_length=1,
        max_length=8192,
        description="An http or https link to the file itself, on the public internet. Signed links do.",
        examples=["https://example.com/clip.mp4"],
    )


class MediaBase64(BaseModel):
    """A clip or image in the request itself, for small ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base64: str = Field(
        min_length=1,
        repr=False,
        description="The file in base64; a `data:` URL is taken too, and white space is skipped.",
        examples=["iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="],
    )  # fmt: skip


class MediaPath(BaseModel):
    """A clip or image in the folder that is mounted for input."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(
        min_length=1,
        max_length=4096,
        description="Path of the file, relative to the mounted input folder and never outside of it.",
        examples=["holiday/clip.mp4"],
    )


def _tag(value: Any) -> str | None:
    """Which of the three `value` is; None if that is not clear."""
    for name, model in (("url", MediaUrl), ("base64", MediaBase64), ("path", MediaPath)):
        if isinstance(value, model):
            return name
    names = [name for name in ("url", "base64", "path") if isinstance(value, Mapping) and name in value]
    return names[0] if len(names) == 1 else None


Media = Annotated[
    Annotated[MediaUrl, Tag("url")]
    | Annotated[MediaBase64, Tag("base64")]
    | Annotated[MediaPath, Tag("path")],
    Discriminator(
        _tag,
        custom_error_type="media_kind",
        custom_error_message="expected an object with exactly one of url, base64, path",
    ),
]


def fetch_source(
    media: Media,
    folder: Path,
    limits: SourceLimits,
    input_root: Path | None,
    cancel: Callable[[], None],
    network: Network | None = None,
) -> Path:
    """A local file with the bytes of `media`: in `folder`, with a name of our own, or where it lies under
    `input_root`. The limits are for what is sent; what is mounted is not copied, and may be of any size.

    `cancel` is called all along and may raise to stop. Whatever is raised, nothing is left in `folder`.

    Raises:
        InputError, UnavailableError, FileError: `source_*`; see `download` for those of a URL.
    """
    match media:
        case MediaUrl():
            return download(media.url, folder, limits, cancel, network or Network())
        case MediaBase64():
            return _decoded(media.base64, folder, limits, cancel)
        case MediaPath():
            return _mounted(media.path, input_root)


# ------------------------------------------------------------------ base64


def _decoded(text: str, folder: Path, limits: SourceLimits, cancel: Callable[[], None]) -> Path:
    kind, text = _without_prefix(text)
    text = "".join(text.split())
    check_size(len(text) // 4 * 3 - text[-2:].count("="), limits.bytes)
    if not text:
        raise InputError("source_empty", "base64 holds no bytes; expected a video or image.")
    if len(text) % 4 or "=" in text[:-2]:  # what decoding in blocks would not notice
        raise _not_base64("it is cut short, or joined of several")
    file, path = new_source(folder)
    try:
        with file:
            for begin in range(0, len(text), _BLOCK):
                cancel()
                file.write(binascii.a2b_base64(text[begin : begin + _BLOCK], strict_mode=True))
    except BaseException as error:
        path.unlink()
        if isinstance(error, ValueError):  # binascii.Error is one, and so is a character beyond ASCII
            raise _not_base64("it holds other characters") from None
        raise not_stored(error) if isinstance(error, OSError) else error from None
    return path.rename(path.with_suffix(safe_suffix(kind)))


def _without_prefix(text: str) -> tuple[str, str]:
    """The media type that a `data:` URL says ("" without one), and its base64."""
    text = text.lstrip()
    if text[:5].lower() != "data:":
        return "", text
    prefix, comma, rest = text[5:].partition(",")
    if not comma or not prefix.lower().endswith(";base64"):
        raise _not_base64("its data: URL does not say ;base64, before the data")
    kind = plain_type(prefix)
    if not may_be_media(kind):
        raise InputError(
            "source_wrong_type",
            f"The data: URL says {kind[:60]!r}; expected a video or image. Send the file.",
        )
    return kind, rest


def _not_base64(why: str) -> InputError:
    return InputError(
        "source_base64_invalid",
        f"base64 cannot be decoded: {why}; expected A-Z, a-z, 0-9, + and /, with = to a multiple of four "
        "characters. Encode the file anew, all of it.",
    )


# ------------------------------------------------------------------ path


def _mounted(path: str, root: Path | None) -> Path:
    """The regular file at `path` under `root`."""
    parts = PurePosixPath(path).parts
    if "\0" in path or path.startswith("/") or ".." in parts:
        raise _outside(path)
    try:
        if root is None or not root.is_dir():
            raise InputError(
                "source_no_input_folder",
                "path was given, and no input folder is mounted on this worker; expected url or base64. Or "
                "mount a folder and name it in SEEDPOD_INPUT.",
            )
        top = root.resolve(strict=True)
        real = (top / path).resolve(strict=True)
        if not real.is_relative_to(top):
            raise _outside(path)
        _check_regular(path, real.stat())  # before it is opened, which a device may not like
        _check_regular(path, _status_without_links(top, real.relative_to(top).parts))
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise _unreadable(path, error) from None
    return real


def _check_regular(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        raise InputError("source_path_not_file", f"path {path[:200]!r} is {what}; expected a file: name one.")
    if status.st_size == 0:
        raise InputError("source_empty", f"path {path[:200]!r} is an empty file; expected a video or image.")


def _status_without_links(top: Path, parts: tuple[str, ...]) -> os.stat_result:
    """What lies at `parts` below `top`, opened for reading part by part. A link in there appeared after
    the path was resolved, and is an error."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # O_NONBLOCK: a pipe does not wait
    here = os.open(top, flags)
    try:
        for part in parts:
            below = os.open(part, flags, dir_fd=here)
            os.close(here)
            here = below
        return os.fstat(here)
    finally:
        os.close(here)


def _outside(path: str) -> InputError:
    return InputError(
        "source_path_outside",
        f"path is {path[:200]!r}, which leads outside of the input folder; expected a path relative to that "
        "folder, without .. and links that leave it.",
    )


def _unreadable(path: str, error: OSError | RuntimeError) -> InputError | FileError:
    number = error.errno if isinstance(error, OSError) else errno.ELOOP
    if number == errno.ELOOP:
        return _outside(path)
    if number in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return InputError(
            "source_path_missing",
            f"path {path[:200]!r} is not in the input folder; expected a file there. Check its spelling, and "
            "what is mounted.",
        )
    reason = os.strerror(number) if number else "it cannot be opened"
    return FileError(
        "source_path_unreadable",
        f"path {path[:200]!r} cannot be read ({reason}); expected a file that the worker's user may read. "
        "Change its permissions or the user.",
    )
