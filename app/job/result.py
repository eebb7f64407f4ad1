"""What every task shares: its limits, what it made, and how it tells that memory ran out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from app.errors import UnavailableError


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


@contextmanager
def told_out_of_memory(sentence: Callable[[], str]) -> Iterator[None]:
    """Memory that runs out inside, told to the caller.

    Raises:
        UnavailableError: `out_of_memory`, with the sentence.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UnavailableError("out_of_memory", sentence()) from error
