"""Small codecs of every kind, with drawn weights, and clips for them."""

from collections.abc import Iterable
from functools import cache

import pytest
import torch
from torch import Tensor

from app.models.latents.codecs import ImageCodec, SeedVR2Codec, VQCodec, WanCodec
from app.models.latents.load import build_autoencoder_kl
from app.models.latents.sd_config import SDConfig
from app.models.latents.vqvae import VQVAE
from app.models.latents.vqvae_config import VQConfig
from app.models.seedvr2.vae import VideoVAE
from app.models.wan.vae import WanVAE
from app.models.wan.vae_config import VAEConfig
from tests.golden import draw
from tests.models.nano import SMALL
from tests.seeded import randn

CODECS = ("seedvr2-vae", "wan-vae", "vqvae", "sd-vae")


@cache
def codec(name: str) -> SeedVR2Codec | WanCodec | VQCodec | ImageCodec:
    """One for all tests: those that change its weights put them back."""
    if name == "seedvr2-vae":
        return SeedVR2Codec(draw(VideoVAE(SMALL.vae), "latents/"))
    if name == "wan-vae":
        return WanCodec(draw(WanVAE(VAEConfig.nano()), "latents/"))
    if name == "vqvae":
        vqvae = draw(VQVAE(VQConfig(width=8, inner=4, blocks=1, codes=32, dim=4)), "latents/")
        return VQCodec(vqvae.requires_grad_(False))
    pytest.importorskip("diffusers", reason="diffusers is not installed: Stable Diffusion's VAE needs it")
    vae = draw(build_autoencoder_kl(SDConfig.nano()), "latents/")
    return ImageCodec(vae.requires_grad_(False), SDConfig.nano())


def clip(frames: int, height: int = 16, width: int = 24) -> Tensor:
    """(frames, 3, height, width) in [-1, 1]."""
    return randn(f"latents/{frames}", frames, 3, height, width).clamp(-1, 1)


def encoded(codec, *chunks: Tensor) -> Tensor:
    return torch.cat(list(codec.encode(iter(chunks))), 1)


def decoded(codec, *chunks: Tensor) -> Tensor:
    return torch.cat(list(codec.decode(iter(chunks))))


def cut(x: Tensor, lengths: Iterable[int], dim: int) -> list[Tensor]:
    """Chunks of `lengths`, and the rest."""
    lengths = list(lengths)
    return list(x.split([*lengths, x.shape[dim] - sum(lengths)], dim))


def error(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape
    return float((out - reference).norm() / reference.norm())
