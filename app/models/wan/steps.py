"""The element-wise steps of the Wan transformer's layers, between matrices and attention.

Plain, or each compiled into one kernel. They know nothing of pieces, caches or weights.

Shape legend: n tokens, D model width, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.models.wan import rope
from app.models.wan.config import TransformerConfig
from app.nn.compiled import Compiler, Compiling, example


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x (n, D), layer-normed, times scale, plus shift, (D,) float32 each."""
    return F.layer_norm(x.float(), x.shape[-1:], scale, shift, eps).to(x.dtype)


def add_and_modulate(x: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Add branch to x in place; returns x modulated."""
    return modulate(x.add_(branch), shift, scale, eps)


def add_and_norm(x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Add branch times gate, (D,) float32, to x in place; returns x layer-normed."""
    return F.layer_norm(x.addcmul_(branch, gate), x.shape[-1:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), RMS-normed over the whole width in float32, cast, then scaled."""
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight


def turn_into(out: Tensor, x: Tensor, weight: Tensor, rotations: rope.Table, eps: float) -> None:
    """Write x (n, D), RMS-normed, cut into heads and turned, to out (n, h, d)."""
    out.copy_(rope.rotate(rms_norm(x, weight, eps).view(out.shape), rotations))


@dataclass(frozen=True)
class Steps:
    """The steps of a pass."""

    modulate: Callable[[Tensor, Tensor, Tensor, float], Tensor] = modulate
    add_and_modulate: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor] = add_and_modulate
    add_and_norm: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor] = add_and_norm
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    turn_into: Callable[[Tensor, Tensor, Tensor, rope.Table, float], None] = turn_into


PLAIN = Steps()


def compiled(
    config: TransformerConfig, device: torch.device, dtype: torch.dtype, compiler: Compiler
) -> Steps:
    """The steps of a model, compiled for any number of tokens, whatever a block sees of the past.

    Raises:
        ConfigError: `compiler_unusable`.
    """
    dim, eps, heads = config.dim, config.eps, (config.heads, config.head_dim)
    with torch.inference_mode(False), torch.device(device):
        weight, bias = (nn.Parameter(torch.zeros(dim, dtype=dtype), requires_grad=False) for _ in "wb")
    with torch.inference_mode(), torch.device(device):

        def tokens(*shape: int) -> Tensor:
            return example(torch.zeros(3, *shape, dtype=dtype), 0)

        def vector() -> Tensor:
            return torch.zeros(dim)

        def table() -> Tensor:
            return example(torch.zeros(3, 1, heads[1]), 0)

        steps: list[Compiling] = [
            (modulate, (tokens(dim), vector(), vector(), eps)),
            (add_and_modulate, (tokens(dim), tokens(dim), vector(), vector(), eps)),
            (add_and_norm, (tokens(dim), tokens(dim), vector(), weight, bias, eps)),
            (rms_norm, (example(torch.zeros(1, 3, dim, dtype=dtype), 1), weight, eps)),
            (turn_into, (tokens(*heads), tokens(dim), weight, (table(), table()), eps)),
        ]
    return Steps(*compiler.compiled(device, steps))
