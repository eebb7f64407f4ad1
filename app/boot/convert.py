"""Writing the 16-bit twin of a checkpoint, which halves every later cold start.

The output is a safetensors file beside the master, with its hash next to it. Tensors stream from the
master's index through two blocks of memory, so the size of a model does not matter. Nothing is seen of
the file before it is whole: it is written under a temporary name, locked while its writer lives. It
does not know which models want the file; finding it again is `locate.py`'s business.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import torch
from torch import Tensor

from app import __version__
from app.boot.hashes import sha256_file
from app.boot.locate import converted_path
from app.boot.partial import locked_part, move_into_place, part_of, write_at_once
from app.boot.regular import open_regular
from app.boot.tensorfile import TensorEntry, TensorIndex, read_index
from app.boot.tensorread import BLOCK, DTYPES, Reader, bytes_of, cast, open_reader, refuse_overflow
from app.errors import ConfigError, FileError, UsageError
from app.progress import Progress, Silent

if TYPE_CHECKING:
    from app.boot.manifest import Format

# Rotary frequencies turn positions into angles: at 16 bits the error grows with the position.
KEPT: Final = "*.freqs"
_SPELLINGS: Final = {"bf16": "BF16", "fp16": "F16"}
_FLOATS: Final = ("F64", "F32", "F16", "BF16")
_UNKNOWN: Final = "0" * 64  # the place of the master's hash until it has been read


@dataclass(frozen=True, slots=True)
class _Output:
    """A tensor of the file to be written; `offset` counts from the end of the header."""

    entry: TensorEntry
    dtype: str
    offset: int
    nbytes: int


def convert(
    source: Path,
    format: Format,
    *,
    dtype: Literal["bf16", "fp16"] = "bf16",
    source_sha256: str | None = None,
    section: str | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write `<stem>.<dtype>.safetensors` beside `source`, and its hash in `<that name>.sha256`.

    Floating-point tensors are cast as torch casts them; integers, names and one-dimensional `*.freqs`
    stay as they are. The same master and dtype give the same bytes. The metadata names the master's hash
    and size; a file already made from this master is left as it is.

    Args:
        source_sha256: the hash the master must have, checked in the same pass; None: whatever it has.
        section: the part of a file that holds several state dicts.
        folder: where to write, for a master on a read-only volume.

    Returns:
        The path of the written, or already right, file.

    Raises:
        ConfigError: `checkpoint_hash`, `checkpoint_overflow`, and those of `read_index`.
        UsageError: `convert_needless` if nothing would be cast.
        UnavailableError: `convert_running` in another process.
        FileError: `convert_target_exists` (made by something else), `no_space`, `folder_not_writable`,
            `file_unreadable`, `file_shrank` or `write_failed`.
    """
    progress = progress or Silent()
    index = read_index(source, format, section)
    outputs = _plan(index, _SPELLINGS[dtype])
    beside = converted_path(source, dtype)
    target = folder / beside.name if folder else beside
    known = source_sha256
    if target.exists() and known is None:
        known = sha256_file(source, progress=progress)
    metadata = _metadata(index, dtype, known or _UNKNOWN)
    if _is_made(target, metadata):
        return _complete(target, source, progress)
    with locked_part(target) as part:
        if _is_made(target, metadata):  # by the process that held the lock before
            return _complete(target, source, progress)
        digest = _write(part, target, index, outputs, metadata, known, progress)
        _sidecar(target).unlink(missing_ok=True)  # first: a hash never stands beside other bytes
        move_into_place(target)
        _write_sidecar(target, digest)
    return target


def _write(
    part: int,
    target: Path,
    index: TensorIndex,
    outputs: list[_Output],
    metadata: dict[str, str],
    known: str | None,
    progress: Progress,
) -> str:
    """Write the temporary file of `target`, open as `part`, for good; returns its hash."""
    header = _header(outputs, metadata)
    _refuse_without_room(target, len(header) + sum(output.nbytes for output in outputs))
    progress.start(f"convert {index.path.name}", float(index.size), "B")
    writer = _Writer(part)
    writer.write(header)
    found = _stream(index, outputs, writer, progress)
    if known is None:
        os.pwrite(part, _header(outputs, metadata | {"source_sha256": found}), 0)
    elif found != known:
        raise ConfigError(
            "checkpoint_hash",
            f"{index.path} has the sha256 {found}, expected {known}: nothing was converted; "
            "put the published file there.",
        )
    os.fsync(part)
    progress.finish(f"wrote {target.name}")
    return writer.digest.hexdigest() if known else sha256_file(part_of(target), progress=progress)


def _plan(index: TensorIndex, dtype: str) -> list[_Output]:
    """What to write: the wider dtypes first, which keeps every tensor aligned, then in file order."""
    if not index.tensors:
        raise ConfigError(
            "checkpoint_section",
            f"{index.path} holds its tensors in sections ({', '.join(index.sections)}); expected a file "
            "that is one state dict. Leave it as it is: it is loaded section by section.",
        )
    dtypes = {name: dtype if _is_cast(entry) else entry.dtype for name, entry in index.tensors.items()}
    if all(dtypes[name] == entry.dtype for name, entry in index.tensors.items()):
        raise UsageError(
            "convert_needless", f"{index.path} holds nothing to cast to {dtype}: it can be loaded as it is."
        )
    outputs = []
    offset = 0
    sizes = {name: DTYPES[spelling].itemsize for name, spelling in dtypes.items()}
    for name, entry in sorted(index.tensors.items(), key=lambda item: (-sizes[item[0]], item[1].offset)):
        nbytes = math.prod(entry.shape) * sizes[name]
        outputs.append(_Output(entry, dtypes[name], offset, nbytes))
        offset += nbytes
    return outputs


def _is_cast(entry: TensorEntry) -> bool:
    return entry.dtype in _FLOATS and not (len(entry.shape) == 1 and fnmatchcase(entry.name, KEPT))


def _metadata(index: TensorIndex, dtype: str, source_sha256: str) -> dict[str, str]:
    section = {"section": index.section} if index.section else {}
    return {
        "format": "pt",
        "source_sha256": source_sha256,
        "source_size": str(index.size),
        "dtype": dtype,
        "producer": f"seedpod {__version__}",
        **section,
    }


def _header(outputs: list[_Output], metadata: Mapping[str, str]) -> bytes:
    """The start of a safetensors file: the length of the JSON, 8 bytes, and the JSON, padded to 8."""
    fields = {
        output.entry.name: {
            "dtype": output.dtype,
            "shape": output.entry.shape,
            "data_offsets": (output.offset, output.offset + output.nbytes),
        }
        for output in outputs
    }
    text = json.dumps({"__metadata__": metadata, **fields}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _Writer:
    """Writes a file from its start and hashes it on the way."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self.descriptor, rest) :]


class _Follower:
    """Reads a file and hashes all of it once, in order, whatever is asked for in between."""

    def __init__(self, reader: Reader, size: int, progress: Progress) -> None:
        self._reader = reader
        self._size = size
        self._progress = progress
        self._digest = hashlib.sha256()
        self._position = 0

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self._catch_up(offset)
        self._reader.read_into(buffer, offset)
        self._hash(buffer[max(self._position - offset, 0) :])

    def finish(self) -> str:
        self._catch_up(self._size)
        return self._digest.hexdigest()

    def _catch_up(self, offset: int) -> None:
        gap = memoryview(bytearray(min(BLOCK, max(offset - self._position, 0))))
        while self._position < offset:
            part = gap[: offset - self._position]
            self._reader.read_into(part, self._position)
            self._hash(part)

    def _hash(self, data: memoryview) -> None:
        self._digest.update(data)
        self._position += len(data)
        self._progress.advance(len(data))


def _stream(index: TensorIndex, outputs: list[_Output], writer: _Writer, progress: Progress) -> str:
    """Write every output's data in order; returns the hash of the master."""
    with open_reader(index.path) as reader:
        follower = _Follower(reader, index.size, progress)
        block = torch.empty(BLOCK, dtype=torch.uint8)
        for output, read in _read_ahead(reader, follower, outputs):
            written = read.numel() * DTYPES[output.dtype].itemsize
            memory = block[:written] if written <= BLOCK else torch.empty(written, dtype=torch.uint8)
            tensor = memory.view(DTYPES[output.dtype])
            if read.is_contiguous():
                cast(output.entry.name, read.view(-1), tensor)
            else:
                tensor.view(read.shape).copy_(read)
                refuse_overflow(output.entry.name, read, tensor.view(read.shape))
            writer.write(bytes_of(tensor))
        return follower.finish()


def _read_ahead(
    reader: Reader, follower: _Follower, outputs: list[_Output]
) -> Iterator[tuple[_Output, Tensor]]:
    """The outputs' data in blocks, in the dtype of the master. One thread reads and hashes the next
    block into one half of the memory, while the caller casts, hashes and writes the other."""
    memory = itertools.cycle(torch.empty(2, BLOCK, dtype=torch.uint8))
    with ThreadPoolExecutor(1, "read") as thread:
        pending: deque[tuple[_Output, Future[Tensor]]] = deque()
        for output in outputs:
            # What is written before the 16-bit tensors is little, and out of the master's order.
            source = follower if DTYPES[output.dtype].itemsize <= 2 else reader
            for offset, nbytes in _blocks(output.entry):
                job = thread.submit(_read, source, output.entry, offset, nbytes, next(memory))
                pending.append((output, job))
                if len(pending) > 1:
                    done, future = pending.popleft()
                    yield done, future.result()
        yield from ((done, future.result()) for done, future in pending)


def _blocks(entry: TensorEntry) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of each part of a tensor to be read at once."""
    if entry.strides is not None:
        yield entry.offset, entry.span
        return
    for start in range(0, entry.nbytes, BLOCK):
        yield entry.offset + start, min(BLOCK, entry.nbytes - start)


def _read(source: Reader | _Follower, entry: TensorEntry, offset: int, nbytes: int, memory: Tensor) -> Tensor:
    data = memory[:nbytes] if nbytes <= BLOCK else torch.empty(nbytes, dtype=torch.uint8)
    source.read_into(bytes_of(data), offset)
    elements = data.view(DTYPES[entry.dtype])
    return elements if entry.strides is None else elements.as_strided(entry.shape, entry.strides)


# ------------------------------------------------------------------ the file that is written


def _is_made(target: Path, metadata: Mapping[str, str]) -> bool:
    """Whether `target` is there and made from the same master in the same way."""
    if not target.exists():
        return False
    try:
        found = read_index(target, "safetensors").metadata
    except ConfigError as error:
        raise _not_ours(target, error.message) from error
    if not found.get("producer", "").startswith("seedpod "):
        raise _not_ours(target, f"its producer is {found.get('producer', 'not named')!r}")
    return all(found.get(key) == value for key, value in metadata.items() if key != "producer")


def _not_ours(target: Path, reason: str) -> FileError:
    return FileError(
        "convert_target_exists",
        f"{target} is in the way ({reason}); expected nothing, or a file that Seedpod made: move it away.",
    )


def _sidecar(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _refuse_without_room(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise FileError(
            "no_space",
            f"{target.parent} has {free:,} bytes free, expected {needed:,} for {target.name}: make room.",
        )


def _complete(target: Path, source: Path, progress: Progress) -> Path:
    """`target`, made before, with the hash that a crash may have left out."""
    if target.stat().st_mtime_ns < source.stat().st_mtime_ns:
        # A master copied anew looks like another one to `check`, which reads only the times.
        with suppress(OSError):
            os.utime(target)
    progress.start(f"convert to {target.name}", None, "B")
    progress.finish("already made from this master")
    try:
        with open_regular(_sidecar(target)) as file:
            words = file.read(1000).decode().split()
    except (OSError, ValueError):
        words = []
    if len(words) != 2 or words[1] != target.name:
        _write_sidecar(target, sha256_file(target, progress=progress))
    return target


def _write_sidecar(target: Path, digest: str) -> None:
    """One line as `sha256sum -c` reads it."""
    write_at_once(_sidecar(target), f"{digest}  {target.name}\n")
