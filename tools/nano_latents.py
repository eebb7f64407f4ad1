"""The nano codecs of the latent laboratory: a Stable Diffusion VAE that was trained, and a VQ-VAE by hand.

The VAE's weights ship with the code: weights/latents, made by train_nano_vae.py. The VQ-VAE keeps of a block
of 4 x 4 pixels and four frames its mean colour, rounded, so that what it gives back is known: the picture in
large pixels. Every other layer of it is there and passes on what it gets.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from app.models.latents.vqvae_config import VQConfig, vqvae_tensors

TRAINED = Path(__file__).resolve().parents[1] / "weights" / "latents"
LEVELS = 8  # of each colour, in the codebook

Tensors = dict[str, Tensor]


def write(folder: Path) -> None:
    """Write `sd-vae/config.json`, `sd-vae/diffusion_pytorch_model.safetensors` and `vqvae.safetensors` into
    `folder`. The same bytes every time."""
    sd = folder / "sd-vae"
    sd.mkdir(parents=True, exist_ok=True)
    for path in (TRAINED / "sd-vae").iterdir():
        shutil.copyfile(path, sd / path.name)
    (folder / "vqvae.safetensors").write_bytes(save(vqvae(VQConfig.nano()), {"format": "pt"}))


def vqvae(config: VQConfig) -> Tensors:
    """Weights of a VQ-VAE whose codebook holds 8 x 8 x 8 colours: of each block of pixels in space and time
    the mean colour, rounded. Colours run from 0 to 2 inside, where relu changes nothing."""
    assert config.codes == LEVELS**3 and config.dim >= 3 and config.width >= 3
    tensors = {name: torch.zeros(shape) for name, shape in vqvae_tensors(config).items()}
    level = torch.linspace(-1 + 1 / LEVELS, 1 - 1 / LEVELS, LEVELS)
    tensors["codebook"][:, :3] = torch.cartesian_prod(level, level, level)
    colours = torch.eye(config.width, 3)

    def set_conv(name: str, matrix: Tensor, bias: float, taps: Callable[[Tensor, Tensor], None]) -> None:
        taps(tensors[f"{name}.weight"], matrix)
        tensors[f"{name}.bias"][:3] = bias

    set_conv("encoder.conv_in", colours, 1, _centre)
    set_conv("encoder.conv_out", torch.eye(config.dim, config.width) * _first(config.width), -1, _centre)
    set_conv("decoder.conv_in", torch.eye(config.width, config.dim) * _first(config.dim), 1, _centre)
    set_conv("decoder.conv_out", colours.T, -1, _centre)
    for stage in range(len(config.halves_time)):
        set_conv(f"encoder.down.{stage}", colours @ colours.T, 0, _mean2x2)
        set_conv(f"decoder.up.{stage}", colours @ colours.T, 0, _centre)
    return tensors


def _first(width: int) -> Tensor:
    """1 for the three colours, 0 for the rest."""
    return (torch.arange(width) < 3).float()


def _centre(weight: Tensor, matrix: Tensor) -> None:
    """A kernel that reads its own pixel, of its own frame: the last that a causal one sees."""
    weight[..., -1, weight.shape[-2] // 2, weight.shape[-1] // 2].copy_(matrix)


def _mean2x2(weight: Tensor, matrix: Tensor) -> None:
    """A kernel of stride 2 and 4 taps, padded on both sides, that reads the mean of its 2 x 2 pixels in the
    middle, and of its last two frames if it halves time."""
    frames = min(2, weight.shape[2])
    for row in (1, 2):
        for column in (1, 2):
            share = (matrix / (4 * frames))[..., None]
            weight[..., -frames:, row, column].copy_(share.expand(*matrix.shape, frames))
