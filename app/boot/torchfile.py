"""Where a `torch.save` file keeps its pickle and its storages.

Two layouts: the zip archive (torch 1.6 and later), read from its central directory, and the stream of
pickles before it. Gives the pickled value, in which tensors are views of storages, and each storage's
place in the file. It reads no storage and does not know what the value means.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

from app.boot.content import LEGACY_MAGIC, corrupt, truncated, unlike
from app.boot.torchpickle import (
    ITEM_SIZES,
    MAX_BYTES,
    BrokenPickleError,
    UnsafePickleError,
    read_pickle,
)
from app.errors import ConfigError

Places = Mapping[str, tuple[int, int]]  # storage key -> (offset in the file, bytes)

_ALIGNMENT: Final = 64  # torch.save starts each record's data at a multiple of it
_DESCRIPTORS: Final = (16, 24, 12, 20)  # bytes that follow a record: checksum and sizes, 32 or 64 bits
_LOCAL_HEADER: Final = 30


def read_torch(path: Path, file: BinaryIO, size: int) -> tuple[Any, Places]:
    """The value of the `torch.save` file open as `file`, and the places of its storages.

    Raises:
        ConfigError: `checkpoint_truncated`, `_unsafe`, `_not_torch` or `_corrupt`.
    """
    file.seek(0)
    legacy = file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC
    try:
        return _read_stream(path, file, size) if legacy else _read_archive(path, file, size)
    except UnsafePickleError as error:
        raise ConfigError(
            "checkpoint_unsafe",
            f"{path} wants to use {error.wanted} when it is opened, which no set of weights needs; it was "
            "not run. Use the file as published, or save a plain state dict with torch.save.",
        ) from error
    except BrokenPickleError as error:
        raise corrupt(path, str(error)) from error


def _read_archive(path: Path, file: BinaryIO, size: int) -> tuple[Any, Places]:
    bounded = _Bounded(file)
    try:
        with zipfile.ZipFile(bounded) as archive:
            records = sorted(archive.infolist(), key=lambda record: record.header_offset)
            directory = archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OverflowError) as error:
        if _has_directory(bounded):
            raise corrupt(path, f"the directory at its end is garbled ({error})") from error
        raise truncated(path, size, "the directory of tensors at its end is not there") from error
    pickles = [record for record in records if record.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or any(record.filename.endswith("/constants.pkl") for record in records):
        raise unlike(path, "torch", "a TorchScript archive" if pickles else "a zip archive of something else")
    packed = next((r for r in records if r.compress_type != zipfile.ZIP_STORED or r.flag_bits & 1), None)
    if packed is not None:
        raise unlike(path, "torch", f"a zip archive packed again, its record {packed.filename} compressed")
    places = _places(path, file, records, directory)
    prefix = pickles[0].filename.removesuffix("data.pkl")
    value, _ = read_pickle(_record(path, file, places, f"{prefix}data.pkl"))
    if f"{prefix}byteorder" in places:
        order = _record(path, file, places, f"{prefix}byteorder")
        if order != b"little":
            raise corrupt(path, f"its byte order is {order[:20]!r}, expected b'little'")
    start = f"{prefix}data/"
    return value, {name[len(start) :]: place for name, place in places.items() if name.startswith(start)}


class _Bounded:
    """A file that refuses to give more at once than any honest directory of records has: how long that
    is, the file itself claims, and a sparse file may claim gigabytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if size > MAX_BYTES:
            raise zipfile.BadZipFile(f"it claims {size:,} bytes, of {MAX_BYTES:,} at most")
        return self._file.read(size)


def _has_directory(file: _Bounded) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except (zipfile.BadZipFile, ValueError, OverflowError):  # there, and beyond reading
        return True


def _record(path: Path, file: BinaryIO, places: Places, name: str) -> bytes:
    offset, length = places[name]
    if length > MAX_BYTES:
        raise corrupt(path, f"its record {name} has {length:,} bytes, of {MAX_BYTES:,} at most")
    file.seek(offset)
    return file.read(length)


def _places(path: Path, file: BinaryIO, records: Sequence[zipfile.ZipInfo], directory: int) -> Places:
    """Where each record's data lies, for records in file order before the directory.

    A record's offset stands only in the header before its data: a thousand reads across 33 GB. But
    torch.save aligns the data, and the next record follows it, so the directory's sizes determine the
    offsets; the headers of the first, the largest and the last record confirm them. A file written in
    another way is read header by header.
    """
    ends = [record.header_offset for record in records[1:]] + [directory]
    offsets = [_aligned_offset(record, end) for record, end in zip(records, ends, strict=True)]
    largest = max(range(len(records)), key=lambda position: records[position].file_size)
    probes = (0, largest, len(records) - 1)
    if None in offsets or any(offsets[i] != _read_offset(path, file, records[i]) for i in probes):
        offsets = [_read_offset(path, file, record) for record in records]
    places = {}
    for record, offset, end in zip(records, offsets, ends, strict=True):
        if offset is None or record.file_size != record.compress_size or offset + record.file_size > end:
            raise corrupt(path, f"its record {record.filename} does not fit where its directory places it")
        if record.filename in places:
            raise corrupt(path, f"it has two records {record.filename}")
        places[record.filename] = (offset, record.file_size)
    return places


def _aligned_offset(record: zipfile.ZipInfo, end: int) -> int | None:
    """The one aligned offset from which the data, and what describes it, reach exactly to `end`."""
    for after in _DESCRIPTORS if record.flag_bits & 8 else (0,):
        offset = end - after - record.file_size
        if offset % _ALIGNMENT == 0 and offset >= record.header_offset + _LOCAL_HEADER:
            return offset
    return None


def _read_offset(path: Path, file: BinaryIO, record: zipfile.ZipInfo) -> int:
    header = b""
    if 0 <= record.header_offset < 1 << 63:  # what a file position can be
        file.seek(record.header_offset)
        header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise corrupt(path, f"its record {record.filename} does not begin where its directory says")
    name, extra = struct.unpack("<HH", header[26:30])
    return record.header_offset + _LOCAL_HEADER + int(name) + int(extra)


def _read_stream(path: Path, file: BinaryIO, size: int) -> tuple[Any, Places]:
    """The layout before torch 1.6: magic, protocol, machine, value and storage keys, each a pickle, then
    each storage in the order of the keys, as its number of elements (8 bytes) and its data."""
    file.seek(len(LEGACY_MAGIC))
    head = io.BytesIO(file.read(MAX_BYTES))
    try:
        protocol, machine = read_pickle(head)[0], read_pickle(head)[0]
        value, storages = read_pickle(head)
        keys = read_pickle(head)[0]
    except BrokenPickleError as error:
        if head.tell() + len(LEGACY_MAGIC) >= size:
            raise truncated(path, size, "its list of tensors needs more") from error
        raise
    if protocol != 1001 or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise corrupt(path, "its protocol is not 1001 or its byte order is not little")
    if not isinstance(keys, list) or any(not isinstance(key, str) or key not in storages for key in keys):
        raise corrupt(path, "its list of storages is not that of its tensors")
    places = {}
    offset = len(LEGACY_MAGIC) + head.tell()
    for key in keys:
        length = storages[key].numel * ITEM_SIZES[storages[key].dtype or "U8"]
        file.seek(offset)
        count = file.read(8)
        if len(count) == 8 and int.from_bytes(count, "little") != storages[key].numel:
            raise corrupt(path, f"its storage {key} is not as long as its tensors say")
        places[key] = (offset + 8, length)
        offset += 8 + length
        if offset > size:
            raise truncated(path, size, f"its tensors end at byte {offset:,}")
    return value, places
