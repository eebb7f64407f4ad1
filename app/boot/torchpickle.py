"""The pickle inside a `torch.save` file, read without running it.

A pickle is a program. Python's unpickler runs all of it, so a checkpoint can call anything; this
machine knows the instructions and the dozen names that `torch.save` writes for a state dict, builds
plain values from them, and refuses the rest by name. It imports no torch, and it knows nothing of
files: who reads the bytes and where a storage's data lies is `tensorfile`'s business.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

MAX_BYTES: Final = 16 << 20  # the largest published state dict here has 0.3 MB of pickle
MAX_INSTRUCTIONS: Final = 2_000_000  # about 30 a tensor; bounds the time a hostile file can take
_MAX_DIMENSIONS: Final = 64  # torch's own limit

# bytes of an element, by the dtype names of safetensors
ITEM_SIZES: Final = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
# torch's storage classes and dtypes -> the spelling of safetensors
STORAGES: Final = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
    "torch.ComplexFloatStorage": "C64",
    "torch.storage.UntypedStorage": None,
    "torch.UntypedStorage": None,
}
DTYPES: Final = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.uint16": "U16",
    "torch.uint32": "U32",
    "torch.uint64": "U64",
    "torch.bool": "BOOL",
    "torch.complex64": "C64",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
}


class UnsafePickleError(Exception):
    """The pickle asks for something a state dict does not need; `wanted` names it."""

    def __init__(self, wanted: str) -> None:
        super().__init__(wanted)
        self.wanted = wanted


class BrokenPickleError(Exception):
    """The pickle is not what `torch.save` writes: cut off, garbled, or of another kind."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name the pickle refers to, never the thing itself."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of `numel` elements kept outside the pickle under `key`; an untyped one counts bytes."""

    key: str
    dtype: str | None
    numel: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a view of a storage; offset and strides count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pickle(data: bytes | io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """The value that one pickle describes, and every storage it refers to, by key.

    The value is made of dicts, lists, tuples, numbers, strings and `StoredTensor`s. A `BytesIO` is
    left just after the pickle. What has no meaning for a state dict (attributes set on a dict, keys
    that are neither names nor numbers) is left out.

    Raises:
        UnsafePickleError: it names a class or function outside the list below, or uses an
            instruction that creates or calls objects in another way.
        BrokenPickleError: it is cut off, garbled or too large.
    """
    stream = data if isinstance(data, io.BytesIO) else io.BytesIO(data)
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count >= MAX_INSTRUCTIONS:
                raise BrokenPickleError(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions")
            handler = _HANDLERS.get(opcode.name)
            if handler is None:
                raise UnsafePickleError(f"{opcode.name} {argument or ''}".rstrip()[:200])
            handler(machine, argument)
        return machine.stack.pop(), machine.storages
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise BrokenPickleError(f"its pickle cannot be read ({reason})") from error


class _Machine:
    """The stack machine: values, the heights of open marks, the memo, and the storages met."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        height = self.marks.pop()
        values = self.stack[height:]
        del self.stack[height:]
        return values


def _nothing(machine: _Machine, argument: Any) -> None:
    """Framing and protocol: nothing to do."""


def _constant(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


def _mark(machine: _Machine, argument: Any) -> None:
    machine.marks.append(len(machine.stack))


def _put(machine: _Machine, argument: int) -> None:
    machine.memo[argument] = machine.stack[-1]


def _memoize(machine: _Machine, argument: Any) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _get(machine: _Machine, argument: int) -> None:
    machine.push(machine.memo[argument])


def _take(count: int) -> Callable[[_Machine, Any], None]:
    def handler(machine: _Machine, argument: Any) -> None:
        values = tuple(machine.stack[-count:])
        if len(values) < count:
            raise ValueError("a tuple of more values than there are")
        del machine.stack[-count:]
        machine.push(values)

    return handler


def _tuple(machine: _Machine, argument: Any) -> None:
    machine.push(tuple(machine.since_mark()))


def _append(machine: _Machine, argument: Any) -> None:
    value = machine.stack.pop()
    _list_on_top(machine).append(value)


def _appends(machine: _Machine, argument: Any) -> None:
    values = machine.since_mark()
    _list_on_top(machine).extend(values)


def _list_on_top(machine: _Machine) -> list[Any]:
    if not isinstance(machine.stack[-1], list):
        raise ValueError("it appends to what is not a list")
    return machine.stack[-1]


def _set_item(machine: _Machine, argument: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _set_items_of(machine, [key, value])


def _set_items(machine: _Machine, argument: Any) -> None:
    values = machine.since_mark()
    _set_items_of(machine, values)


def _set_items_of(machine: _Machine, flat: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, dict) or len(flat) % 2:
        raise ValueError("it sets items of what is not a dict")
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        # Hashing a tuple nested a million deep would overflow the interpreter's own stack.
        if isinstance(key, int) and key.bit_length() > 64:
            raise ValueError(f"a key of {key.bit_length():,} bits")
        if isinstance(key, str | int | float):
            target[key] = value


def _global(machine: _Machine, argument: str) -> None:
    _push_global(machine, *argument.split(" ", 1))


def _stack_global(machine: _Machine, argument: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a global whose name is not a string")
    _push_global(machine, module, name)


def _push_global(machine: _Machine, module: str, name: str) -> None:
    full = f"{module}.{name}"
    if full not in _BUILDERS and full not in STORAGES and full not in DTYPES:
        raise UnsafePickleError(full)
    machine.push(Global(full))


def _reduce(machine: _Machine, argument: Any) -> None:
    values, function = machine.stack.pop(), machine.stack.pop()
    if not isinstance(function, Global) or function.name not in _BUILDERS:
        raise UnsafePickleError(f"a call of {getattr(function, 'name', type(function).__name__)}")
    if not isinstance(values, tuple):
        raise ValueError(f"{function.name} is called with what is not a tuple")
    machine.push(_BUILDERS[function.name](*values))


def _build(machine: _Machine, argument: Any) -> None:
    """State set on an object (`_metadata` of a state dict): of no use here."""
    machine.stack.pop()


def _persistent(machine: _Machine, argument: Any) -> None:
    pid = machine.stack.pop()
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise ValueError("it refers to something outside itself that is not a storage")
    kind, key, numel = pid[1], pid[2], pid[4]
    if not isinstance(kind, Global) or kind.name not in STORAGES or not isinstance(key, str):
        raise ValueError("a storage without a type or a key")
    if not _is_count(numel):
        raise ValueError(f"storage {key[:40]!r} has no size")
    if len(pid) > 5 and pid[5] is not None:
        raise ValueError(f"storage {key[:40]!r} is a part of another one, as torch wrote it before 0.4")
    storage = Storage(key, STORAGES[kind.name], numel)
    machine.storages[key] = storage
    machine.push(storage)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 63


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any, dtype: str | None = None
) -> StoredTensor:
    if not isinstance(storage, Storage) or not len(shape) == len(strides) <= _MAX_DIMENSIONS:
        raise ValueError("a tensor without a storage, or whose shape and strides differ in length")
    if not all(_is_count(value) for value in (offset, *shape, *strides)):
        raise ValueError("a tensor whose offset, shape or strides are not whole numbers from 0 up")
    kind = dtype or storage.dtype
    if kind is None:
        raise ValueError("a tensor without a dtype")
    return StoredTensor(storage, kind, offset, tuple(shape), tuple(strides))


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> StoredTensor:
    return _rebuild_tensor(storage, offset, shape, strides, dtype=DTYPES[dtype.name])


def _ordered_dict() -> dict[Any, Any]:
    return {}


def _first(value: Any, *rest: Any) -> Any:
    return value


def _ignored(*values: Any) -> None:
    return None


_BUILDERS: Final[dict[str, Callable[..., Any]]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.Size": _first,
    "torch.device": _ignored,
    "_codecs.encode": _ignored,  # how protocol 2 spells a bytes object
}

_CONSTANTS = (
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
)
_HANDLERS: Final[dict[str, Callable[[_Machine, Any], None]]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _nothing),
    **dict.fromkeys(_CONSTANTS, _constant),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _get),
    "MEMOIZE": _memoize,
    "MARK": _mark,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "TUPLE1": _take(1),
    "TUPLE2": _take(2),
    "TUPLE3": _take(3),
    "TUPLE": _tuple,
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "BUILD": _build,
    "BINPERSID": _persistent,
}
