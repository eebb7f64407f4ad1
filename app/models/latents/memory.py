"""How many frames pass through a network at once, by the memory that is free."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

from app.boot.places import memory_limits

SHARE: Final = 0.5  # of the free memory: the estimate is rough, and others work on the machine
UNKNOWN: Final = 4 * 10**9  # taken to be free where the kernel does not tell, as on macOS
MOST: Final = {"cpu": 8, "cuda": 64, "mps": 16}  # more is no faster


def frames_at_once(frame_bytes: int, device: torch.device, free: int | None = None) -> int:
    """1 to `MOST` frames that take `frame_bytes` each. `free`: bytes, asked of the device unless given."""
    free = free_bytes(device) if free is None else free
    return max(1, min(int(free * SHARE) // max(frame_bytes, 1), MOST.get(device.type, 1)))


def free_bytes(device: torch.device) -> int:
    """Memory of `device` that can be taken now, what torch keeps for itself included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    limits = memory_limits(Path("/proc"), Path("/sys/fs/cgroup"))
    return min((limit.free for limit in limits), default=UNKNOWN)
