"""The Wan diffusion transformer, causal over blocks of frames (arXiv:2503.20314, arXiv:2506.08009).

Attribute names are the checkpoints' names, so there is no key map. A pass takes one block of frames; what
it may see of the past is in a `KVCache`, and without one the block is all there is (the bidirectional pass
of the undistilled model). The model knows nothing of noise schedules, prompts as text, pixels or files.

    cross = model.cross(embedding)                              # once a prompt
    times = model.times(timesteps)                              # once a timestep of the schedule
    plan = model.plan(3, 60, 104, start=0, cache=cache)         # once a block
    flow = model(latents, times, cross, plan, cache)            # every step

Types: weights and tokens are of the model's type; norms, modulation and rotations are computed in float32,
the timestep's sinusoids in float64. Tokens pass a layer in pieces (see `pieces`) and are changed in place.

Shape legend: B batch, F frames of the block, R rows of modulation (1 or F), H, W latent height and width, N
tokens of the block (F times the tokens of a frame), n tokens of a piece, D model width, h heads, d head
width. Layout of latents: (B, channels, F, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from app.models.wan import rope
from app.models.wan.cache import CrossCache, KVCache, Place
from app.models.wan.config import POSE_DIM, TransformerConfig
from app.models.wan.layers import Block, CrossAttention, Head, ImageEmbedding, Pass
from app.models.wan.pieces import pieces
from app.models.wan.steps import PLAIN, Steps
from app.nn.linear import Linear, linear
from app.nn.transfer import to_device

# Elements of a piece's tokens on a CPU: few enough to stay in its cache, enough for a matrix product's rate.
_BLOCK = 2**20


@dataclass(frozen=True)
class Plan:
    """What the passes over one block share: its grid of tokens, its rotations and its place in a cache."""

    grid: tuple[int, int, int]
    rotations: rope.Table
    place: Place | None


@dataclass(frozen=True)
class Times:
    """What timesteps do to every layer. Made by `Transformer.times`.

    layers: (B, R, 6, D) float32 each: shift, 1 + scale and gate of attention, then of the MLP. head:
    (B, R, 2, D) float32: shift and 1 + scale.
    """

    layers: Sequence[Tensor]
    head: Tensor


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
            Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(Linear(config.time_sinusoids, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)
        if config.image:
            self.img_emb = ImageEmbedding(config.image_dim, dim)
        if config.pose and dim != POSE_DIM:
            self.pose_proj = Linear(POSE_DIM, dim)
        self.steps: Steps = PLAIN

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

    def times(self, timesteps: Tensor) -> Times:
        """What timesteps do to every layer, for all passes at them: 1.1 MB for each of the 1.3B's.

        Args:
            timesteps: (B, F) in [0, 1000], on any device: one a frame; or (B, 1): one for all frames, which
                pass together.
        """
        time = sinusoids(timesteps, self.config.time_sinusoids).to(self.dtype)
        time = self.time_embedding(to_device(time, self.device))
        six = self.time_projection(time).unflatten(-1, (6, -1)).float()
        own = torch.stack([block.get_parameter("modulation") for block in self.blocks])
        layers = six + own.float().unsqueeze(1)  # (layers, B, R, 6, D)
        head = time.float().unsqueeze(2) + self.head.modulation.float()
        for scale in (layers[..., 1, :], layers[..., 4, :], head[..., 1, :]):
            scale.add_(1)
        return Times(layers.unbind(), head)

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
        times: Tensor | Times,
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
            times: `times(timesteps)`, or the timesteps themselves.
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
        x = linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        if pose is not None:
            x = x + pose
        times = self.times(times) if isinstance(times, Tensor) else times
        run = self._pass(x, plan, times)
        if cache is None or plan.place is None:
            stored = [(torch.empty_like(run.queries), torch.empty_like(run.queries))] * config.layers
        else:
            stored = list(cache.layers)
        for layer, block in enumerate(self.blocks):
            block(
                x, times.layers[layer], run, stored[layer], cross.text[layer],
                None if cross.image is None else cross.image[layer],
            )  # fmt: skip
        out: Tensor = rearrange(
            self.head(x, times.head, run), "b (f h w) (p q c) -> b c f (h p) (w q)",
            f=frames, h=height, w=width, p=p, q=q,
        )  # fmt: skip
        return out

    def _pass(self, x: Tensor, plan: Plan, times: Times) -> Pass:
        """What the layers share in a pass over the tokens x (B, N, D)."""
        batch, tokens, dim = x.shape
        whole = slice(0, tokens)
        place = plan.place or Place(((whole, whole),), tokens)
        at_once = max(1, _BLOCK // dim) if x.device.type == "cpu" else tokens
        cut = pieces(batch, tokens, times.head.shape[1], at_once, place.writes)
        queries = x.new_empty(batch, tokens, self.config.heads, self.config.head_dim)
        return Pass(cut, plan.rotations, queries, place.length, self.steps)
