"""How many frames pass through a network at once, by the memory that is free."""

from __future__ import annotations

from typing import Final

import torch

from app.device import free_bytes

SHARE: Final = 0.5  # of the free memory: the estimate is rough, and others work on the machine
MOST: Final = {"cpu": 8, "cuda": 64, "mps": 16}  # more is no faster


def frames_at_once(frame_bytes: int, device: torch.device, free: int | None = None) -> int:
    """1 to `MOST` frames that take `frame_bytes` each. `free`: bytes, asked of the device unless given."""
    free = free_bytes(device) if free is None else free
    return max(1, min(int(free * SHARE) // max(frame_bytes, 1), MOST.get(device.type, 1)))
