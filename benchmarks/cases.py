"""The passes that `benchmarks.models` measures: our models with random weights, what goes in, and the peer
that computes the same, where a library that others keep well has one. Knows nothing of time or memory.

Where a CPU has no 16-bit arithmetic a library's pass in 16 bits takes up to two hundred times as long as in
float32: there it computes in float32 what ours computes in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import nn

from app.models.seedvr2.config import config_3b
from app.models.seedvr2.dit import DiT
from app.models.seedvr2.vae import VideoVAE
from app.models.seedvr2.vae_config import VAEConfig as SeedVAEConfig
from app.models.wan.config import TransformerConfig
from app.models.wan.transformer import Transformer
from app.models.wan.umt5 import UMT5Encoder
from app.models.wan.umt5_config import UMT5Config
from app.models.wan.vae import WanVAE
from app.models.wan.vae_config import VAEConfig as WanVAEConfig
from app.nn.linear import slow_in

Way = Callable[[], object]
Model = TypeVar("Model", bound=nn.Module)
WINDOW = 21  # latent frames that a full cache of Self-Forcing holds
BLOCK = 3  # of them the newest block's
TEXT = 512  # tokens of Wan's prompts


@dataclass(frozen=True)
class Size:
    """Of a clip: frames, and pixels in height and width. Of a prompt: `tokens`."""

    frames: int
    height: int
    width: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def latents(self) -> tuple[int, int, int]:
        return 1 + (self.frames - 1) // 4, self.height // 8, self.width // 8


QUICK = (Size(1, 16, 16, 8),)
SMALL = (Size(5, 32, 48, 64), Size(9, 64, 96, 256), Size(17, 96, 144, 512))
REAL = (Size(17, 480, 832, 64), Size(21, 720, 1280, 256), Size(21, 1088, 1920, 512))


@dataclass(frozen=True)
class Case:
    """`ours` and `peer`: passes that are ready to be timed. `size` in words."""

    size: str
    ours: Way
    peer: Way | None = None


Make = Callable[[Size, torch.dtype, str, bool], Case]


def seedvr2_dit(size: Size, dtype: torch.dtype, device: str, real: bool) -> Case:
    config = config_3b() if real else config_3b(dim=256, heads=2, layers=4, separate=2, text_dim=256)
    model = ready(lambda: DiT(config), dtype, device)
    plan = model.plan(*size.latents, 58)
    latents = draw(dtype, device, *size.latents, config.in_channels)
    text = draw(dtype, device, 58, config.text_dim)
    return Case(str(size), lambda: model(latents, text, 500.0, plan))


def seedvr2_vae(size: Size, dtype: torch.dtype, device: str, real: bool) -> VideoVAE:
    config = (
        SeedVAEConfig() if real else SeedVAEConfig(block_out_channels=(32, 64, 128, 128), layers_per_block=1)
    )
    return ready(lambda: VideoVAE(config), dtype, device)


def seedvr2_encode(size: Size, dtype: torch.dtype, device: str, real: bool) -> Case:
    model = seedvr2_vae(size, dtype, device, real)
    frames = draw(dtype, device, 1, 3, size.frames, size.height, size.width)
    return Case(str(size), lambda: model.encode(frames))


def seedvr2_decode(size: Size, dtype: torch.dtype, device: str, real: bool) -> Case:
    model = seedvr2_vae(size, dtype, device, real)
    latents = draw(dtype, device, 1, 16, *size.latents)
    return Case(str(size), lambda: model.decode(latents))


def wan_vaes(dtype: torch.dtype, device: str, real: bool) -> tuple[WanVAE, Any]:
    theirs = import_module("diffusers").AutoencoderKLWan
    config = WanVAEConfig.published() if real else replace(WanVAEConfig.published(), dim=32, num_res_blocks=1)
    peer = ready(
        lambda: theirs(base_dim=config.dim, num_res_blocks=config.num_res_blocks),
        peers(dtype, device),
        device,
    )
    return ready(lambda: WanVAE(config), dtype, device), peer


def wan_encode(size: Size, dtype: torch.dtype, device: str, real: bool) -> Case:
    ours, peer = wan_vaes(dtype, device, real)
    frames = draw(dtype, device, 1, 3, size.frames, size.height, size.width)
    same = frames.to(peers(dtype, device))
    return Case(str(size), lambda: ours.encode(frames), lambda: peer.encode(same))


def wan_decode(size: Size, dtype: torch.dtype, device: str, real: bool) -> Case:
    ours, peer = wan_vaes(dtype, device, real)
    latents = draw(dtype, device, 1, 16, *size.latents)
    same = latents.to(peers(dtype, device))
    return Case(str(size), lambda: ours.decode(latents), lambda: peer.decode(same))


def wan_config(real: bool) -> TransformerConfig:
    return (
        TransformerConfig()
        if real
        else TransformerConfig(dim=256, ffn_dim=1024, heads=2, layers=4, text_dim=256)
    )


def wan_clip(size: Size, dtype: torch.dtype, device: str, real: bool) -> Case:
    """The whole clip at once. Beside the pass the peer projects the prompt for each layer, which ours does
    once for all passes: here it is in both."""
    theirs = import_module("diffusers").WanTransformer3DModel
    config = wan_config(real)
    ours = ready(lambda: Transformer(config), dtype, device)
    peer = ready(
        lambda: theirs(
            num_attention_heads=config.heads, attention_head_dim=config.head_dim, in_channels=16,
            out_channels=16, text_dim=config.text_dim, ffn_dim=config.ffn_dim, num_layers=config.layers,
        ), peers(dtype, device), device,
    )  # fmt: skip
    frames, height, width = size.latents
    latents = draw(dtype, device, 1, 16, frames, height, width)
    text = draw(dtype, device, 1, TEXT, config.text_dim)
    times, time = torch.full((1, 1), 500.0), torch.tensor([500], device=device)
    plan = ours.plan(frames, height, width)
    same, prompt = (each.to(peers(dtype, device)) for each in (latents, text))
    return Case(
        str(size), lambda: ours(latents, times, ours.cross(text), plan), lambda: peer(same, time, prompt)
    )


def wan_block(size: Size, dtype: torch.dtype, device: str, real: bool) -> Case:
    """The newest block of latents, with a full cache behind it. No library has a peer: the reference is
    our own pass over all that the cache stands for."""
    config = wan_config(real)
    model = ready(lambda: Transformer(config), dtype, device)
    _, height, width = size.latents
    cross = model.cross(draw(dtype, device, 1, TEXT, config.text_dim))
    cache = model.cache(height, width, WINDOW)
    for layer in cache.layers:
        for part in layer:
            part.normal_()
    cache.take(WINDOW - BLOCK)
    latents = draw(dtype, device, 1, 16, WINDOW, height, width)
    block, times = latents[:, :, -BLOCK:], model.times(torch.full((1, 1), 500.0))  # once a schedule
    plan = model.plan(BLOCK, height, width, start=WINDOW - BLOCK, cache=cache)
    whole = model.plan(WINDOW, height, width)
    return Case(
        f"{BLOCK} of {WINDOW} latents, {size.height}x{size.width}",
        lambda: model(block, times, cross, plan, cache),
        lambda: model(latents, times, cross, whole),
    )


def umt5(size: Size, dtype: torch.dtype, device: str, real: bool) -> Case:
    from transformers import UMT5Config as TheirConfig
    from transformers import UMT5EncoderModel

    config = UMT5Config() if real else UMT5Config(1024, 256, 256, 640, 4, 4)
    ours = ready(lambda: UMT5Encoder(config), dtype, device)
    theirs = TheirConfig(
        vocab_size=config.vocab, d_model=config.dim, d_ff=config.hidden_dim, num_layers=config.layers,
        num_heads=config.heads, d_kv=config.attention_dim // config.heads, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    peer = ready(lambda: UMT5EncoderModel(theirs), peers(dtype, device), device)
    ids = torch.randint(config.vocab, (1, size.tokens), device=device)
    mask = torch.ones_like(ids)
    return Case(
        f"{size.tokens} tokens", lambda: ours(ids, mask), lambda: peer(input_ids=ids, attention_mask=mask)
    )


CASES: dict[str, tuple[Make, str]] = {  # how it is made, and what it is compared with
    "SeedVR2 DiT": (seedvr2_dit, "-"),
    "SeedVR2 VAE encode": (seedvr2_encode, "-"),
    "SeedVR2 VAE decode": (seedvr2_decode, "-"),
    "Wan VAE encode": (wan_encode, "diffusers"),
    "Wan VAE decode": (wan_decode, "diffusers"),
    "Wan transformer, clip": (wan_clip, "diffusers"),
    "Wan transformer, block": (wan_block, "no cache"),
    "UMT5": (umt5, "transformers"),
}


def ready(build: Callable[[], Model], dtype: torch.dtype, device: str) -> Model:
    """The model with random weights, as small as trained ones."""
    with torch.device(device):
        model = build().to(dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "modulation" not in name:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model


def peers(dtype: torch.dtype, device: str) -> torch.dtype:
    """What a library computes in where ours computes in `dtype`."""
    return torch.float32 if device == "cpu" and slow_in(dtype) else dtype


def draw(dtype: torch.dtype, device: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)
