"""What every measurement on a card shares: where it runs, the rate that it is compared with, its time, and
models whose weights are drawn where they run. Nothing of it touches a disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from app.boot.checkpoint import give_back
from app.device import Placement
from benchmarks.measure import host_peak, reset_host_peak, seconds

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Bench:
    """`rate`: operations a second of one large matrix product. `end`: when the time is over, as
    `time.perf_counter` counts."""

    spot: Placement
    rate: float
    end: float

    @property
    def left(self) -> float:
        """Seconds until the time is over."""
        return self.end - time.perf_counter()

    def share(self, operations: float, took: float) -> str:
        """Of the rate: what matrix products alone would take, over what was taken."""
        return f"{operations / took / self.rate:.0%}"


@dataclass(frozen=True)
class Taken:
    """`allocated`: bytes of the device that tensors took at most, weights included. `reserved`: what torch's
    allocator held for it. On a CPU both are the process's memory."""

    seconds: float
    allocated: int
    reserved: int

    @property
    def memory(self) -> str:
        return f"{self.allocated / 1e9:.3g} ({self.reserved / 1e9:.3g})"


MEMORY = "GB (reserved)"


def taken(way: Callable[[], object], device: torch.device) -> Taken:
    """Seconds and memory of one call."""
    if device.type != "cuda":
        reset_host_peak()
        took = seconds(way, "cpu")
        return Taken(took, host_peak(), host_peak())
    give_back()
    torch.cuda.reset_peak_memory_stats(device)
    took = seconds(way, str(device))
    return Taken(took, torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))


def on_meta(build: Callable[[], Model]) -> Model:
    """A model that has shapes and no numbers: its operations can be counted, and nothing is computed."""
    with torch.device("meta"):
        return build().eval().requires_grad_(False)


def drawn(build: Callable[[], Model], device: torch.device, dtype: torch.dtype | None) -> Model:
    """A model with random weights, made on its device: matrices keep the size of what passes through."""
    model = on_meta(build).to(dtype=dtype).to_empty(device=device)
    for module in model.modules():
        if callable(reset := getattr(module, "reset_buffers", None)):
            with torch.device("cpu"):
                reset()
            module.to(device)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(float(name.endswith(("weight", "gamma"))))
    return model


def empty(*shape: int) -> Tensor:
    """A tensor of a shape alone."""
    return torch.empty(shape, device="meta")
