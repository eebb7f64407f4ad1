"""Seconds and memory of a call, on the CPU or a CUDA card. Knows nothing of what is called."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from app.boot.checkpoint import give_back

Way = Callable[[], object]


def seconds(way: Way, device: str = "cpu") -> float:
    """Seconds of one call, until the card is done too."""
    _wait(device)
    begin = time.perf_counter()
    way()
    _wait(device)
    return time.perf_counter() - begin


def in_turns(
    ways: Mapping[str, Way], budget: float, device: str = "cpu", most: int = 7
) -> dict[str, list[float]]:
    """Seconds of each call of each way: rounds in which each takes its turn, at least one, as long as a
    round more stays within `budget` seconds."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    begin = time.perf_counter()
    for rounds in range(1, most + 1):
        for name, way in ways.items():
            taken[name].append(seconds(way, device))
        if (time.perf_counter() - begin) * (rounds + 1) / rounds > budget:
            break
    return taken


def peak_of(way: Way, device: str = "cpu") -> int:
    """Bytes that one call takes at its peak beyond what lay in memory before it."""
    give_back()
    if device.startswith("cuda"):
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        way()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = reset_host_peak()
    way()
    return host_peak() - before


def reset_host_peak() -> int:
    """Forget this process's peak; returns the bytes of memory that it holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def host_peak() -> int:
    """The most bytes of memory that this process held since `reset_host_peak`.

    The kernel's `ru_maxrss` would do, but a new process inherits its parent's, and it cannot be reset.
    """
    return _status("VmHWM")


def _status(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
