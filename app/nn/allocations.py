"""How much memory tensors take, counted as they come and go, on any device, "meta" too.

Counted are the storages that torch's operations return, not what a kernel takes for itself while it runs, nor
what an allocator keeps or rounds up. On the meta device nothing is computed or kept: a pass there tells what
the same pass takes elsewhere.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Module = TypeVar("Module", bound=nn.Module)


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's class, not ours
    """While it is on, `bytes` is what tensors made since then hold on devices of one type, `peak` the most
    that they held."""

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.bytes = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for x in tree_iter(out) if isinstance(out, list | tuple) else (out,):
            if isinstance(x, Tensor) and x.device.type == self.device:
                self._see(x, args, kwargs)
        self.peak = max(self.peak, self.bytes)
        return out

    def _see(self, x: Tensor, args: Any, kwargs: Any) -> None:
        storage = x.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        # What lay there before is given back as a view, or with its values changed: its memory is not ours.
        before = (given for given in tree_iter((args, kwargs)) if isinstance(given, Tensor))
        if any(given.untyped_storage() is storage for given in before if given.device.type == self.device):
            return
        count = storage.nbytes()

        def forget(_: object) -> None:
            del self._known[key]
            self.bytes -= count

        self._known[key] = weakref.ref(storage, forget)
        self.bytes += count


class Stand(TorchFunctionMode):
    """While it is on, the meta device stands for one of another type: code that asks takes the ways that it
    takes there, and attention and norms are kernels of their own, as they are there, not what torch makes of
    them on meta: a matrix of all pairs, and many small operations."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if not (args and isinstance(args[0], Tensor) and args[0].is_meta):
            return func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            q, _, v = args[:3]
            return q.new_empty(*q.shape[:-1], v.shape[-1])
        if func is F.rms_norm:
            return torch.empty_like(args[0])
        if func is F.group_norm:
            copied = args[0].new_empty(
                args[0].shape if self.device == "cuda" else 0
            )  # with channels outermost
            return copied.new_empty(args[0].shape)
        for kind, asked in (("cuda", Tensor.is_cuda), ("cpu", Tensor.is_cpu)):
            if getattr(func, "__self__", None) is asked:
                return self.device == kind
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Taken:
    """Bytes that are held when a pass is over, and at its peak."""

    left: int
    peak: int


def taken(step: Callable[[], object], device: str) -> Taken:
    """What a pass over tensors on meta takes where meta stands for a device of this type."""
    with torch.inference_mode(), Allocations("meta") as counted, Stand(device):
        kept = step()
        left = counted.bytes
        del kept
    return Taken(left, counted.peak)


def prepare() -> None:
    """Import what torch's meta device takes with its first numbers: its compiler, a second and more."""
    taken(lambda: torch.empty(1, device="meta") * 2 + 1, "cpu")


def on_meta(module: Module) -> Module:
    """A copy of a module that has sizes and types alone."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        memo[id(tensor)] = tensor.to("meta")
    return copy.deepcopy(module, memo)
