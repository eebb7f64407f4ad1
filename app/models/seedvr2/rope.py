"""Rotary position embedding of SeedVR2, one table per window shape.

Two kinds (Su et al., 2021, arXiv:2104.09864, along three axes): the 7B's "pixel" frequencies over
positions from -1 to 1 in each window, and the 3B's "lang" frequencies over integer positions, where
text comes first in time and shares its position on all three axes. Tables are unit complex numbers,
(tokens, head_dim / 2), float32: neighbouring channels are a pair (real, imaginary); pairs beyond the
rotary width hold 1 and do not turn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from app.models.seedvr2.config import DiTConfig
from app.models.seedvr2.windows import Size

THETA = 10000.0
MAX_FREQUENCY = 256.0


def frequencies(config: DiTConfig, device: torch.device | str | None = None) -> Tensor:
    """The rotary frequencies of one axis, (rope_frequencies,) float32, as checkpoints store them."""
    if config.rope == "lang":
        dim = config.rope_dim // 3
        exponents = torch.arange(0, dim, 2, device=device)[: dim // 2].float() / dim
        return 1.0 / THETA**exponents
    return torch.linspace(1.0, MAX_FREQUENCY / 2, config.rope_frequencies, device=device) * math.pi


def _turns(positions: Tensor, freqs: Tensor) -> Tensor:
    """Rotations at positions along one axis, (positions, frequencies) complex64."""
    angles = positions[:, None] * freqs
    return torch.polar(torch.ones_like(angles), angles)


def _complete(table: Tensor, pairs: int) -> Tensor:
    """(tokens, rotary pairs) -> (tokens, pairs), the rest of the pairs at rest."""
    return torch.nn.functional.pad(table, (0, pairs - table.shape[-1]), value=1.0)


def video_rotations(config: DiTConfig, shape: Size, text_length: int) -> Tensor:
    """The table of a window of `shape` tokens, (frames x height x width, head_dim / 2) complex64."""
    freqs = frequencies(config)
    axes = []
    for axis, length in enumerate(shape):
        if config.rope == "lang":
            first = text_length if axis == 0 else 0  # video begins in time where text ends
            positions = torch.arange(first, first + length).float()
        else:
            positions = torch.linspace(-1.0, 1.0, length)
        axes.append(_turns(positions, freqs))
    frames, height, width = axes[0][:, None, None], axes[1][:, None], axes[2]
    table = torch.cat([turns.expand(*shape, -1) for turns in (frames, height, width)], dim=-1)
    return _complete(table.flatten(0, 2), config.head_dim // 2)


def text_rotations(config: DiTConfig, length: int) -> Tensor | None:
    """The table of `length` text tokens, (length, head_dim / 2) complex64; `None`: text does not turn."""
    if config.rope == "pixel":
        return None
    turns = _turns(torch.arange(length).float(), frequencies(config))
    return _complete(turns.repeat(1, 3), config.head_dim // 2)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of x, in place where x is float32.

    Args:
        x: (..., head_dim), contiguous in its last dimension.
        rotations: complex64, broadcastable to (..., head_dim / 2).
    """
    turned = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    turned *= rotations
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
