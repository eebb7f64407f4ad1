"""Rotary position embedding of Wan: frames, rows and columns share the width of a head.

Su et al., 2021, arXiv:2104.09864, along three axes. Angles are computed in float64 from absolute positions,
so a clip has no longest length. A table is a pair of real tensors rather than one of complex numbers, which
compilers cannot fuse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from app.nn.transfer import to_device

THETA = 10000.0

Table = tuple[Tensor, Tensor]  # cosines and signed sines, (tokens, 1, head_dim) float32


def axes(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with frame, row and column: (44, 42, 42) of 128."""
    third = 2 * (head_dim // 6)
    return head_dim - 2 * third, third, third


def table(head_dim: int, start: int, frames: int, height: int, width: int, device: torch.device) -> Table:
    """Rotations of frames `start` to `start + frames` of height x width tokens each, in raster order."""
    angles = [
        _angles(range(first, first + length), channels)
        for first, length, channels in zip(
            (start, 0, 0), (frames, height, width), axes(head_dim), strict=True
        )
    ]
    grid = frames, height, width
    cosines, sines = (
        torch.cat(
            [
                part.view(*(length if i == axis else 1 for i, length in enumerate(grid)), -1).expand(
                    *grid, -1
                )
                for axis, part in enumerate(to_device(function(a).float(), device) for a in angles)
            ],
            dim=-1,
        ).flatten(0, 2)
        for function in (torch.cos, torch.sin)
    )
    cosines = cosines.repeat_interleave(2, dim=-1)
    sines = torch.stack([-sines, sines], dim=-1).flatten(-2)
    return cosines.unsqueeze(1), sines.unsqueeze(1)


def _angles(positions: range, channels: int) -> Tensor:
    """(positions, channels / 2) float64, on the CPU: not every device has float64."""
    rates = THETA ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    return torch.arange(positions.start, positions.stop, dtype=torch.float64)[:, None] * rates


def rotate(x: Tensor, rotations: Table) -> Tensor:
    """Turn each pair of neighbouring channels.

    Args:
        x: (batch, tokens, heads, head_dim).

    Returns:
        The same shape, float32.
    """
    cosines, sines = rotations
    turned = x.view(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
    return torch.addcmul(x * cosines, turned, sines)
