"""What every task shares: its limits, what it made, and how it tells that memory ran out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Limits:
    """What a job may ask for at most: pixels of a frame of the result, frames of the source or the result."""

    pixels: int
    frames: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a job made, as its caller gets it. `seconds` per step; steps of a stream overlap no other."""

    path: str
    model: str
    width: int
    height: int
    frames: int
    rate: str
    seed: int
    bytes: int
    seconds: dict[str, float]
    total_seconds: float
    notes: tuple[str, ...]
    whole: bool = True  # False for what a stopped job left

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a device or on the host."""
    text = str(error)
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "out of memory" in text
        or "can't allocate memory" in text
        or "_STATUS_ALLOC_FAILED" in text  # of cuBLAS and cuDNN, which have no exception of their own
    )
