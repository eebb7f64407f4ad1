"""The index of a checkpoint file: the name, dtype, shape and place of each tensor in it.

Reads safetensors files and what `torch.save` writes (zip archives and the format before torch 1.6),
from a few small reads, without torch, numpy or running anything the file holds. What a file is, is
decided by its content, never by its name. It does not know which tensors a model needs, and it never
reads a tensor's data: that is `checkpoint.py`.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from app.boot.content import HEAD_BYTES, corrupt, refuse_other_content, truncated
from app.boot.regular import open_regular
from app.boot.torchfile import Places, read_torch
from app.boot.torchpickle import ITEM_SIZES, StoredTensor
from app.errors import ConfigError, FileError

if TYPE_CHECKING:
    from app.boot.manifest import Format

_MAX_HEADER: Final = 100_000_000  # safetensors' own limit


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file.

    `dtype` is spelled as in safetensors ("F32", "BF16"), `offset` is that of its first element from
    the file's start, `nbytes` is the size of its elements. `strides` (in elements) is None when they
    lie in order without gaps, as nearly always.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last one in the file."""
        if self.strides is None or not self.nbytes:
            return self.nbytes
        return (_last(self.shape, self.strides) + 1) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class TensorIndex:
    """The tensors of a file in the order it names them, and the file's size when it was read.

    `sections` are the sub-mappings that hold tensors themselves ("generator_ema"); `section` is the one
    that `tensors` is of, None for the top. A file that is one bare tensor has it under the name "".
    """

    path: Path
    format: Format
    size: int
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] = field(default_factory=dict)
    sections: tuple[str, ...] = ()
    section: str | None = None


def read_index(path: Path, format: Format, section: str | None = None) -> TensorIndex:
    """The index of the checkpoint at `path`, which should be of `format` "torch" or "safetensors".

    A torch file whose top holds no tensor but sections that do is returned with `tensors` empty,
    for the caller to choose among `sections`.

    Raises:
        ConfigError: `checkpoint_empty`, `_lfs_pointer`, `_html`, `_truncated`, `_unsafe`,
            `_not_torch`, `_not_safetensors`, `_legacy_format`, `_corrupt`, `_no_tensors` or
            `_section` (all beginning with `checkpoint`): what it is instead of a checkpoint.
        FileError: `file_unreadable`.
    """
    assert format in ("torch", "safetensors"), f"{format} files hold no tensors"
    try:
        with open_regular(path) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            refuse_other_content(path, format, file.read(HEAD_BYTES), size)
            read = _index_safetensors if format == "safetensors" else _index_torch
            index = read(path, file, size, section)
    except OSError as error:
        raise FileError(
            "file_unreadable",
            f"{path} cannot be read: {error.strerror or error}; expected a checkpoint this process may read.",
        ) from error
    if not index.tensors and not (index.sections and section is None):
        raise ConfigError(
            "checkpoint_no_tensors",
            f"{path} holds no tensors; expected the weights of a model: put the published file there.",
        )
    return index


def rename_tensors(index: TensorIndex, rename: Callable[[str], str | None]) -> TensorIndex:
    """`index` under the names a model uses; None leaves a tensor out.

    Raises:
        ConfigError: `checkpoint_tensors` when two tensors get one name.
    """
    renamed: dict[str, TensorEntry] = {}
    for name, entry in index.tensors.items():
        new = rename(name)
        if new is None:
            continue
        if new in renamed:
            raise ConfigError(
                "checkpoint_tensors",
                f"{index.path} holds {renamed[new].name} and {name}, which are both the model's {new}; "
                "expected one of them: use the checkpoint as published.",
            )
        renamed[new] = entry
    return replace(index, tensors=renamed)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether `name` is one of the names or shell patterns ("*.freqs", "pose_proj.*")."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def compare_tensors(
    expected: Mapping[str, tuple[int, ...]],
    index: TensorIndex,
    optional: Collection[str] = (),
    dropped: Collection[str] = (),
) -> list[str]:
    """What keeps the file's tensors from being a model's, in sentences; nothing when they fit.

    `expected` maps names to shapes. `optional` and `dropped` hold names or shell patterns: the tensors
    of an optional pattern may be missing, but only all together; dropped ones may be left over.
    """
    found = index.tensors
    absent = {name for name in expected if name not in found}
    for pattern in optional:
        group = [name for name in expected if fnmatchcase(name, pattern)]
        if all(name in absent for name in group):
            absent.difference_update(group)
    missing = [name for name in expected if name in absent]
    extra = [name for name in found if name not in expected and not matches(name, dropped)]
    shapes = [
        f"{name} is {_shape(found[name].shape)}, expected {_shape(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != tuple(shape)
    ]
    sentences = []
    if missing:
        there = f" (the file has the sections {', '.join(index.sections)})" if index.sections else ""
        sentences.append(f"{_counted(len(missing), 'tensor')} missing: {_some(missing)}{there}.")
    if extra:
        sentences.append(f"{_counted(len(extra), 'tensor')} left over: {_some(extra)}.")
    if shapes:
        sentences.append(f"{_counted(len(shapes), 'tensor')} of another shape: {_some(shapes, '; ')}.")
    return sentences


def _some(texts: Sequence[str], separator: str = ", ", most: int = 3) -> str:
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return separator.join(text[:200] for text in texts[:most]) + more


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _index_torch(path: Path, file: BinaryIO, size: int, section: str | None) -> TensorIndex:
    value, places = read_torch(path, file, size)
    top = {"": value} if isinstance(value, StoredTensor) else value if isinstance(value, dict) else {}
    parts = {str(name): part for name, part in top.items() if isinstance(part, dict) and _tensors(part)}
    if section is not None and section not in parts:
        there = f"it has {', '.join(parts)}: choose one of those" if parts else "it has none: leave it out"
        raise ConfigError("checkpoint_section", f"{path} has no section {section!r} of tensors; {there}.")
    chosen = top if section is None else parts[section]
    tensors = {name: _entry(path, size, name, tensor, places) for name, tensor in _tensors(chosen).items()}
    return TensorIndex(path, "torch", size, tensors, sections=tuple(parts), section=section)


def _tensors(mapping: Mapping[Any, Any]) -> dict[str, StoredTensor]:
    return {str(name): value for name, value in mapping.items() if isinstance(value, StoredTensor)}


def _entry(path: Path, size: int, name: str, tensor: StoredTensor, places: Places) -> TensorEntry:
    item = ITEM_SIZES[tensor.dtype]
    if tensor.storage.key not in places:
        raise corrupt(path, f"tensor {name} needs storage {tensor.storage.key[:40]!r}, which is not in it")
    start, length = places[tensor.storage.key]
    count = math.prod(tensor.shape)
    end = (tensor.offset + 1 + _last(tensor.shape, tensor.strides)) * item if count else tensor.offset * item
    if end > length:
        raise corrupt(path, f"tensor {name} ends at byte {end:,} of a storage of {length:,} bytes")
    if count * item > size:  # expanded: a few bytes that would fill any memory
        raise corrupt(path, f"tensor {name} of {count * item:,} bytes repeats what {size:,} bytes hold")
    strides = None if not count or _in_order(tensor.shape, tensor.strides) else tensor.strides
    return TensorEntry(name, tensor.dtype, tensor.shape, start + tensor.offset * item, count * item, strides)


def _last(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements after its first one a tensor's last element lies."""
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _in_order(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements lie one after the other; the stride of a single element says nothing."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _index_safetensors(path: Path, file: BinaryIO, size: int, section: str | None) -> TensorIndex:
    """The header's tensors; its rules: https://github.com/huggingface/safetensors#format"""
    if section is not None:
        raise ConfigError(
            "checkpoint_section",
            f"{path} is a safetensors file, which has no sections such as {section!r}: leave it out.",
        )
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER:
        raise corrupt(path, f"its header claims {length:,} bytes, of {_MAX_HEADER:,} at most")
    if 8 + length > size:
        raise truncated(path, size, f"its header ends at byte {8 + length:,}")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", {})
        entries = [_header_entry(name, fields, 8 + length) for name, fields in header.items()]
        if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            raise ValueError("__metadata__ holds more than strings")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise corrupt(path, f"its header is not one of safetensors ({reason})") from error
    end = 8 + length
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            raise corrupt(path, f"tensor {entry.name} begins at byte {entry.offset:,}, expected {end:,}")
        end += entry.nbytes
    if end > size:
        raise truncated(path, size, f"its tensors end at byte {end:,}")
    if end < size:
        raise corrupt(path, f"it has {size:,} bytes, but its tensors end at byte {end:,}")
    return TensorIndex(path, "safetensors", size, {entry.name: entry for entry in entries}, metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a name stands in it twice")
    return result


def _header_entry(name: str, fields: Mapping[str, Any], base: int) -> TensorEntry:
    dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    if dtype not in ITEM_SIZES:
        raise ValueError(f"tensor {name} has the unknown dtype {dtype}")
    if len(shape) > 64 or not all(
        type(value) is int and 0 <= value < 1 << 63 for value in (*shape, begin, end)
    ):
        raise ValueError(f"the shape or the place of tensor {name} is not in whole numbers from 0 up")
    if end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
        raise ValueError(f"tensor {name} of {_shape(shape)} {dtype} has {end - begin:,} bytes")
    return TensorEntry(name, dtype, tuple(shape), base + begin, end - begin)
