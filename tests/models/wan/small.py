"""Small Wan transformers with drawn weights, and what they take in."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from app.models.wan.config import POSE_DIM, TransformerConfig
from app.models.wan.transformer import Transformer
from tests import seeded
from tests.golden import draw

SMALL = TransformerConfig(dim=48, ffn_dim=64, heads=2, layers=2, text_dim=16, text_length=8, pose=True)
IMAGE = replace(SMALL, image=True, image_dim=20, in_channels=36)
SIZE = (4, 6)


@cache
def model(config: TransformerConfig = SMALL) -> Transformer:
    made = draw(Transformer(config), "small/")
    assert isinstance(made, Transformer)
    return made.requires_grad_(False)


def prompt(tag: str = "prompt", config: TransformerConfig = SMALL) -> Tensor:
    return seeded.randn(f"small/{tag}", 1, 5, config.text_dim)


def latents(tag: str, frames: int, channels: int = 16) -> Tensor:
    return seeded.randn(f"small/{tag}", 1, channels, frames, *SIZE)


def pose(frames: int) -> Tensor:
    return seeded.randn("small/pose", 1, POSE_DIM, frames, SIZE[0] // 2, SIZE[1] // 2)


def noise(block: int, step: int, shape: tuple[int, ...]) -> Tensor:
    return seeded.randn(f"small/noise/{block}/{step}", *shape)


def turn(x: Tensor, start: int, grid: tuple[int, int, int]) -> Tensor:
    """Rotary embedding by its definition: complex numbers in float64. x (tokens, heads, d)."""
    pairs = x.shape[-1] // 2
    third = pairs // 3
    widths = (pairs - 2 * third, third, third)
    where = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))
    where[:, 0] += start
    angles = [
        where[:, axis, None] / 10000 ** (torch.arange(width, dtype=torch.float64) / width)
        for axis, width in enumerate(widths)
    ]
    turns = torch.polar(torch.ones(1, dtype=torch.float64), torch.cat(angles, 1))[:, None]
    pair = torch.view_as_complex(x.double().reshape(*x.shape[:-1], pairs, 2))
    return torch.view_as_real(pair * turns).flatten(-2)


def plain(
    model: Transformer,
    x: Tensor,
    times: Sequence[float],
    text: Tensor,
    sees: Tensor,
    tokens: Tensor | None = None,
) -> Tensor:
    """The flow of a whole clip (1, 16, frames, H, W) without a cache: every frame at its own timestep, with
    attention written out in float64, frame i to frame j where `sees`[i, j]."""
    state = {name: value.double() for name, value in model.state_dict().items()}
    heads = model.config.heads

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ state[f"{name}.weight"].flatten(1).T + state[f"{name}.bias"]

    def rms(name: str, value: Tensor) -> Tensor:
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]

    def norm(value: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def split(value: Tensor) -> Tensor:
        return value.view(len(value), heads, -1)

    def mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)

    def gelu(value: Tensor) -> Tensor:
        return torch.nn.functional.gelu(value, approximate="tanh")

    silu = torch.nn.functional.silu
    _, _, frames, height, width = x.shape
    grid = (frames, height // 2, width // 2)
    each = grid[1] * grid[2]
    patches = x[0].double().unfold(2, 2, 2).unfold(3, 2, 2)  # (16, F, H/2, W/2, 2, 2)
    h = linear("patch_embedding", patches.permute(1, 2, 3, 0, 4, 5).reshape(frames * each, -1))
    if tokens is not None:
        h = h + linear("pose_proj", tokens[0].double().flatten(1).T)
    rates = 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angles = torch.tensor(times, dtype=torch.float64)[:, None] * rates
    time = linear("time_embedding.0", torch.cat([angles.cos(), angles.sin()], 1))
    time = linear("time_embedding.2", silu(time))
    six = linear("time_projection.1", silu(time)).view(frames, 6, -1)
    padded = torch.zeros(model.config.text_length, text.shape[-1], dtype=torch.float64)
    padded[: text.shape[1]] = text[0]
    context = linear("text_embedding.2", gelu(linear("text_embedding.0", padded)))
    mask = sees.repeat_interleave(each, 0).repeat_interleave(each, 1)
    for layer in range(model.config.layers):
        name = f"blocks.{layer}"
        m = (six + state[f"{name}.modulation"]).repeat_interleave(each, 0).unbind(1)
        y = norm(h) * (1 + m[1]) + m[0]
        q, k = (split(rms(f"{name}.self_attn.norm_{p}", linear(f"{name}.self_attn.{p}", y))) for p in "qk")
        v = split(linear(f"{name}.self_attn.v", y))
        h = h + linear(f"{name}.self_attn.o", mix(turn(q, 0, grid), turn(k, 0, grid), v, mask)) * m[2]
        y = norm(h) * state[f"{name}.norm3.weight"] + state[f"{name}.norm3.bias"]
        q = split(rms(f"{name}.cross_attn.norm_q", linear(f"{name}.cross_attn.q", y)))
        k = split(rms(f"{name}.cross_attn.norm_k", linear(f"{name}.cross_attn.k", context)))
        h = h + linear(f"{name}.cross_attn.o", mix(q, k, split(linear(f"{name}.cross_attn.v", context))))
        y = linear(f"{name}.ffn.0", norm(h) * (1 + m[4]) + m[3])
        h = h + linear(f"{name}.ffn.2", gelu(y)) * m[5]
    two = (time[:, None] + state["head.modulation"]).repeat_interleave(each, 0).unbind(1)
    out = linear("head.head", norm(h) * (1 + two[1]) + two[0]).view(*grid, 2, 2, 16)
    return out.permute(5, 0, 1, 3, 2, 4).reshape(1, 16, frames, height, width)
