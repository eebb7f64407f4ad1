"""Reading tensors' data from their places in a file, in large blocks, with several threads.

Blocks go straight into the tensors' own memory, or through a bounded scratch block where they are cast
or copied to another device. No memory mapping: over a network its page faults come one by one. Which
tensors, and what for, is the caller's business.
"""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from app.boot.regular import open_descriptor
from app.boot.tensorfile import TensorEntry, TensorIndex
from app.errors import ConfigError, FileError
from app.progress import Progress

BLOCK: Final = 8 << 20  # bytes a reader asks for at once
_SIGNED: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE: Final = 32_000  # elements; torch keeps fewer than 32,768 of them in the calling thread
_COPY: Final = re.compile(r"^(?:[0-9a-f]{64}|state-[0-9a-f]{32})-")  # what names of staged copies begin with
DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


class Rows(Protocol):
    """A matrix that is made of a file's rows, some at a time and by several threads, and not kept as it is
    stored."""

    @property
    def device(self) -> torch.device: ...

    def put(self, first: int, rows: Tensor) -> None:
        """rows (count, columns), as stored, on the device: rows `first` and following."""


class Reader:
    """Positional reads of a checkpoint file, from any thread."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the file's bytes from `offset`.

        Raises:
            FileError: `file_unreadable` or `file_shrank`.
        """
        while len(buffer):
            try:
                count = os.preadv(self.descriptor, [buffer], offset)
            except OSError as error:
                raise FileError(
                    "file_unreadable",
                    f"{self.path} cannot be read at byte {offset:,}: {error.strerror}; expected "
                    f"{len(buffer):,} more bytes: check the volume and try again.",
                ) from error
            if count == 0:
                raise FileError(
                    "file_shrank",
                    f"{self.path} ends at byte {offset:,}, {len(buffer):,} bytes before it should; it was "
                    "changed while it was read: wait until whatever writes it is done.",
                )
            buffer = buffer[count:]
            offset += count


@contextmanager
def open_reader(path: Path) -> Iterator[Reader]:
    """A `Reader` of the file at `path`, closed at the end."""
    try:
        descriptor = open_descriptor(path)
    except OSError as error:
        raise FileError(
            "file_unreadable", f"{path} cannot be opened: {error.strerror}; expected a file to read."
        ) from error
    try:
        yield Reader(path, descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class _Block:
    """A part of a tensor to be read at once, into the `target` slice of its memory, or as rows from `first`
    on."""

    entry: TensorEntry
    offset: int
    nbytes: int
    target: Tensor | Rows
    first: int = 0


def read_tensors(
    index: TensorIndex, wanted: Iterable[tuple[TensorEntry, Tensor | Rows]], readers: int, progress: Progress
) -> None:
    """Fill each tensor, contiguous and of its entry's shape, from the file, casting where dtypes differ, and
    hand over each row of what is to be made of rows.

    Beyond the tensors themselves it takes a block of memory for each reader (pinned for CUDA), and for
    a tensor stored with strides its whole span.

    Raises:
        ConfigError: `checkpoint_overflow`.
        FileError: `file_unreadable` or `file_shrank`.
    """
    by_place = sorted(wanted, key=lambda pair: pair[0].offset)
    blocks = deque(block for entry, tensor in by_place for block in _blocks(entry, tensor))
    progress.start(f"load {_COPY.sub('', index.path.name)}", sum(block.nbytes for block in blocks), "B")
    with open_reader(index.path) as reader, ThreadPoolExecutor(readers, "read") as threads:
        try:
            work = [threads.submit(_read_blocks, reader, blocks, progress) for _ in range(readers)]
            for done in work:
                done.result()
        finally:
            blocks.clear()  # the other readers stop at their next block
    progress.finish()


def _blocks(entry: TensorEntry, tensor: Tensor | Rows) -> Iterator[_Block]:
    if entry.strides is not None:
        yield _Block(entry, entry.offset, entry.span, tensor)
        return
    item = DTYPES[entry.dtype].itemsize
    if not isinstance(tensor, Tensor):
        count, row = entry.shape[0], entry.shape[1] * item
        step = max(1, BLOCK // row)
        for first in range(0, count, step):
            rows = min(step, count - first)
            yield _Block(entry, entry.offset + first * row, rows * row, tensor, first)
        return
    flat = tensor.view(-1)
    step = BLOCK // item
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        yield _Block(entry, entry.offset + start * item, part.numel() * item, part)


def _read_blocks(reader: Reader, blocks: deque[_Block], progress: Progress) -> None:
    """A reader's work: block after block, until there is none."""
    scratch: Tensor | None = None
    while True:
        try:
            block = blocks.popleft()
        except IndexError:
            return
        stored = DTYPES[block.entry.dtype]
        target = block.target
        if isinstance(target, Tensor) and _as_stored(target, block.entry):
            reader.read_into(bytes_of(target), block.offset)
        else:
            if scratch is None or scratch.numel() < block.nbytes:
                size = max(BLOCK, block.nbytes)
                scratch = torch.empty(size, dtype=torch.uint8, pin_memory=target.device.type == "cuda")
            reader.read_into(bytes_of(scratch)[: block.nbytes], block.offset)
            _place(block, scratch[: block.nbytes].view(stored))
        progress.advance(block.nbytes)


def _as_stored(target: Tensor, entry: TensorEntry) -> bool:
    """Whether the file's bytes are the tensor's."""
    return target.device.type == "cpu" and target.dtype == DTYPES[entry.dtype] and entry.strides is None


def _place(block: _Block, read: Tensor) -> None:
    """Copy what was read to its place, and wait until it is there: the scratch memory is used again."""
    target, entry = block.target, block.entry
    if entry.strides is not None:
        read = read.as_strided(entry.shape, entry.strides)
    cuda = target.device.type == "cuda"
    if not isinstance(target, Tensor):
        target.put(block.first, read.view(-1, entry.shape[1]).to(target.device, non_blocking=cuda))
    elif target.device.type == "cpu" and entry.strides is None:
        cast(entry.name, read, target)
    elif target.dtype == read.dtype:
        target.copy_(read, non_blocking=cuda)
    else:
        there = read.to(target.device, non_blocking=cuda)  # cast there, where it is quick
        target.copy_(there)
        refuse_overflow(entry.name, there, target)
    if cuda:
        torch.cuda.current_stream(target.device).synchronize()


def cast(name: str, source: Tensor, target: Tensor) -> None:
    """Copy one flat CPU tensor into another of any dtype, refusing overflow.

    In pieces below the size from which torch spreads an operation over its threads: several readers
    cast at once, and each waiting for threads of its own made this ten times slower.

    Raises:
        ConfigError: `checkpoint_overflow`.
    """
    pieces = max(1, math.ceil(target.numel() / _PIECE))
    for place, part in zip(target.chunk(pieces), source.chunk(pieces), strict=True):
        place.copy_(part)
    refuse_overflow(name, source, target)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def refuse_overflow(name: str, before: Tensor, after: Tensor) -> None:
    """Nothing, unless casting `before` to `after` made a finite value infinite.

    Raises:
        ConfigError: `checkpoint_overflow`, naming the tensor.
    """
    if before.dtype == after.dtype or not after.is_floating_point() or not after.numel():
        return
    if after.device.type == "cpu" and not _may_be_infinite(after):
        return
    before = before.float() if before.dtype.itemsize == 1 else before  # 8 bits know no such question
    if (after.isinf() & before.isfinite()).any():
        largest = before[before.isfinite()].abs().max().item()
        raise ConfigError(
            "checkpoint_overflow",
            f"tensor {name} holds {largest:.4g}, which is beyond {str(after.dtype).removeprefix('torch.')} "
            f"(up to {torch.finfo(after.dtype).max:.4g}): use bfloat16 or float32.",
        )


def _may_be_infinite(tensor: Tensor) -> bool:
    """Whether an element is infinite or not a number, from the bits: quicker than asking each of them.

    As signed integers the positive infinity and above are the largest values; as unsigned ones the
    negative infinity and above.
    """
    signed = _SIGNED[tensor.dtype.itemsize]
    infinity = torch.tensor(math.inf, dtype=tensor.dtype).view(signed).item()
    bits = tensor.contiguous().view(-1).view(signed).numpy()
    above = bits.view(f"u{bits.dtype.itemsize}").max()
    return bool(bits.max() >= infinity or above >= infinity + (1 << 8 * bits.dtype.itemsize - 1))
