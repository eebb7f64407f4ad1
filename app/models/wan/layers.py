"""The layers of the Wan diffusion transformer. Attribute names are the checkpoints' names.

Tokens pass a layer in pieces (see `pieces`) and are changed in place. Norms, modulation and rotations are
computed in float32, whatever the type of weights and tokens. A layer knows nothing of noise or positions:
modulations and rotations come in.

Shape legend: B batch, R rows of modulation (1, or one a frame), N tokens of the block, n tokens of a piece, M
tokens that are seen, D model width, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.models.wan import rope
from app.models.wan.cache import KeysValues
from app.models.wan.config import TransformerConfig
from app.models.wan.pieces import Piece
from app.models.wan.steps import Steps, rms_norm
from app.nn.linear import Linear


class RMSNorm(nn.Module):
    """RMS norm over the whole width, computed in float32, cast, then scaled."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True)
class Pass:
    """What the layers share in one pass. `queries`: (B, N, h, d), memory for those of a layer. `length`:
    keys that a query sees."""

    pieces: Sequence[Piece]
    rotations: rope.Table
    queries: Tensor
    length: int
    steps: Steps


def attend(q: Tensor, keys_values: KeysValues) -> Tensor:
    """Attention of q (B, N, h, d) to keys and values (B, M, h, d), without a mask. Returns (B, N, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, *keys_values))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """What self- and cross-attention have in common."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.split = (config.heads, config.head_dim)
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(dim, config.eps) for _ in range(2))

    def keys_values(self, x: Tensor) -> KeysValues:
        return self.norm_k(self.k(x)).unflatten(-1, self.split), self.v(x).unflatten(-1, self.split)


class SelfAttention(Attention):
    """Attention of a block to itself and, through a cache, to the past."""

    def forward(self, x: Tensor, six: Tensor, eps: float, run: Pass, stored: KeysValues) -> Tensor:
        """x (B, N, D), six (B, R, 6, D). Returns (B, N, D), before the projection. The block's own keys and
        values are left in `stored`, where those that it sees are."""
        for piece in run.pieces:
            shift, scale = six[piece.item, piece.row, :2]
            y = run.steps.modulate(x[piece.item, piece.own], shift, scale, eps)
            rotations = run.rotations[0][piece.own], run.rotations[1][piece.own]
            keys, values = self.k(y), self.v(y).unflatten(-1, self.split)
            for own, place in piece.writes:
                here = rotations[0][own], rotations[1][own]
                run.steps.turn_into(stored[0][piece.item, place], keys[own], self.norm_k.weight, here, eps)
                stored[1][piece.item, place] = values[own]
            queries = run.queries[piece.item, piece.own]
            run.steps.turn_into(queries, self.q(y), self.norm_q.weight, rotations, eps)
        return attend(run.queries, (stored[0][:, : run.length], stored[1][:, : run.length]))


class CrossAttention(Attention):
    """Attention to all tokens of a prompt, and, apart from it, to those of an image."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        if config.image:
            self.k_img, self.v_img = (Linear(config.dim, config.dim) for _ in range(2))
            self.norm_k_img = RMSNorm(config.dim, config.eps)

    def image_keys_values(self, x: Tensor) -> KeysValues:
        keys, values = self.norm_k_img(self.k_img(x)), self.v_img(x)
        return keys.unflatten(-1, self.split), values.unflatten(-1, self.split)

    def forward(self, x: Tensor, text: KeysValues, image: KeysValues | None, steps: Steps) -> Tensor:
        """x (1, n, D)."""
        q = steps.rms_norm(self.q(x), self.norm_q.weight, self.norm_q.eps).view(*x.shape[:-1], *self.split)
        mixed = attend(q, text)
        if image is not None:
            mixed = mixed + attend(q, image)
        out: Tensor = self.o(mixed)
        return out


class Block(nn.Module):
    """Self-attention, cross-attention and MLP; the first and the last modulated by each frame's timestep."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(dim, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self,
        x: Tensor,
        six: Tensor,
        run: Pass,
        stored: KeysValues,
        text: KeysValues,
        image: KeysValues | None,
    ) -> None:
        """x (B, N, D), changed in place; six (B, R, 6, D): `Times.layers`."""
        attended = self.self_attn(x, six, self.eps, run, stored)
        for piece in run.pieces:
            part, (_, _, gate, shift, scale, last) = x[piece.item, piece.own], six[piece.item, piece.row]
            item = slice(piece.item, piece.item + 1)
            one = None if image is None else (image[0][item], image[1][item])
            y = run.steps.add_and_norm(
                part, self.self_attn.o(attended[piece.item, piece.own]), gate,
                self.norm3.weight, self.norm3.bias, self.eps,
            )  # fmt: skip
            y = self.cross_attn(y[None], (text[0][item], text[1][item]), one, run.steps)[0]
            y = run.steps.add_and_modulate(part, y, shift, scale, self.eps)
            part.addcmul_(self.mlp(y), last)
            del y  # the next piece begins without it

    def mlp(self, x: Tensor) -> Tensor:
        """`ffn` of x (n, D), its activation in place."""
        hidden = torch.ops.aten.gelu_(self.ffn[0](x), approximate="tanh")
        out: Tensor = self.ffn[2](hidden)
        return out


class Head(nn.Module):
    """The last norm, modulated by each frame's timestep, and the projection to patches of latents."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = Linear(config.dim, config.out_channels * config.patch_volume)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: Tensor, two: Tensor, run: Pass) -> Tensor:
        """x (B, N, D), two (B, R, 2, D): `Times.head`. Returns (B, N, channels of a patch)."""
        parts = []
        for piece in run.pieces:
            shift, scale = two[piece.item, piece.row]
            y = run.steps.modulate(x[piece.item, piece.own], shift, scale, self.eps)
            parts.append(self.head(y))
        return torch.cat(parts).view(*x.shape[:2], -1)


class ImageEmbedding(nn.Module):
    """An image's features to tokens of the model's width."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(dim_in),
            Linear(dim_in, dim_in),
            nn.GELU(),
            Linear(dim_in, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out
