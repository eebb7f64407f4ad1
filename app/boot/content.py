"""What a file is, by its first bytes, when it should be a checkpoint: and how to say so.

Downloads go wrong in few ways: a pointer instead of the file, an error page saved under its name, half
of it, another format. Each gets a code and one sentence. It reads nothing itself.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Final

from app.errors import ConfigError

LEGACY_MAGIC: Final = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6
HEAD_BYTES: Final = 4096  # how much of a file's start `refuse_other_content` wants

_POINTER: Final = b"version https://git-lfs.github.com/spec/"
_PAGE: Final = re.compile(rb"\s*(<\?xml|<!doctype|<html|<head|<body|<error|<!--)", re.IGNORECASE)
_OTHERS: Final = (
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"%PDF", "a PDF"),
)


def refuse_other_content(path: Path, format: str, head: bytes, size: int) -> None:
    """Nothing, if a file of `size` bytes that begins with `head` may be of `format`.

    Raises:
        ConfigError: `checkpoint_empty`, `_lfs_pointer`, `_html`, `_truncated`, `_corrupt`,
            `_legacy_format`, `_not_torch` or `_not_safetensors`.
    """
    if size == 0:
        raise ConfigError(
            "checkpoint_empty",
            f"{path} is empty (0 bytes); expected a {format} checkpoint: download it again.",
        )
    if head.startswith(_POINTER):
        raise _pointer(path, head)
    if _PAGE.match(head):
        raise _page(path, head, size)
    kind = _kind(head, size)
    if kind == format:
        return
    if kind == "torch":
        raise unlike(path, format, "a file of torch.save", misnamed=True)
    if kind == "safetensors":
        raise unlike(path, format, "a safetensors file", misnamed=True)
    if not head.strip(b"\0"):
        raise corrupt(path, f"it begins with {len(head):,} zero bytes, as a download never filled in")
    if head[257:262] == b"ustar" and format == "torch":
        raise ConfigError(
            "checkpoint_legacy_format",
            f"{path} is a tar archive, as torch.save wrote before version 0.1.10; expected the zip format: "
            "load it with an old torch and save it again.",
        )
    if size < 16:
        raise truncated(path, size, "no checkpoint is as small")
    if kind is None and _is_text(head):
        start = " ".join(head[:80].decode("utf-8", "replace").split())
        raise unlike(path, format, f"a text that begins with {start!r}")
    raise unlike(path, format, kind or f"data that begins with {head[:8].hex(' ')}")


def _kind(head: bytes, size: int) -> str | None:
    """ "torch", "safetensors", a phrase for something else, or None where the bytes say nothing."""
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06", LEGACY_MAGIC)):
        return "torch"
    if head[8:9] == b"{" and (head[9:10] in b'"} \n' or int.from_bytes(head[:8], "little") < size):
        return "safetensors"
    return next((phrase for magic, phrase in _OTHERS if head.startswith(magic)), None)


def _is_text(head: bytes) -> bool:
    try:
        text = head[:256].decode()
    except UnicodeDecodeError as error:
        if error.start < len(head[:256]) - 3:  # else a character cut in two
            return False
        text = head[: error.start].decode()
    return all(letter.isprintable() or letter.isspace() for letter in text)


def _pointer(path: Path, head: bytes) -> ConfigError:
    text = head.decode("utf-8", "replace")
    oid = re.search(r"oid sha256:([0-9a-f]{64})", text)
    size = re.search(r"size (\d+)", text)
    wanted = f" of {int(size[1]):,} bytes" if size else ""
    digest = f" (sha256 {oid[1]})" if oid else ""
    return ConfigError(
        "checkpoint_lfs_pointer",
        f"{path} is a Git LFS pointer to a file{wanted}{digest}, not the file: run `git lfs pull` in its "
        "repository, or download it from the hub.",
    )


def _page(path: Path, head: bytes, size: int) -> ConfigError:
    text = head.decode("utf-8", "replace")
    title = re.search(r"<(title|message|code)[^>]*>\s*(.*?)\s*<", text, re.IGNORECASE | re.DOTALL)
    says = f", which says {' '.join(html.unescape(title[2]).split())[:120]!r}" if title and title[2] else ""
    return ConfigError(
        "checkpoint_html",
        f"{path} is a web page of {size:,} bytes{says}, saved in place of the checkpoint: check the "
        "address and the token it was downloaded with, and download it again.",
    )


def unlike(path: Path, format: str, phrase: str, *, misnamed: bool = False) -> ConfigError:
    """The error for a file that is something else: `phrase` ("a gzip archive"). `misnamed`: it is a
    checkpoint, and the manifest is what may be wrong."""
    expected = "what torch.save writes" if format == "torch" else f"a {format} file"
    remedy = "correct its `format` in the manifest, or put" if misnamed else "put"
    return ConfigError(
        "checkpoint_not_torch" if format == "torch" else "checkpoint_not_safetensors",
        f"{path} is {phrase}, expected {expected}: {remedy} the published file there.",
    )


def truncated(path: Path, size: int, reason: str) -> ConfigError:
    """The error for a file of `size` bytes that ends too early."""
    return ConfigError(
        "checkpoint_truncated",
        f"{path} is cut off: it has {size:,} bytes, but {reason}; "
        "the download or copy ended early: repeat it.",
    )


def corrupt(path: Path, reason: str) -> ConfigError:
    """The error for a file of the right kind that contradicts itself."""
    return ConfigError(
        "checkpoint_corrupt",
        f"{path} is damaged: {reason}; expected the file as published: download it again.",
    )
