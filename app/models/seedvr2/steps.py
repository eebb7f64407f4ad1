"""The element-wise steps of a transformer's block, between its matrices and its attention.

They know nothing of windows or weights.

Shape legend: N tokens, D model width, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from app.models.seedvr2.rope import rotate


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`F.rms_norm` over the last dimension (Zhang and Sennrich, 2019, arXiv:1910.07467).

    That is one kernel on a GPU, but on a CPU it squares into a tensor of x's size.
    """
    if x.is_cuda:
        fused: Tensor = F.rms_norm(x, x.shape[-1:], weight, eps)
        return fused
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    normed: Tensor = (x * norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()).to(x.dtype)
    return normed if weight is None else normed.mul_(weight)


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """x (N, D), RMS-normed, times scale, plus shift, (D,) each."""
    return rms_norm(x, scale, eps).add_(shift)


def add_and_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> Tensor:
    """Add branch times gate to x in place; returns x modulated."""
    return modulate(x.addcmul_(branch, gate), scale, shift, eps)


def turn(qk: Tensor, scale: Tensor, rotations: Tensor, eps: float) -> Tensor:
    """Queries and keys (..., length, 2, h, d), RMS-normed per head, times scale (2, 1, d), turned by
    rotations (length, d / 2)."""
    return rotate(rms_norm(qk, None, eps).mul_(scale), rotations[:, None, None])


def gated(gate: Tensor, x: Tensor) -> Tensor:
    """silu(gate) times x."""
    return F.silu(gate, inplace=True).mul_(x)


@dataclass(frozen=True)
class Steps:
    """The steps of a pass."""

    modulate: Callable[[Tensor, Tensor, Tensor, float], Tensor] = modulate
    add_and_modulate: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor] = add_and_modulate
    turn: Callable[[Tensor, Tensor, Tensor, float], Tensor] = turn
    gated: Callable[[Tensor, Tensor], Tensor] = gated


PLAIN = Steps()
