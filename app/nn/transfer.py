"""Small tensors that the host computes and a device needs."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """x, of the CPU, on a device, without waiting for what the device is doing.

    CUDA takes ordinary memory into a buffer of its own before it returns, so x may be changed or freed at
    once; `Tensor.to` by default waits until the device has done all that was queued.
    """
    return x.to(device, non_blocking=torch.device(device).type == "cuda")
