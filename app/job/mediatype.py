"""Media types and suffixes of clips, images and results: one table, both ways.

A suffix or type is what somebody claims. What a file really is, app/video/probe.py finds out.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Final

TYPES: Final = {
    ".mp4": "video/mp4", ".m4v": "video/x-m4v", ".mov": "video/quicktime", ".mkv": "video/x-matroska",
    ".webm": "video/webm", ".avi": "video/x-msvideo", ".ts": "video/mp2t", ".mpg": "video/mpeg",
    ".flv": "video/x-flv", ".wmv": "video/x-ms-wmv", ".ogv": "video/ogg", ".3gp": "video/3gpp",
    ".mxf": "application/mxf",
    ".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif",
    ".bmp": "image/bmp", ".tif": "image/tiff",
    ".zip": "application/zip", ".json": "application/json",
}  # fmt: skip
_ALIASES: Final = {".jpeg": ".jpg", ".tiff": ".tif", ".mpeg": ".mpg", ".m2ts": ".ts", ".mts": ".ts"}
_SUFFIXES: Final = {kind: suffix for suffix, kind in TYPES.items() if suffix not in (".zip", ".json")}
_UNNAMED: Final = "application/octet-stream"
# What servers say of a file they know nothing of, and of containers that hold more than video.
_ANYTHING: Final = frozenset(
    {_UNNAMED, "binary/octet-stream", "application/x-download", "application/force-download",
     "application/download", "application/mp4", "application/ogg", "application/mxf",
     "application/x-matroska"}
)  # fmt: skip
_NOT_PICTURES: Final = frozenset({"image/svg+xml", "video/mpegurl", "video/x-mpegurl"})  # pages that link on


def type_of(name: str) -> str:
    """The media type of a file called `name`."""
    suffix = PurePosixPath(name).suffix.lower()
    return TYPES.get(_ALIASES.get(suffix, suffix), _UNNAMED)


def plain_type(header: str | None) -> str:
    """`video/mp4` of a Content-Type header such as `Video/MP4; charset=x`; "" without one."""
    return (header or "").partition(";")[0].strip().lower()


def may_be_media(kind: str) -> bool:
    """Whether what is of type `kind` ("" is unknown) can be a clip or an image."""
    if not kind or kind in _ANYTHING:
        return True
    return kind.startswith(("video/", "image/")) and kind not in _NOT_PICTURES


def safe_suffix(kind: str, name: str = "") -> str:
    """A suffix from our own table for a source of type `kind` that was called `name`; else ""."""
    if kind in _SUFFIXES:
        return _SUFFIXES[kind]
    suffix = PurePosixPath(name).suffix.lower()
    suffix = _ALIASES.get(suffix, suffix)
    return suffix if suffix in _SUFFIXES.values() else ""
