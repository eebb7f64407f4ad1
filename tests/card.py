"""A CUDA card that is not there: tensors on it live in the host's memory, and say that they do not.

Every call of torch passes `Card`, which refuses what a real card refuses: operands on two devices, numpy of a
tensor on the card, norms whose weights are of another type than what they norm. Numbers are the CPU's. It
knows nothing of kernels: what one computes, how long, in how much memory, a real card must show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map_only

CARD, HOST = torch.device("cuda:0"), torch.device("cpu")
# These take operands from elsewhere.
_MOVES = {"copy_", "__setitem__", "__getitem__", "__set__", "type_as", "_has_compatible_shallow_copy_type"}
_SAME_TYPE = {"layer_norm", "group_norm", "rms_norm"}
_SLOW = {"conv2d", "conv3d", "linear", "scaled_dot_product_attention"}  # in 16 bits on a CPU


class Placed(Tensor):
    """A tensor that lies where `place` says."""

    place: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl

    def record_stream(self, stream: object) -> None: ...


def on_card(x: object) -> bool:
    return isinstance(x, Placed) and x.place.type == "cuda"


def placed(x: Tensor) -> Tensor:
    if on_card(x):
        return x
    made = x.as_subclass(Placed)
    made.place = CARD
    return made


def _move(x: Tensor, place: torch.device) -> None:
    """x's data were set to those of a tensor at `place`."""
    if not isinstance(x, Placed):
        parameter = isinstance(x, torch.nn.Parameter)
        x.__class__ = Placed
        x._is_param = parameter  # type: ignore[attr-defined]
    x.place = place


class Card(TorchFunctionMode):
    """While it is on, "cuda" is a device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._property(func, args[0])
        if name == "cuda":
            func, name, args = Tensor.to, "to", (*args, CARD)
        target = _device(name, args, kwargs)
        if kwargs.pop("pin_memory", False):
            assert target is None or target.type == "cpu", "only the host's memory can be pinned"
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        there = any(on_card(x) for x in tensors)
        if name in ("numpy", "__array__") and there:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if target is not None and target.type == "cuda":
            assert kwargs.get("generator") is None, "a generator of the CPU draws nothing on the card"
        _check(name, args, tensors)
        if name == "__deepcopy__":
            return _copied(args[0], args[1])
        if target is not None:
            args, kwargs = _without_device(args, kwargs)
        out = _in_float32(func, args, kwargs) if name in _SLOW and there else func(*args, **kwargs)
        if name == "__set__" and (isinstance(args[0], Placed) or on_card(args[1])):
            _move(args[0], CARD if on_card(args[1]) else HOST)
        if name in ("cpu", "numpy", "tolist", "item"):
            return _plain(out, args[0])
        wanted = target.type == "cuda" if target is not None else there
        if target is not None and not wanted:
            return _plain(out, args[0] if args else None)
        return tree_map_only(Tensor, placed, out) if wanted else out

    def _property(self, func: Any, x: Tensor) -> Any:
        which = func.__self__.__name__
        if on_card(x):
            if which == "device":
                return CARD
            if which in ("is_cuda", "is_cpu"):
                return which == "is_cuda"
        out = func(x)
        return placed(out) if isinstance(out, Tensor) and on_card(x) else out


def _in_float32(func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
    """The operands' type is one, as on the card, but what is computed in it is not."""
    kinds = {x.dtype for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
    if len(kinds) > 1:
        raise RuntimeError(f"{func.__name__}: operands of several types on the card: {kinds}")
    args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
    out: Tensor = func(*args, **kwargs)
    return out.to(*kinds)


def _plain(out: Any, source: Any) -> Any:
    if not on_card(out):
        return out
    fresh = out.clone() if out is source else out
    return fresh.as_subclass(Tensor) if type(fresh) is not Tensor else fresh


def _device(name: str, args: Any, kwargs: Any) -> torch.device | None:
    """The device that a call asks for."""
    asked = kwargs.get("device")
    if asked is None and name == "to" and len(args) > 1:
        first = args[1]
        if isinstance(first, Tensor):
            return CARD if on_card(first) else HOST
        asked = first if isinstance(first, str | torch.device | int) else None
    return None if asked is None else torch.device(asked)


def _without_device(args: Any, kwargs: Any) -> tuple[Any, Any]:
    def here(x: Any) -> Any:
        is_card = (isinstance(x, torch.device) and x.type == "cuda") or (
            isinstance(x, str) and x.startswith("cuda")
        )
        return HOST if is_card else x

    return tuple(here(x) for x in args), {name: here(x) for name, x in kwargs.items()}


def _check(name: str, args: Any, tensors: Sequence[Tensor]) -> None:
    there = [x for x in tensors if on_card(x)]
    here = [x for x in tensors if not on_card(x) and x.ndim and not x.is_meta]
    if name == "to":
        return
    if there and here:
        first_there = on_card(args[0]) if args and isinstance(args[0], Tensor) else True
        if name not in _MOVES or (name == "__getitem__" and not first_there):
            shapes = [(str(x.dtype), tuple(x.shape), "cuda" if on_card(x) else "cpu") for x in tensors]
            raise RuntimeError(f"{name}: operands on two devices: {shapes}")
    if name in _SAME_TYPE and there and len({x.dtype for x in tensors}) > 1:
        raise RuntimeError(f"{name}: operands of several types on the card: {[x.dtype for x in tensors]}")


def _copied(x: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(x) not in memo:
        copy = x.detach().clone()
        if isinstance(x, Placed):
            copy = copy.as_subclass(Placed)
            copy.place = x.place
            if getattr(x, "_is_param", False):
                copy._is_param = True  # type: ignore[attr-defined]
        elif isinstance(x, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, requires_grad=x.requires_grad)
        memo[id(x)] = copy
    return memo[id(x)]


class _Threads(ThreadPoolExecutor):
    """Readers' threads, in which the card is there, too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, initializer=lambda: Card().__enter__(), **kwargs)


class _Stream:
    def __init__(self, device: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, other: _Stream) -> None: ...


@contextmanager
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a card of 80 GiB, all of it free."""
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: _Stream(),
        "Stream": _Stream,
        "stream": nullcontext,
        "mem_get_info": lambda device=None: (80 << 30, 80 << 30),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
    }
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr("app.boot.tensorread.ThreadPoolExecutor", _Threads)
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        with Card():
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
