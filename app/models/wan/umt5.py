"""The UMT5 encoder that Wan reads prompts with (Chung et al. 2023, arXiv:2304.09151).

T5's encoder (Raffel et al. 2020, arXiv:1910.10683) with a table of relative positions in every layer.
Attribute names are those of the original `.pth`, so its tensors need no name table. It knows nothing of
text: `tokenizer.py` makes the tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.models.wan.umt5_config import UMT5Config
from app.nn.linear import Linear

FARTHEST = 128  # tokens: all distances from here on share a bucket
_HALF_LIMIT = torch.finfo(torch.float16).max - 1000


def position_buckets(length: int, buckets: int) -> Tensor:
    """The bucket of each relative position, key - query, from 1 - length to length - 1: int64, on the CPU.

    Half of the buckets are for keys that come later. Of each half the first half are exact distances, the
    others grow logarithmically up to `FARTHEST` (Raffel et al. 2020, section 2.1). The logarithm is
    float32's on every device: one that rounds differently would move a distance to another bucket.
    """
    with torch.device("cpu"):
        relative = torch.arange(1 - length, length)
        half = buckets // 2
        exact = half // 2
        distance = relative.abs()
        growth = torch.log(distance.float() / exact) / math.log(FARTHEST / exact) * (half - exact)
        far = (exact + growth.clamp_min(0).long()).clamp_max(half - 1)
        return (relative > 0).long() * half + torch.where(distance < exact, distance, far)


class Norm(nn.Module):
    """Root mean square normalisation, of float32 statistics whatever the dtype, without a mean."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * (x * scale).to(self.weight.dtype)


class Attention(nn.Module):
    """Attention whose scores are not scaled: T5's initialisation has that factor in the weights."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = Linear(config.dim, config.attention_dim, bias=False)
        self.k = Linear(config.dim, config.attention_dim, bias=False)
        self.v = Linear(config.dim, config.attention_dim, bias=False)
        self.o = Linear(config.attention_dim, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x: (batch, tokens, dim); bias: (batch, heads, tokens, tokens), added to the scores."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        projected: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return projected


class FeedForward(nn.Module):
    """A gated linear unit with GELU's tanh form (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            Linear(config.dim, config.hidden_dim, bias=False), nn.GELU(approximate="tanh")
        )
        self.fc1 = Linear(config.dim, config.hidden_dim, bias=False)
        self.fc2 = Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x) * self.gate(x))
        return out


class Positions(nn.Module):
    """A layer's bias for each bucket of relative position and head."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.embedding = _table(config.buckets, config.heads)

    def forward(self, buckets: Tensor, unseen: Tensor) -> Tensor:
        """buckets: of each relative position, (2 tokens - 1,); unseen: (batch, 1, 1, tokens), added. Returns
        (batch, heads, tokens, tokens), in one piece as attention's fast kernels want it."""
        line = self.embedding(buckets).T.contiguous()  # (heads, 2 tokens - 1)
        # A row of the bias is a stretch of the line: of the last query from its beginning.
        rows = line.unfold(1, unseen.shape[-1], 1).expand(len(unseen), -1, -1, -1)
        bias: Tensor = rows.flip(2).add_(unseen)
        return bias


class Block(nn.Module):
    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.norm1 = Norm(config.dim)
        self.attn = Attention(config)
        self.norm2 = Norm(config.dim)
        self.ffn = FeedForward(config)
        self.pos_embedding = Positions(config)

    def forward(self, x: Tensor, buckets: Tensor, unseen: Tensor) -> Tensor:
        """unseen: (batch, 1, 1, tokens), minus infinity where a key is padding, else 0."""
        bias = self.pos_embedding(buckets, unseen)
        x = _finite(x + self.attn(self.norm1(x), bias))
        return _finite(x + self.ffn(self.norm2(x)))


class UMT5Encoder(nn.Module):
    """Tokens to their embeddings. Padding changes nothing of what the other tokens get."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = _table(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = Norm(config.dim)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids: (batch, tokens) int64; mask: the same shape, 0 where a token is padding.

        Every row needs a token that is not padding. Returns (batch, tokens, dim) in the weights' dtype,
        with the rows of padding zero.
        """
        x = self.token_embedding(ids)
        present = mask != 0
        unseen = torch.zeros_like(present, dtype=x.dtype).masked_fill_(~present, -math.inf)[:, None, None]
        buckets = position_buckets(ids.shape[1], self.config.buckets).to(ids.device)
        for block in self.blocks:
            x = block(x, buckets, unseen)
        out: Tensor = self.norm(x)
        return out.masked_fill(~present[..., None], 0)


def _table(rows: int, width: int) -> nn.Embedding:
    """An embedding table without values: to draw them on meta costs a second or two of torch's imports."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


def _finite(x: Tensor) -> Tensor:
    """float16 ends where some channels of this model go on: there they are cut off, as in the original."""
    return x.clamp(-_HALF_LIMIT, _HALF_LIMIT) if x.dtype == torch.float16 else x
