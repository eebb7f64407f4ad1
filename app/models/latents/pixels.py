"""Bytes of pixels to the numbers that autoencoders take, and back.

[0, 255] lies on [-1, 1]; on the way back values are rounded and clipped: every byte returns as itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from app.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def from_bytes(frames: NDArray[np.uint8]) -> Tensor:
    """(frames, height, width, 3) uint8 -> (frames, 3, height, width) float32 in [-1, 1]."""
    assert frames.ndim == 4 and frames.shape[-1] == 3, frames.shape
    # A copy: frames may be mirrored views, or not writable, or memory that a reader uses again.
    pixels = torch.from_numpy(frames.astype("float32", order="C"))
    return pixels.permute(0, 3, 1, 2).contiguous().div_(127.5).sub_(1)


def to_bytes(frames: Tensor) -> NDArray[np.uint8]:
    """(frames, 3, height, width), any float dtype, about [-1, 1] -> (frames, height, width, 3) uint8.

    Raises:
        InputError: `frames_not_finite`: a value is no number. Cast to bytes it would be black.
    """
    if not torch.isfinite(frames).all():
        raise InputError(
            "frames_not_finite",
            "The decoded frames hold values that are infinite or no numbers; expected finite ones: weaken "
            "the edits of latents or weights, or run in float32 (SEEDPOD_DTYPE=float32).",
        )
    pixels = frames.detach().float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
