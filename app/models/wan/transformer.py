"""The Wan diffusion transformer, causal over blocks of frames (arXiv:2503.20314, arXiv:2506.08009).

Attribute names are the checkpoints' names, so there is no key map. A pass takes one block of frames; what
it may see of the past is in a `KVCache`, and without one the block is all there is (the bidirectional pass
of the undistilled model). The model knows nothing of noise schedules, prompts as text, pixels or files.

    plan = model.plan(3, 60, 104, start=0, cache=cache)         # once a block
    cross = model.cross(embedding)                              # once a prompt
    flow = model(latents, timesteps, cross, plan, cache)        # every step

Types: weights and tokens are of the model's type; norms, modulation and rotations are computed in float32,
the timestep's sinusoids in float64.

Shape legend: B batch, F frames of the block, H, W latent height and width, N tokens of the block (F times
the tokens of a frame), D model width, h heads, d head width. Layout of latents: (B, channels, F, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from app.models.wan import rope
from app.models.wan.cache import CrossCache, KeysValues, KVCache, Place
from app.models.wan.config import POSE_DIM, TransformerConfig
from app.nn.transfer import to_device


@dataclass(frozen=True)
class Plan:
    """What the passes over one block share: its grid of tokens, its rotations and its place in a cache."""

    grid: tuple[int, int, int]
    rotations: rope.Table
    place: Place | None


class RMSNorm(nn.Module):
    """RMS norm over the whole width, computed in float32, cast, then scaled."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        return normed * self.weight


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x (B, N, D), layer-normed, then scaled by 1 + scale and shifted, (B, F, 1, D) float32 each."""
    normed = _framed(F.layer_norm(x.float(), x.shape[-1:], eps=eps), shift)
    return torch.addcmul(shift, normed, 1 + scale).flatten(1, 2).to(x.dtype)


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate, with x and y (B, N, D), gate (B, F, 1, D) float32."""
    out = torch.addcmul(_framed(x, gate), _framed(y, gate), gate)
    return out.flatten(1, 2).to(x.dtype)


def _framed(x: Tensor, modulation: Tensor) -> Tensor:
    """(B, N, D) -> (B, F, tokens of a frame, D), F as in the modulation (B, F, 1, D)."""
    return x.view(x.shape[0], modulation.shape[1], -1, x.shape[-1])


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
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(dim, config.eps) for _ in range(2))

    def query(self, x: Tensor) -> Tensor:
        heads: Tensor = self.norm_q(self.q(x)).unflatten(-1, self.split)
        return heads

    def keys_values(self, x: Tensor) -> KeysValues:
        return self.norm_k(self.k(x)).unflatten(-1, self.split), self.v(x).unflatten(-1, self.split)


class SelfAttention(Attention):
    """Attention of a block to itself and, through a cache, to the past."""

    def forward(self, x: Tensor, plan: Plan, cached: KeysValues | None) -> Tensor:
        """x (B, N, D). The block's own keys and values are left in `cached`."""
        keys, values = self.keys_values(x)
        q = rope.rotate(self.query(x), plan.rotations).to(x.dtype)
        turned = rope.rotate(keys, plan.rotations)
        if cached is None or plan.place is None:
            seen = turned.to(x.dtype), values
        else:
            for own, place in plan.place.writes:
                cached[0][:, place].copy_(turned[:, own])
                cached[1][:, place].copy_(values[:, own])
            seen = cached[0][:, : plan.place.length], cached[1][:, : plan.place.length]
        out: Tensor = self.o(attend(q, seen))
        return out


class CrossAttention(Attention):
    """Attention to all tokens of a prompt, and, apart from it, to those of an image."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        if config.image:
            self.k_img, self.v_img = (nn.Linear(config.dim, config.dim) for _ in range(2))
            self.norm_k_img = RMSNorm(config.dim, config.eps)

    def image_keys_values(self, x: Tensor) -> KeysValues:
        keys, values = self.norm_k_img(self.k_img(x)), self.v_img(x)
        return keys.unflatten(-1, self.split), values.unflatten(-1, self.split)

    def forward(self, x: Tensor, text: KeysValues, image: KeysValues | None) -> Tensor:
        q = self.query(x)
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
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        plan: Plan,
        cached: KeysValues | None,
        text: KeysValues,
        image: KeysValues | None,
    ) -> Tensor:
        """x (B, N, D), time (B, F, 6, D) float32: shift, scale and gate of attention, then of the MLP."""
        six = (time + self.modulation.float()).unsqueeze(3).unbind(2)
        y = self.self_attn(modulated(x, six[0], six[1], self.eps), plan, cached)
        x = gated(x, y, six[2])
        x = x + self.cross_attn(self.norm3(x), text, image)
        return gated(x, self.ffn(modulated(x, six[3], six[4], self.eps)), six[5])


class Head(nn.Module):
    """The last norm, modulated by each frame's timestep, and the projection to patches of latents."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, config.out_channels * config.patch_volume)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, N, D), time (B, F, D) float32."""
        shift, scale = (time.unsqueeze(2) + self.modulation.float()).unsqueeze(3).unbind(2)
        out: Tensor = self.head(modulated(x, shift, scale, self.eps))
        return out


class ImageEmbedding(nn.Module):
    """An image's features to tokens of the model's width."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(dim_in),
            nn.Linear(dim_in, dim_in),
            nn.GELU(),
            nn.Linear(dim_in, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out


def sinusoids(timesteps: Tensor, width: int) -> Tensor:
    """Cosines, then sines of timesteps in [0, 1000]: (...) -> (..., width) float64."""
    half = width // 2
    rates = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)
    angles = timesteps.double()[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Transformer(nn.Module):
    """The transformer. `forward` predicts the flow noise - clean at a timestep of its own for each frame."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.time_sinusoids, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)
        if config.image:
            self.img_emb = ImageEmbedding(config.image_dim, dim)
        if config.pose and dim != POSE_DIM:
            self.pose_proj = nn.Linear(POSE_DIM, dim)

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def cache(self, height: int, width: int, frames: int, *, sink: int = 0, batch: int = 1) -> KVCache:
        """An empty cache for `frames` latent frames of height x width, on the model's device in its type;
        `config.cache_bytes` tells its memory."""
        tokens = self.config.tokens(height, width)
        return KVCache(
            self.config, tokens, frames, sink=sink, batch=batch, device=self.device, dtype=self.dtype
        )

    def plan(
        self, frames: int, height: int, width: int, *, start: int = 0, cache: KVCache | None = None
    ) -> Plan:
        """The plan of a block: `frames` latent frames of height x width, the first one number `start` of
        its clip. It takes the block's place in `cache`, so make one plan for all passes over a block.

        Raises:
            ValueError: The size does not divide into patches, or the cache is too small for the block.
        """
        self.config.tokens(height, width)
        _, rows, columns = self.config.patch_size
        grid = frames, height // rows, width // columns
        rotations = rope.table(self.config.head_dim, start, *grid, self.device)
        return Plan(grid, rotations, cache.take(frames) if cache is not None else None)

    def cross(self, text: Tensor, image: Tensor | None = None) -> CrossCache:
        """Keys and values of a prompt and an image, for every pass under them.

        Args:
            text: (B, L, text_dim), L at most `text_length`: the tokens' embeddings, zero after the last
                one. Missing rows are zeros.
            image: (B, 257, image_dim), for a model that conditions on images: it needs one.

        Raises:
            ValueError: More tokens than `text_length`, or an image where none is taken, or none where one is.
        """
        config = self.config
        if text.shape[1] > config.text_length:
            raise ValueError(f"{text.shape[1]} text tokens, expected at most {config.text_length}")
        if (image is not None) != config.image:
            raise ValueError(f"this model takes {'an' if config.image else 'no'} image embedding")
        text = F.pad(text.to(self.device, self.dtype), (0, 0, 0, config.text_length - text.shape[1]))
        text = self.text_embedding(text)
        layers = [module for module in self.modules() if isinstance(module, CrossAttention)]
        of_text = [layer.keys_values(text) for layer in layers]
        if image is None:
            return CrossCache(of_text)
        image = self.img_emb(image.to(self.device, self.dtype))
        return CrossCache(of_text, [layer.image_keys_values(image) for layer in layers])

    def pose_tokens(self, pose: Tensor) -> Tensor:
        """Pose embedding (B, 5120, F, H / 2, W / 2) to tokens (B, N, D) for `forward`.

        Raises:
            ValueError: The model has no weights to project them (`config.takes_pose`).
        """
        if not self.config.takes_pose:
            raise ValueError("this model has no pose_proj: it was not trained for poses")
        tokens = rearrange(pose.to(self.device, self.dtype), "b c f h w -> b (f h w) c")
        return self.pose_proj(tokens) if self.config.dim != POSE_DIM else tokens

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        cross: CrossCache,
        plan: Plan,
        cache: KVCache | None = None,
        *,
        y: Tensor | None = None,
        pose: Tensor | None = None,
    ) -> Tensor:
        """Flow of a block of latents.

        Args:
            x: (B, 16, F, H, W): noised latents.
            timesteps: (B, F), in [0, 1000], on any device.
            cross: `cross(text, image)`.
            plan: `plan(F, H, W, ...)`, with the same cache.
            cache: The block's past; the block's keys and values are left there. `None`: there is none.
            y: (B, 20, F, H, W): mask and latents of the image, for a model that conditions on images.
            pose: (B, N, D): `pose_tokens(...)`.

        Returns:
            (B, 16, F, H, W), of the model's type.
        """
        config = self.config
        _, p, q = config.patch_size
        frames, height, width = plan.grid
        latents = x.to(self.dtype) if y is None else torch.cat([x.to(self.dtype), y.to(self.dtype)], dim=1)
        # A kernel that is its own stride is a matrix product.
        patches = rearrange(latents, "b c f (h p) (w q) -> b (f h w) (c p q)", p=p, q=q)
        x = F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        if pose is not None:
            x = x + pose
        time = to_device(sinusoids(timesteps, config.time_sinusoids).to(self.dtype), self.device)
        time = self.time_embedding(time)
        six = self.time_projection(time).unflatten(-1, (6, -1)).float()
        for layer, block in enumerate(self.blocks):
            x = block(
                x, six, plan,
                None if cache is None else cache.layers[layer],
                cross.text[layer],
                None if cross.image is None else cross.image[layer],
            )  # fmt: skip
        out: Tensor = rearrange(
            self.head(x, time.float()), "b (f h w) (p q c) -> b c f (h p) (w q)",
            f=frames, h=height, w=width, p=p, q=q,
        )  # fmt: skip
        return out
