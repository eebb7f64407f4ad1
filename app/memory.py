"""Whether what a model and its work need fits the memory there is.

What they need is for each model to tell: see `app/nn/allocations.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from rich.filesize import decimal

from app.device import free_bytes

SLACK: Final = 1.1  # what allocators round up and lose between tensors
KERNELS: Final = 600 * 10**6  # bytes that a card's libraries take for themselves


@dataclass(frozen=True)
class Need:
    """Bytes at the peak, weights included: on the device, and in the host's memory beside it."""

    device: int
    host: int


@dataclass(frozen=True)
class Room:
    """Bytes that a model and its work may fill on the device and in the host's memory; `apart` says whether
    these are two."""

    device: int
    host: int
    apart: bool

    @classmethod
    def on(cls, device: torch.device, own: int, waiting: int = 0) -> Room:
        """What is free now, with what the model fills itself: `own` bytes of the device, `waiting` of the
        host's memory beside it."""
        free = free_bytes(device)
        if device.type != "cuda":
            return cls(free + own, free + own, apart=False)
        return cls(free + own, free_bytes(torch.device("cpu")) + waiting, apart=True)

    def holds(self, need: Need) -> bool:
        device, host = self.claims(need)
        return device <= self.device and (host <= self.host or not self.apart)

    def claims(self, need: Need) -> tuple[int, int]:
        """Bytes that must be free on the device and in the host's memory, with what is lost between
        tensors."""
        if not self.apart:
            return int(SLACK * (need.device + need.host)), 0
        return int(SLACK * need.device) + KERNELS, int(SLACK * need.host)

    def told(self, need: Need) -> str:
        """What is needed and what there is, in words."""
        device, host = self.claims(need)
        where = "device" if self.apart else "machine"
        text = f"up to {decimal(device)} of the {where}'s {decimal(self.device)}"
        return f"{text} and {decimal(host)} of the host's {decimal(self.host)}" if host else text
