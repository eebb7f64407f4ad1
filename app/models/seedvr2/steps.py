"""The element-wise steps of a transformer's block, between its matrices and its attention.

Plain, or each compiled into one kernel. They know nothing of windows or weights.

Shape legend: N tokens, D model width, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from app.models.seedvr2.config import DiTConfig
from app.models.seedvr2.rope import rotate
from app.nn.compiled import Compiler, Compiling, example


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


def turn_pairs(qk: Tensor, scale: Tensor, pairs: Tensor, eps: float) -> Tensor:
    """As `turn`, by pairs of real numbers, (length, d / 2, 2) float32: no compiler fuses complex ones."""
    normed = (rms_norm(qk, None, eps) * scale).float()
    real, imaginary = normed.view(*qk.shape[:-1], -1, 2).unbind(-1)
    cosines, sines = pairs[:, None, None].unbind(-1)
    turned = real * cosines - imaginary * sines, real * sines + imaginary * cosines
    return torch.stack(turned, dim=-1).view(qk.shape).to(qk.dtype)


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


def compiled(config: DiTConfig, device: torch.device, dtype: torch.dtype, compiler: Compiler) -> Steps:
    """The steps of a model, compiled for any number and size of windows.

    Raises:
        ConfigError: `compiler_unusable`.
    """
    head, eps = config.head_dim, config.norm_eps
    with torch.inference_mode(), torch.device(device):

        def tokens(width: int) -> Tensor:
            return example(torch.zeros(3, width, dtype=dtype), 0)

        def vector() -> Tensor:
            return torch.zeros(config.dim, dtype=dtype)

        qkv = torch.zeros(3, 5, 3, config.heads, head, dtype=dtype)
        scale, pairs = torch.zeros(2, 1, head, dtype=dtype), example(torch.zeros(5, head // 2, 2), 0)
        steps: list[Compiling] = [
            (modulate, (tokens(config.dim), vector(), vector(), eps)),
            (add_and_modulate, (*(tokens(config.dim) for _ in "xy"), *(vector() for _ in "gst"), eps)),
            (turn_pairs, (example(qkv[..., :2, :, :], 0, 1), scale, pairs, eps)),
            *([(gated, (tokens(config.mlp_dim), tokens(config.mlp_dim)))] * (config.mlp == "swiglu")),
        ]
    first, second, third, *rest = compiler.compiled(device, steps)

    def turned(qk: Tensor, scale: Tensor, rotations: Tensor, eps: float) -> Tensor:
        out: Tensor = third(qk, scale, torch.view_as_real(rotations), eps)
        return out

    return Steps(first, second, turned, *rest)
